// Package backendtest is the conformance suite for implementations of backend.Backend. Call Run, or
// RunDurable, in a test of the implementation. If the implementation is a backend.Feeder, call
// RunFeed too. NewMemory and NewShared return reference implementations that are easy to read.
package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Run tests a backend against the contract of package backend. Run calls open for each subtest. The
// function open must return an empty backend. The subtest closes the backend. If the backend is a
// backend.DownScanner or a backend.AllGetter, Run tests ScanDown or GetAll too.
func Run(t *testing.T, open func(t *testing.T) backend.Backend) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			b := open(t)
			defer func() { require.NoError(t, b.Close()) }()
			c.run(t, b)
		})
	}
}

// RunDurable tests a backend with entries in a directory. RunDurable runs the tests of Run, and
// tests that the entries survive Close. RunDurable calls open with a directory that is new or was
// used before.
func RunDurable(t *testing.T, open func(t *testing.T, dir string) backend.Backend) {
	Run(t, func(t *testing.T) backend.Backend { return open(t, t.TempDir()) })
	t.Run("deletions survive Close", func(t *testing.T) {
		dir := t.TempDir()
		for range 3 {
			b := open(t, dir)
			requireNone(t, b, "k")
			put(t, b, "k", "v", 0)
			require.NoError(t, b.Close())
			b = open(t, dir)
			requireEntry(t, b, "k", "v", 1)
			require.NoError(t, b.Apply(ctx, deletion("k", 1)))
			require.NoError(t, b.Close())
		}
		b := open(t, dir)
		require.Empty(t, keysOf(t, b.Scan(ctx, nil, nil)))
		require.NoError(t, b.Close())
	})
	t.Run("entries survive Close", func(t *testing.T) {
		dir := t.TempDir()
		m := newModel(2)
		for range 5 {
			b := open(t, dir)
			m.compare(t, b)
			m.applyRandom(t, b, 300)
			require.NoError(t, b.Close())
		}
	})
}

// A check tests one sentence of the contract. The function run takes a require.TestingT instead of
// a *testing.T, so that a test of the suite can observe a check that fails.
type check struct {
	name string
	run  func(t require.TestingT, b backend.Backend)
}

var (
	ctx    = context.Background()
	checks = []check{
		{"Get returns what Apply wrote", func(t require.TestingT, b backend.Backend) {
			_, err := b.Get(ctx, []byte("k"))
			require.ErrorIs(t, err, backend.ErrNotFound)
			put(t, b, "k", "v", 0)
			requireEntry(t, b, "k", "v", 1)
			put(t, b, "empty", "", 0)
			requireEntry(t, b, "empty", "", 1)
		}},
		{"each write increments the revision", func(t require.TestingT, b backend.Backend) {
			for n := range uint64(10) {
				put(t, b, "k", fmt.Sprint(n), n)
				requireEntry(t, b, "k", fmt.Sprint(n), n+1)
			}
		}},
		{"Apply returns ErrConflict for another revision",
			func(t require.TestingT, b backend.Backend) {
				put(t, b, "k", "v", 0)
				put(t, b, "k", "w", 1)
				for _, expect := range []uint64{0, 1, 3, 1 << 63} {
					require.ErrorIs(t, b.Apply(ctx, change("k", "x", expect)), backend.ErrConflict)
				}
				require.ErrorIs(t, b.Apply(ctx, change("none", "x", 1)), backend.ErrConflict)
				requireEntry(t, b, "k", "w", 2)
				_, err := b.Get(ctx, []byte("none"))
				require.ErrorIs(t, err, backend.ErrNotFound)
			}},
		{"Apply makes all changes or none", func(t require.TestingT, b backend.Backend) {
			require.NoError(t, b.Apply(ctx, change("a", "1", 0), change("b", "1", 0)))
			err := b.Apply(ctx, change("a", "2", 1), change("c", "2", 0), change("b", "2", 7))
			require.ErrorIs(t, err, backend.ErrConflict)
			requireEntry(t, b, "a", "1", 1)
			requireEntry(t, b, "b", "1", 1)
			requireNone(t, b, "c")
			require.NoError(t, b.Apply(ctx, change("a", "2", 1), change("c", "2", 0),
				change("b", "2", 1)))
			requireEntry(t, b, "b", "2", 2)
		}},
		{"a deleted key is gone and may be written again",
			func(t require.TestingT, b backend.Backend) {
				put(t, b, "j", "v", 0)
				put(t, b, "l", "v", 0)
				for range 3 {
					put(t, b, "k", "v", 0)
					put(t, b, "k", "w", 1)
					require.NoError(t, b.Apply(ctx, deletion("k", 2)))
					requireNone(t, b, "k")
					require.Equal(t, []string{"j", "l"}, keysOf(t, b.Scan(ctx, nil, nil)))
					require.Equal(t, []string{"j", "l"}, keysOf(t, b.Snapshot(ctx, nil, nil)))
					require.ErrorIs(t, b.Apply(ctx, change("k", "x", 2)), backend.ErrConflict)
					require.ErrorIs(t, b.Apply(ctx, deletion("k", 2)), backend.ErrConflict)
				}
				put(t, b, "k", "x", 0)
				requireEntry(t, b, "k", "x", 1)
				requireEntry(t, b, "j", "v", 1)
			}},
		{"a deletion checks the expected revision", func(t require.TestingT, b backend.Backend) {
			put(t, b, "k", "v", 0)
			put(t, b, "k", "w", 1)
			put(t, b, "other", "v", 0)
			for _, expect := range []uint64{1, 3, 1 << 63} {
				require.ErrorIs(t, b.Apply(ctx, deletion("k", expect)), backend.ErrConflict)
				err := b.Apply(ctx, change("a", "v", 0), deletion("other", 1),
					deletion("k", expect))
				require.ErrorIs(t, err, backend.ErrConflict)
			}
			require.ErrorIs(t, b.Apply(ctx, deletion("other", 1), deletion("none", 1)),
				backend.ErrConflict)
			require.Error(t, b.Apply(ctx, deletion("other", 1), deletion("none", 0)))
			require.Error(t, b.Apply(ctx, deletion("other", 1), deletion("k", 0)))
			withValue, withRevision := deletion("k", 2), deletion("k", 2)
			withValue.Value, withRevision.Revision = []byte("v"), 3
			require.Error(t, b.Apply(ctx, withValue))
			require.Error(t, b.Apply(ctx, withRevision))
			requireEntry(t, b, "k", "w", 2)
			requireEntry(t, b, "other", "v", 1)
			requireNone(t, b, "a")
		}},
		{"one Apply may write and delete", func(t require.TestingT, b backend.Backend) {
			require.NoError(t, b.Apply(ctx, change("a", "1", 0), change("b", "1", 0)))
			err := b.Apply(ctx, deletion("a", 1), change("b", "2", 7), change("c", "2", 0))
			require.ErrorIs(t, err, backend.ErrConflict)
			requireEntry(t, b, "a", "1", 1)
			require.NoError(t, b.Apply(ctx, deletion("a", 1), change("b", "2", 1),
				change("c", "2", 0)))
			requireNone(t, b, "a")
			requireEntry(t, b, "b", "2", 2)
			requireEntry(t, b, "c", "2", 1)
		}},
		{"Change.Revision sets the new revision", func(t require.TestingT, b backend.Backend) {
			to := func(expect, revision uint64) error {
				c := change("k", fmt.Sprint(revision), expect)
				c.Revision = revision
				return b.Apply(ctx, c)
			}
			require.NoError(t, to(0, 7))
			requireEntry(t, b, "k", "7", 7)
			require.ErrorIs(t, to(0, 8), backend.ErrConflict)
			require.ErrorIs(t, to(6, 8), backend.ErrConflict)
			require.NoError(t, to(7, 8), "the same as the default")
			for _, revision := range []uint64{1, 7, 8} {
				require.Error(t, to(8, revision), "not greater than Expect")
			}
			requireEntry(t, b, "k", "8", 8)
			put(t, b, "k", "w", 8)
			requireEntry(t, b, "k", "w", 9)
			require.NoError(t, to(9, math.MaxUint64))
			requireEntry(t, b, "k", fmt.Sprint(uint64(math.MaxUint64)), math.MaxUint64)
			require.Error(t, b.Apply(ctx, change("k", "x", math.MaxUint64)),
				"no greater revision exists")
			requireEntry(t, b, "k", fmt.Sprint(uint64(math.MaxUint64)), math.MaxUint64)
			require.NoError(t, b.Apply(ctx, deletion("k", math.MaxUint64)))
			put(t, b, "k", "v", 0)
			requireEntry(t, b, "k", "v", 1)
		}},
		{"keys and values may be any bytes", func(t require.TestingT, b backend.Backend) {
			keys := []string{
				"\x00", "\x00\x00", "!badger!x", "a", "a\x00", "a\x00b", "ab",
				"\xff", "\xff\xff", string(bytes.Repeat([]byte{0xff}, backend.MaxKeySize)),
			}
			for _, k := range keys {
				put(t, b, k, "\x00\xff"+k, 0)
			}
			for _, k := range keys {
				requireEntry(t, b, k, "\x00\xff"+k, 1)
			}
			require.Equal(t, keys, keysOf(t, b.Scan(ctx, nil, nil)), "in the order of their bytes")
		}},
		{"Scan and Snapshot yield a range in order", func(t require.TestingT, b backend.Backend) {
			var keys []string
			for n := range 1000 { // more than one page of any backend
				keys = append(keys, fmt.Sprintf("k%04d", n))
			}
			reads := []func(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error]{
				b.Scan, b.Snapshot,
			}
			for _, read := range reads {
				require.Empty(t, keysOf(t, read(ctx, nil, nil)))
			}
			for _, n := range rand.Perm(len(keys)) {
				put(t, b, keys[n], "v", 0)
			}
			put(t, b, "j", "v", 0)
			put(t, b, "l", "v", 0)
			for _, read := range reads {
				require.Equal(t, keys, keysOf(t, read(ctx, []byte("k"), []byte("l"))))
				require.Equal(t, keys[10:20],
					keysOf(t, read(ctx, []byte(keys[10]), []byte(keys[20]))),
					"includes from, excludes to")
				tail := append(slices.Clone(keys[990:]), "l")
				require.Equal(t, tail, keysOf(t, read(ctx, []byte(keys[990]), nil)))
				require.Empty(t, keysOf(t, read(ctx, []byte("l"), []byte("k"))))
				require.Empty(t, keysOf(t, read(ctx, []byte("m"), nil)))
			}
			for part := range slices.Chunk(keys[5:995], backend.MaxChanges) {
				var changes []backend.Change
				for _, key := range part {
					changes = append(changes, deletion(key, 1))
				}
				require.NoError(t, b.Apply(ctx, changes...))
			}
			for _, read := range reads {
				rest := append(slices.Clone(keys[:5]), keys[995:]...)
				require.Equal(t, rest, keysOf(t, read(ctx, []byte("k"), []byte("l"))))
				require.Equal(t, []string{"l"}, keysOf(t, read(ctx, []byte(keys[100]), nil))[5:])
				require.Empty(t, keysOf(t, read(ctx, []byte(keys[5]), []byte(keys[995]))))
			}
		}},
		{"the body of a Scan may call every method", func(t require.TestingT, b backend.Backend) {
			for n := range 600 {
				put(t, b, fmt.Sprintf("k%04d", n), "v", 0)
			}
			seen := 0
			for e, err := range b.Scan(ctx, []byte("k"), nil) {
				require.NoError(t, err)
				require.Equal(t, fmt.Sprintf("k%04d", seen), string(e.Key))
				requireEntry(t, b, string(e.Key), "v", 1)
				put(t, b, string(e.Key), "w", 1)
				if seen++; seen == 300 {
					break
				}
			}
			require.Equal(t, 300, seen)
			var last error
			for _, err := range b.Scan(ctx, nil, nil) {
				require.NoError(t, last, "no step follows an error")
				if last = err; err == nil {
					require.NoError(t, b.Close())
				}
			}
			require.ErrorIs(t, last, backend.ErrClosed)
		}},
		{"GetAll returns what Get returns, in the order of the keys",
			func(t require.TestingT, b backend.Backend) {
				all, ok := b.(backend.AllGetter)
				if !ok {
					return
				}
				requireAll(t, all)
				requireAll(t, all, entry("k", "", 0))
				put(t, b, "k", "v", 0)
				put(t, b, "k", "w", 1)
				put(t, b, "empty", "", 0)
				put(t, b, "kk", "x", 0)
				requireAll(t, all, entry("k", "w", 2))
				requireAll(t, all, entry("none", "", 0), entry("kk", "x", 1), entry("", "", 0),
					entry("k", "w", 2), entry("empty", "", 1), entry("none", "", 0),
					entry("k", "w", 2), entry("k\x00", "", 0))
				require.NoError(t, b.Apply(ctx, deletion("k", 2), change("kk", "y", 1)))
				requireAll(t, all, entry("k", "", 0), entry("kk", "y", 2))
				var most []backend.Entry
				for _, key := range fill(t, b, backend.MaxChanges) {
					most = append(most, entry(key, "v", 1))
				}
				slices.Reverse(most)
				requireAll(t, all, most...)
				found, err := all.GetAll(ctx, [][]byte{[]byte("kk"), []byte("empty")})
				require.NoError(t, err)
				found[0].Key[0], found[0].Value[0] = 'X', 'X' // the slices belong to the caller
				requireAll(t, all, entry("kk", "y", 2), entry("empty", "", 1))
			}},
		{"ScanDown yields a range in descending order",
			func(t require.TestingT, b backend.Backend) {
				down, ok := b.(backend.DownScanner)
				if !ok {
					return
				}
				require.Empty(t, keysOf(t, down.ScanDown(ctx, nil, nil)))
				// more than one page of any backend
				keys := append(fill(t, b, 1000), "l", "\xff\xff")
				put(t, b, "j", "v", 0)
				put(t, b, "l", "v", 0)
				put(t, b, "\xff\xff", "v", 0)
				slices.Reverse(keys)
				require.Equal(t, append(slices.Clone(keys), "j"),
					keysOf(t, down.ScanDown(ctx, nil, nil)))
				require.Equal(t, keys[2:], keysOf(t, down.ScanDown(ctx, []byte("k"), []byte("l"))))
				require.Equal(t, keys, keysOf(t, down.ScanDown(ctx, []byte("k"), nil)))
				require.Equal(t, append(slices.Clone(keys[990:]), "j"),
					keysOf(t, down.ScanDown(ctx, nil, []byte(keys[989]))), "excludes to")
				require.Equal(t, keys[10:20],
					keysOf(t, down.ScanDown(ctx, []byte(keys[19]), []byte(keys[9]))),
					"includes from, excludes to")
				require.Equal(t, keys[10:20],
					keysOf(t, down.ScanDown(ctx, []byte(keys[19]), []byte(keys[10]+"\x00"))),
					"no entry has the key to")
				require.Empty(t, keysOf(t, down.ScanDown(ctx, []byte("l"), []byte("k"))))
				require.Empty(t, keysOf(t, down.ScanDown(ctx, nil, []byte("j"))))
				require.Empty(t, keysOf(t, down.ScanDown(ctx, []byte("\xff\xff\x00"), nil)))
				all := down.ScanDown(ctx, []byte("k"), []byte("l"))
				require.Equal(t, keysOf(t, all), keysOf(t, all), "two loops over one result")
				for part := range slices.Chunk(keys[7:997], backend.MaxChanges) {
					var changes []backend.Change
					for _, key := range part {
						changes = append(changes, deletion(key, 1))
					}
					require.NoError(t, b.Apply(ctx, changes...))
				}
				rest := append(slices.Clone(keys[2:7]), keys[997:]...)
				require.Equal(t, rest, keysOf(t, down.ScanDown(ctx, []byte("k"), []byte("l"))))
				require.Empty(t, keysOf(t, down.ScanDown(ctx, []byte(keys[996]), []byte(keys[6]))))
			}},
		{"the body of a ScanDown may call every method",
			func(t require.TestingT, b backend.Backend) {
				down, ok := b.(backend.DownScanner)
				if !ok {
					return
				}
				keys := fill(t, b, 600)
				seen := 0
				for e, err := range down.ScanDown(ctx, []byte("k"), nil) {
					require.NoError(t, err)
					seen++
					require.Equal(t, backend.Entry{Key: []byte(keys[600-seen]), Value: []byte("v"),
						Revision: 1}, e)
					requireEntry(t, b, string(e.Key), "v", 1)
					put(t, b, string(e.Key), "w", 1)
					e.Key[0], e.Value[0] = 'X', 'X' // the slices belong to the caller
					requireEntry(t, b, keys[600-seen], "w", 2)
					if seen == 300 {
						break
					}
				}
				require.Equal(t, 300, seen)
				// Every other entry is changed or removed long before the scan comes to the entry.
				last := keys[599]
				for e, err := range down.ScanDown(ctx, nil, nil) {
					require.NoError(t, err)
					if string(e.Key) == last {
						require.NoError(t, b.Apply(ctx, change(keys[0], "x", 1),
							deletion(keys[1], 1)))
					}
					require.NotEqual(t, keys[1], string(e.Key))
					if string(e.Key) == keys[0] {
						require.Equal(t, "x", string(e.Value), "as Get would read the entry")
					}
				}
				var end error
				for _, err := range down.ScanDown(ctx, nil, nil) {
					require.NoError(t, end, "no step follows an error")
					if end = err; err == nil {
						require.NoError(t, b.Close())
					}
				}
				require.ErrorIs(t, end, backend.ErrClosed)
			}},
		{"Snapshot shows one moment while its body writes",
			func(t require.TestingT, b backend.Backend) {
				keys := fill(t, b, 1000)
				s := b.Snapshot(ctx, []byte("k"), []byte("l"))
				put(t, b, "k", "before the first step", 0)
				n := 0
				for e, err := range s {
					require.NoError(t, err)
					if n == 0 {
						require.Equal(t, "before the first step", string(e.Value))
						changes := []backend.Change{deletion("k", 1), change("k0000x", "v", 0)}
						for i := 0; i < len(keys); i += 10 {
							changes = append(changes, change(keys[i], "w", 1))
						}
						require.NoError(t, b.Apply(ctx, changes...))
					} else {
						require.Equal(t, backend.Entry{Key: []byte(keys[n-1]), Value: []byte("v"),
							Revision: 1}, e)
					}
					if n++; n%100 == 0 && n < len(keys) {
						require.NoError(t, b.Apply(ctx, deletion(keys[n+1], 1)))
						requireNone(t, b, keys[n+1])
					}
				}
				require.Equal(t, len(keys)+1, n)

				n = 0
				for e, err := range s { // a second loop shows another moment
					require.NoError(t, err)
					switch n {
					case 0:
						require.Equal(t, backend.Entry{Key: []byte(keys[0]), Value: []byte("w"),
							Revision: 2}, e)
					case 1:
						require.Equal(t, "k0000x", string(e.Key))
					}
					if n++; n == 300 {
						break
					}
				}
				require.Equal(t, 300, n)
				require.Len(t, keysOf(t, s), len(keys)+1-9)
			}},
		{"Snapshot shows each Apply as a whole", func(t require.TestingT, b backend.Backend) {
			// Two writers move amounts between the first and the last key, and delete an account
			// that is empty. The writers continue while a snapshot is read.
			fill(t, b, 600)
			const total = 10
			require.NoError(t, b.Apply(ctx, change("a", fmt.Sprint(total), 0),
				change("moves", "", 0)))
			var acknowledged atomic.Uint64
			moved, stop, wrong := make(chan struct{}), make(chan struct{}), make(chan error, 2)
			var wg sync.WaitGroup
			for n := range 2 {
				wg.Go(func() {
					for random := rand.New(rand.NewPCG(3, uint64(n))); ; {
						switch err := transfer(b, random, total); {
						case err == nil:
							acknowledged.Add(1)
							select {
							case moved <- struct{}{}:
							default:
							}
						case !errors.Is(err, backend.ErrConflict):
							wrong <- err
							return
						}
						select {
						case <-stop:
							return
						default:
						}
					}
				})
			}
			defer wg.Wait()
			defer close(stop)
			next := func() {
				select {
				case <-moved:
				case err := <-wrong:
					require.NoError(t, err)
				}
			}
			for range 20 {
				sum, fillers := 0, 0
				var moves uint64
				before := acknowledged.Load()
				for e, err := range b.Snapshot(ctx, nil, nil) {
					require.NoError(t, err)
					switch key := string(e.Key); key {
					case "a", "z":
						amount, err := strconv.Atoi(string(e.Value))
						require.NoError(t, err)
						require.Positive(t, amount)
						sum += amount
					case "moves":
						moves = e.Revision - 1
					default:
						fillers++
					}
					if key := string(e.Key); key == "k0000" {
						// one writer makes two moves, and begins the second after this step
						for range 3 {
							next()
						}
					}
				}
				require.Equal(t, total, sum)
				require.Equal(t, 600, fillers)
				require.GreaterOrEqual(t, moves, before,
					"includes what was acknowledged before the start")
			}
		}},
		{"Snapshot ends with its context, and with Close",
			func(t require.TestingT, b backend.Backend) {
				fill(t, b, 1000)
				cancelled, cancel := context.WithCancel(ctx)
				defer cancel()
				var last error
				for _, err := range b.Snapshot(cancelled, nil, nil) {
					require.NoError(t, last, "no step follows an error")
					last = err
					cancel()
				}
				require.ErrorIs(t, last, context.Canceled)
				var steps []error
				for e, err := range b.Snapshot(ctx, nil, nil) {
					if steps = append(steps, err); err == nil {
						require.NoError(t, b.Close())
					} else {
						require.Zero(t, e)
					}
				}
				require.Len(t, steps, 2)
				require.ErrorIs(t, steps[1], backend.ErrClosed)
			}},
		{"slices belong to the caller", func(t require.TestingT, b backend.Backend) {
			c := change("key", "value", 0)
			require.NoError(t, b.Apply(ctx, c))
			c.Key[0], c.Value[0] = 'X', 'X'
			requireEntry(t, b, "key", "value", 1)
			for _, all := range bothReads(b) {
				for e, err := range all {
					require.NoError(t, err)
					require.Equal(t, "key", string(e.Key))
					e.Key[0], e.Value[0] = 'X', 'X'
				}
			}
			e, err := b.Get(ctx, []byte("key"))
			require.NoError(t, err)
			_ = append(e.Value[:1], "XXX"...)
			e.Key[0] = 'X'
			requireEntry(t, b, "key", "value", 1)
		}},
		{"sizes are accepted up to the limits", func(t require.TestingT, b backend.Backend) {
			long := func(n int) string { return string(bytes.Repeat([]byte{'x'}, n)) }
			put(t, b, long(backend.MaxKeySize), long(backend.MaxValueSize), 0)
			requireEntry(t, b, long(backend.MaxKeySize), long(backend.MaxValueSize), 1)
			for _, tooLarge := range []backend.Change{
				change(long(backend.MaxKeySize+1), "", 0),
				change("b", long(backend.MaxValueSize+1), 0),
			} {
				require.ErrorIs(t, b.Apply(ctx, change("a", "", 0), tooLarge), backend.ErrTooLarge)
			}
			var changes []backend.Change
			for n := range backend.MaxChanges {
				changes = append(changes, change(fmt.Sprint("many", n), long(1000), 0))
			}
			require.ErrorIs(t, b.Apply(ctx, append(changes, change("a", "", 0))...),
				backend.ErrTooLarge)
			require.NoError(t, b.Apply(ctx, changes...))
			changes = nil
			for remaining, n := backend.MaxApplySize, 0; remaining > 0; n++ {
				key := fmt.Sprint("large", n)
				value := min(remaining-len(key), backend.MaxValueSize)
				changes = append(changes, change(key, long(value), 0))
				remaining -= len(key) + value
			}
			require.ErrorIs(t, b.Apply(ctx, append(changes, change("a", "", 0))...),
				backend.ErrTooLarge)
			require.NoError(t, b.Apply(ctx, changes...))
			require.Error(t, b.Apply(ctx))
			require.Error(t, b.Apply(ctx, change("", "v", 0)))
			require.Error(t, b.Apply(ctx, change("a", "1", 0), change("a", "2", 0)))
			requireNone(t, b, "a")
		}},
		{"Check compares and writes nothing", func(t require.TestingT, b backend.Backend) {
			put(t, b, "guard", "v", 0)
			put(t, b, "guard", "w", 1)
			require.NoError(t, b.Apply(ctx, checkOf("guard", 2), change("k", "v", 0)))
			require.NoError(t, b.Apply(ctx, change("k", "w", 1), checkOf("none", 0),
				checkOf("guard", 2)))
			require.NoError(t, b.Apply(ctx, deletion("k", 2), checkOf("guard", 2)))
			for _, check := range []backend.Change{
				checkOf("guard", 0), checkOf("guard", 1), checkOf("guard", 3), checkOf("none", 1),
				checkOf("k", 2),
			} {
				require.ErrorIs(t, b.Apply(ctx, change("l", "v", 0), check), backend.ErrConflict)
				require.ErrorIs(t, b.Apply(ctx, check, change("l", "v", 0)), backend.ErrConflict)
			}
			require.Error(t, b.Apply(ctx, checkOf("guard", 2)), "no change writes or deletes")
			requireNone(t, b, "l")
			requireNone(t, b, "none")
			requireEntry(t, b, "guard", "w", 2)
		}},
		{"no Apply that checks for an entry succeeds after another Apply has made the entry",
			func(t require.TestingT, b backend.Backend) {
				for n := range 100 {
					mark, key := fmt.Sprint("mark", n), fmt.Sprint("k", n)
					var checked, made error
					var both sync.WaitGroup
					both.Go(func() { checked = b.Apply(ctx, change(key, "v", 0), checkOf(mark, 0)) })
					both.Go(func() { made = b.Apply(ctx, change(mark, "v", 0), checkOf(key, 0)) })
					both.Wait()
					// Whichever comes first makes the other conflict.
					if checked != nil {
						checked, made = made, checked
					}
					require.NoError(t, checked)
					require.ErrorIs(t, made, backend.ErrConflict)
				}
			}},
		{"every call ends when its context is done", func(t require.TestingT, b backend.Backend) {
			done, cancel := context.WithCancel(ctx)
			cancel()
			for _, err := range everyCall(done, b) {
				require.ErrorIs(t, err, context.Canceled)
			}
			requireNone(t, b, "k")
		}},
		{"every call after Close returns ErrClosed", func(t require.TestingT, b backend.Backend) {
			put(t, b, "k", "v", 0)
			require.NoError(t, b.Close())
			require.NoError(t, b.Close())
			for _, err := range everyCall(ctx, b) {
				require.ErrorIs(t, err, backend.ErrClosed)
			}
		}},
		{"Close may run during other calls", func(t require.TestingT, b backend.Backend) {
			var wg sync.WaitGroup
			wrong := make(chan error, 8)
			started := make(chan struct{}, 8)
			for n := range 8 {
				wg.Go(func() {
					started <- struct{}{}
					for expect := uint64(0); ; expect++ {
						err := b.Apply(ctx, change(fmt.Sprint(n), "v", expect))
						if err == nil {
							_, err = b.Get(ctx, []byte(fmt.Sprint(n)))
						}
						if err != nil {
							if !errors.Is(err, backend.ErrClosed) {
								wrong <- err
							}
							return
						}
					}
				})
			}
			for range 8 {
				<-started
			}
			require.NoError(t, b.Close())
			wg.Wait()
			require.Empty(t, wrong)
		}},
		{"concurrent writers lose no update", func(t require.TestingT, b backend.Backend) {
			const writers, each = 8, 25
			var wg sync.WaitGroup
			wrong := make(chan string, 2*writers)
			fail := func(format string, args ...any) { wrong <- fmt.Sprintf(format, args...) }
			put(t, b, "counter", "0", 0)
			stop := make(chan struct{})
			var readers sync.WaitGroup
			for range 2 {
				readers.Go(func() {
					for last := uint64(0); ; {
						select {
						case <-stop:
							return
						default:
						}
						e, err := b.Get(ctx, []byte("counter"))
						if err != nil || e.Revision < last ||
							string(e.Value) != fmt.Sprint(e.Revision-1) {
							fail("after revision %d, Get returned %d, %q, %v", last, e.Revision,
								e.Value, err)
							return
						}
						last = e.Revision
					}
				})
			}
			for range writers {
				wg.Go(func() {
					for done := 0; done < each; {
						e, err := b.Get(ctx, []byte("counter"))
						if err == nil {
							err = b.Apply(ctx, change("counter", fmt.Sprint(e.Revision),
								e.Revision))
						}
						switch {
						case err == nil:
							done++
							if now, err := b.Get(ctx, []byte("counter")); err != nil ||
								now.Revision <= e.Revision {
								fail("Get does not see what Apply acknowledged: %d, %v",
									now.Revision, err)
								return
							}
						case !errors.Is(err, backend.ErrConflict):
							fail("%v", err)
							return
						}
					}
				})
			}
			wg.Wait()
			close(stop)
			readers.Wait()
			select {
			case what := <-wrong:
				require.Fail(t, what)
			default:
			}
			requireEntry(t, b, "counter", fmt.Sprint(writers*each), writers*each+1)
		}},
		{"a backend behaves like a map", func(t require.TestingT, b backend.Backend) {
			m := newModel(1)
			m.applyRandom(t, b, 1000)
			m.compare(t, b)
		}},
	}
)

// transfer makes one Apply. It distributes the total between "a" and "z" at random, and increments
// the revision of "moves".
func transfer(b backend.Backend, random *rand.Rand, total int) error {
	// Each transfer changes "moves", which is read first: so a transfer in between is a conflict, also
	// if "a" or "z" were deleted and have the same revisions again.
	var entries [3]backend.Entry
	for i, key := range []string{"moves", "a", "z"} {
		e, err := b.Get(ctx, []byte(key))
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		entries[i] = e
	}
	amount := random.IntN(total + 1)
	changes := []backend.Change{change("moves", "", entries[0].Revision)}
	for i, amount := range []int{amount, total - amount} {
		switch key, expect := [2]string{"a", "z"}[i], entries[i+1].Revision; {
		case amount > 0:
			changes = append(changes, change(key, fmt.Sprint(amount), expect))
		case expect > 0:
			changes = append(changes, deletion(key, expect))
		}
	}
	return b.Apply(ctx, changes...)
}

// A model is the expected content of a backend: a map. The changes are random, from a seed.
type model struct {
	random  *rand.Rand
	entries map[string]backend.Entry
}

func newModel(seed uint64) *model {
	return &model{rand.New(rand.NewPCG(seed, seed)), make(map[string]backend.Entry)}
}

// applyRandom applies random changes to the backend and the model, some of which conflict.
func (m *model) applyRandom(t require.TestingT, b backend.Backend, steps int) {
	for range steps {
		var changes []backend.Change
		conflict := false
		for _, n := range m.random.Perm(20)[:1+m.random.IntN(4)] {
			key := fmt.Sprint("k", n)
			expect := m.entries[key].Revision
			if m.random.IntN(10) == 0 {
				expect += 1 + m.random.Uint64N(3)
				conflict = true
			}
			c := change(key, fmt.Sprint(m.random.Uint64()), expect)
			switch n := m.random.IntN(10); {
			case n < 2 && expect > 0:
				c = deletion(key, expect)
			case n == 2:
				c.Revision = expect + 1 + m.random.Uint64N(3)
			case n == 3 && len(changes) > 0:
				c = checkOf(key, expect)
			}
			changes = append(changes, c)
		}
		err := b.Apply(ctx, changes...)
		if conflict {
			require.ErrorIs(t, err, backend.ErrConflict)
		} else {
			require.NoError(t, err)
			for _, c := range changes {
				if c.Check {
					continue
				}
				if c.Delete {
					delete(m.entries, string(c.Key))
					continue
				}
				m.entries[string(c.Key)] = backend.Entry{
					Key: c.Key, Value: c.Value, Revision: max(c.Revision, c.Expect+1),
				}
			}
		}
		if all, ok := b.(backend.AllGetter); ok {
			var want []backend.Entry
			for _, n := range m.random.Perm(20)[:m.random.IntN(4)] {
				key := fmt.Sprint("k", n)
				e := m.entries[key]
				want = append(want, entry(key, string(e.Value), e.Revision))
			}
			requireAll(t, all, want...)
		}
		if key := fmt.Sprint("k", m.random.IntN(20)); m.entries[key].Revision > 0 {
			requireEntry(t, b, key, string(m.entries[key].Value), m.entries[key].Revision)
		} else {
			requireNone(t, b, key)
		}
	}
}

// compare checks that Scan and Snapshot yield the entries of the model.
func (m *model) compare(t require.TestingT, b backend.Backend) {
	keys := slices.Sorted(maps.Keys(m.entries))
	for _, all := range bothReads(b) {
		n := 0
		for e, err := range all {
			require.NoError(t, err)
			require.Less(t, n, len(keys))
			require.Equal(t, m.entries[keys[n]], e)
			n++
		}
		require.Equal(t, len(keys), n)
	}
	if down, ok := b.(backend.DownScanner); ok {
		slices.Reverse(keys)
		found := keysOf(t, down.ScanDown(ctx, nil, nil))
		require.True(t, slices.Equal(keys, found), "ScanDown yields %v, and not %v", found, keys)
	}
}

func change(key, value string, expect uint64) backend.Change {
	return backend.Change{Key: []byte(key), Value: []byte(value), Expect: expect}
}

func checkOf(key string, expect uint64) backend.Change {
	return backend.Change{Key: []byte(key), Expect: expect, Check: true}
}

func deletion(key string, expect uint64) backend.Change {
	return backend.Change{Key: []byte(key), Expect: expect, Delete: true}
}

func put(t require.TestingT, b backend.Backend, key, value string, expect uint64) {
	require.NoError(t, b.Apply(ctx, change(key, value, expect)))
}

func requireEntry(t require.TestingT, b backend.Backend, key, value string, revision uint64) {
	e, err := b.Get(ctx, []byte(key))
	require.NoError(t, err)
	require.Equal(t, key, string(e.Key))
	require.Equal(t, value, string(e.Value))
	require.Equal(t, revision, e.Revision)
}

// entry returns an expected entry. The revision 0 means that there is no entry.
func entry(key, value string, revision uint64) backend.Entry {
	return backend.Entry{Key: []byte(key), Value: []byte(value), Revision: revision}
}

// requireAll checks that GetAll returns the entries.
func requireAll(t require.TestingT, b backend.AllGetter, want ...backend.Entry) {
	keys := make([][]byte, len(want))
	for i := range want {
		keys[i] = want[i].Key
	}
	found, err := b.GetAll(ctx, keys)
	require.NoError(t, err)
	require.Len(t, found, len(want))
	for i, e := range found {
		if want[i].Revision == 0 {
			require.Equal(t, backend.Entry{}, e)
			continue
		}
		require.Equal(t, string(want[i].Key), string(e.Key))
		require.Equal(t, string(want[i].Value), string(e.Value))
		require.Equal(t, want[i].Revision, e.Revision)
	}
}

func requireNone(t require.TestingT, b backend.Backend, key string) {
	_, err := b.Get(ctx, []byte(key))
	require.ErrorIs(t, err, backend.ErrNotFound, key)
}

// fill writes n entries with the value v, and returns the keys.
func fill(t require.TestingT, b backend.Backend, n int) (keys []string) {
	var changes []backend.Change
	for i := range n {
		keys = append(keys, fmt.Sprintf("k%04d", i))
		changes = append(changes, change(keys[i], "v", 0))
	}
	for part := range slices.Chunk(changes, backend.MaxChanges) {
		require.NoError(t, b.Apply(ctx, part...))
	}
	return keys
}

// bothReads returns a Scan and a Snapshot of all entries.
func bothReads(b backend.Backend) []iter.Seq2[backend.Entry, error] {
	return []iter.Seq2[backend.Entry, error]{b.Scan(ctx, nil, nil), b.Snapshot(ctx, nil, nil)}
}

func keysOf(t require.TestingT, entries iter.Seq2[backend.Entry, error]) (keys []string) {
	for e, err := range entries {
		require.NoError(t, err)
		keys = append(keys, string(e.Key))
	}
	return keys
}

// everyCall calls each method but Close and returns the errors.
func everyCall(ctx context.Context, b backend.Backend) []error {
	_, get := b.Get(ctx, []byte("k"))
	apply := b.Apply(ctx, change("k", "v", 0))
	scan := errors.New("the scan yielded nothing")
	for _, err := range b.Scan(ctx, nil, nil) {
		scan = err
	}
	snapshot := errors.New("the snapshot yielded nothing")
	for _, err := range b.Snapshot(ctx, nil, nil) {
		snapshot = err
	}
	errs := []error{get, apply, scan, snapshot}
	if all, ok := b.(backend.AllGetter); ok {
		_, err := all.GetAll(ctx, [][]byte{[]byte("k")})
		errs = append(errs, err)
	}
	if down, ok := b.(backend.DownScanner); ok {
		scanDown := errors.New("the scan yielded nothing")
		for _, err := range down.ScanDown(ctx, nil, nil) {
			scanDown = err
		}
		errs = append(errs, scanDown)
	}
	return errs
}
