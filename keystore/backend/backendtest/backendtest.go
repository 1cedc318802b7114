package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Run holds a backend to the contract. It calls open for each test, for a backend that is empty; the test closes it.
func Run(t *testing.T, open func(t *testing.T) backend.Backend) {
	for _, c := range checks {
		t.Run(c.name, func(t *testing.T) {
			b := open(t)
			defer func() { require.NoError(t, b.Close()) }()
			c.run(t, b)
		})
	}
}

// RunDurable holds a backend that keeps its entries in a directory to the contract, and to what is promised of it
// beyond Close. It calls open with a directory, new or used before.
func RunDurable(t *testing.T, open func(t *testing.T, dir string) backend.Backend) {
	Run(t, func(t *testing.T) backend.Backend { return open(t, t.TempDir()) })
	t.Run("entries outlive Close", func(t *testing.T) {
		dir := t.TempDir()
		m := newModel(2)
		for range 5 {
			b := open(t, dir)
			m.compare(t, b)
			m.work(t, b, 300)
			require.NoError(t, b.Close())
		}
	})
}

// A check is one sentence of the contract. It takes less than a *testing.T, so that the suite's own tests can watch
// it fail.
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
		{"each write is one revision more", func(t require.TestingT, b backend.Backend) {
			for n := range uint64(10) {
				put(t, b, "k", fmt.Sprint(n), n)
				requireEntry(t, b, "k", fmt.Sprint(n), n+1)
			}
		}},
		{"Apply conflicts with another revision", func(t require.TestingT, b backend.Backend) {
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
			require.ErrorIs(t, b.Apply(ctx, change("a", "2", 1), change("c", "2", 0), change("b", "2", 7)), backend.ErrConflict)
			requireEntry(t, b, "a", "1", 1)
			requireEntry(t, b, "b", "1", 1)
			_, err := b.Get(ctx, []byte("c"))
			require.ErrorIs(t, err, backend.ErrNotFound)
			require.NoError(t, b.Apply(ctx, change("a", "2", 1), change("c", "2", 0), change("b", "2", 1)))
			requireEntry(t, b, "b", "2", 2)
		}},
		{"keys and values are any bytes", func(t require.TestingT, b backend.Backend) {
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
			require.Equal(t, keys, scanned(t, b, nil, nil), "in the order of their bytes")
		}},
		{"Scan yields a range in order", func(t require.TestingT, b backend.Backend) {
			require.Empty(t, scanned(t, b, nil, nil))
			var keys []string
			for n := range 1000 { // more than any page
				keys = append(keys, fmt.Sprintf("k%04d", n))
			}
			for _, n := range rand.Perm(len(keys)) {
				put(t, b, keys[n], "v", 0)
			}
			put(t, b, "j", "v", 0)
			put(t, b, "l", "v", 0)
			require.Equal(t, keys, scanned(t, b, []byte("k"), []byte("l")))
			require.Equal(t, keys[10:20], scanned(t, b, []byte(keys[10]), []byte(keys[20])), "with from, without to")
			require.Equal(t, append(slices.Clone(keys[990:]), "l"), scanned(t, b, []byte(keys[990]), nil))
			require.Empty(t, scanned(t, b, []byte("l"), []byte("k")))
			require.Empty(t, scanned(t, b, []byte("m"), nil))
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
				require.NoError(t, last, "after an error it ends")
				if last = err; err == nil {
					require.NoError(t, b.Close())
				}
			}
			require.ErrorIs(t, last, backend.ErrClosed)
		}},
		{"slices belong to the caller", func(t require.TestingT, b backend.Backend) {
			c := change("key", "value", 0)
			require.NoError(t, b.Apply(ctx, c))
			c.Key[0], c.Value[0] = 'X', 'X'
			requireEntry(t, b, "key", "value", 1)
			for e, err := range b.Scan(ctx, nil, nil) {
				require.NoError(t, err)
				e.Key[0], e.Value[0] = 'X', 'X'
			}
			e, err := b.Get(ctx, []byte("key"))
			require.NoError(t, err)
			_ = append(e.Value[:1], "XXX"...)
			e.Key[0] = 'X'
			requireEntry(t, b, "key", "value", 1)
		}},
		{"limits are met, and kept", func(t require.TestingT, b backend.Backend) {
			long := func(n int) string { return string(bytes.Repeat([]byte{'x'}, n)) }
			put(t, b, long(backend.MaxKeySize), long(backend.MaxValueSize), 0)
			requireEntry(t, b, long(backend.MaxKeySize), long(backend.MaxValueSize), 1)
			require.ErrorIs(t, b.Apply(ctx, change("a", "", 0), change(long(backend.MaxKeySize+1), "", 0)), backend.ErrTooLarge)
			require.ErrorIs(t, b.Apply(ctx, change("a", "", 0), change("b", long(backend.MaxValueSize+1), 0)), backend.ErrTooLarge)
			var changes []backend.Change
			for n := range backend.MaxChanges {
				changes = append(changes, change(fmt.Sprint("many", n), long(1000), 0))
			}
			require.ErrorIs(t, b.Apply(ctx, append(changes, change("a", "", 0))...), backend.ErrTooLarge)
			require.NoError(t, b.Apply(ctx, changes...))
			require.Error(t, b.Apply(ctx))
			require.Error(t, b.Apply(ctx, change("", "v", 0)))
			require.Error(t, b.Apply(ctx, change("a", "1", 0), change("a", "2", 0)))
			_, err := b.Get(ctx, []byte("a"))
			require.ErrorIs(t, err, backend.ErrNotFound, "nothing was written")
		}},
		{"a context that is done ends every call", func(t require.TestingT, b backend.Backend) {
			done, cancel := context.WithCancel(ctx)
			cancel()
			for _, err := range everyCall(done, b) {
				require.ErrorIs(t, err, context.Canceled)
			}
			_, err := b.Get(ctx, []byte("k"))
			require.ErrorIs(t, err, backend.ErrNotFound, "nothing was written")
		}},
		{"after Close there is nothing but ErrClosed", func(t require.TestingT, b backend.Backend) {
			put(t, b, "k", "v", 0)
			require.NoError(t, b.Close())
			require.NoError(t, b.Close())
			for _, err := range everyCall(ctx, b) {
				require.ErrorIs(t, err, backend.ErrClosed)
			}
		}},
		{"Close may come during calls", func(t require.TestingT, b backend.Backend) {
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
		{"concurrent writers lose nothing", func(t require.TestingT, b backend.Backend) {
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
						if err != nil || e.Revision < last || string(e.Value) != fmt.Sprint(e.Revision-1) {
							fail("after revision %d came %d, %q, %v", last, e.Revision, e.Value, err)
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
							err = b.Apply(ctx, change("counter", fmt.Sprint(e.Revision), e.Revision))
						}
						switch {
						case err == nil:
							done++
							if now, err := b.Get(ctx, []byte("counter")); err != nil || now.Revision <= e.Revision {
								fail("Get does not see what Apply acknowledged: %d, %v", now.Revision, err)
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
		{"it does as a model does", func(t require.TestingT, b backend.Backend) {
			m := newModel(1)
			m.work(t, b, 1000)
			m.compare(t, b)
		}},
	}
)

// A model is what a backend should be: a map. It is worked on at random, from a seed.
type model struct {
	random  *rand.Rand
	entries map[string]backend.Entry
}

func newModel(seed uint64) *model {
	return &model{rand.New(rand.NewPCG(seed, seed)), make(map[string]backend.Entry)}
}

func (m *model) work(t require.TestingT, b backend.Backend, steps int) {
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
			changes = append(changes, change(key, fmt.Sprint(m.random.Uint64()), expect))
		}
		err := b.Apply(ctx, changes...)
		if conflict {
			require.ErrorIs(t, err, backend.ErrConflict)
		} else {
			require.NoError(t, err)
			for _, c := range changes {
				m.entries[string(c.Key)] = backend.Entry{Key: c.Key, Value: c.Value, Revision: c.Expect + 1}
			}
		}
		if key := fmt.Sprint("k", m.random.IntN(20)); m.entries[key].Revision > 0 {
			requireEntry(t, b, key, string(m.entries[key].Value), m.entries[key].Revision)
		}
	}
}

func (m *model) compare(t require.TestingT, b backend.Backend) {
	keys := slices.Sorted(maps.Keys(m.entries))
	n := 0
	for e, err := range b.Scan(ctx, nil, nil) {
		require.NoError(t, err)
		require.Less(t, n, len(keys))
		require.Equal(t, m.entries[keys[n]], e)
		n++
	}
	require.Equal(t, len(keys), n)
}

func change(key, value string, expect uint64) backend.Change {
	return backend.Change{Key: []byte(key), Value: []byte(value), Expect: expect}
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

func scanned(t require.TestingT, b backend.Backend, from, to []byte) (keys []string) {
	for e, err := range b.Scan(ctx, from, to) {
		require.NoError(t, err)
		keys = append(keys, string(e.Key))
	}
	return keys
}

func everyCall(ctx context.Context, b backend.Backend) []error {
	_, get := b.Get(ctx, []byte("k"))
	apply := b.Apply(ctx, change("k", "v", 0))
	scan := errors.New("Scan yielded nothing")
	for _, err := range b.Scan(ctx, nil, nil) {
		scan = err
	}
	return []error{get, apply, scan}
}
