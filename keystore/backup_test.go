package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// all returns everything that a store lists.
func all(t testing.TB, s *keystore.Store) map[string]keystore.Key {
	t.Helper()
	keys := make(map[string]keystore.Key)
	for k, err := range s.List(context.Background(), keystore.Query{}) {
		require.NoError(t, err)
		keys[k.ID] = *k
	}
	return keys
}

func backup(t testing.TB, s *keystore.Store) []byte {
	t.Helper()
	var b bytes.Buffer
	require.NoError(t, s.Backup(context.Background(), &b))
	return b.Bytes()
}

func restore(t testing.TB, s *keystore.Store, b []byte) {
	t.Helper()
	// In small pieces, as a network gives them.
	require.NoError(t, s.Restore(context.Background(), iotest.HalfReader(bytes.NewReader(b))))
}

func TestBackupIsRestoredElsewhere(t *testing.T) {
	s := open(t, nil)
	keys := fill(t, s, 500, func(i int) keystore.Spec {
		return keystore.Spec{
			Owner:           fmt.Sprint("owner ", i%7),
			Scopes:          []string{"orders:*"},
			Metadata:        map[string]string{"n": fmt.Sprint(i)},
			ExpiresAt:       time.Now().Add(time.Hour),
			NotBefore:       time.Now().Add(-time.Hour),
			AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
			RateLimit:       keystore.RateLimit{PerSecond: 1, Burst: 100},
		}
	})
	ctx := keystore.WithClientAddr(t.Context(), netip.MustParseAddr("10.1.2.3"))
	_, err := s.Verify(ctx, keys[0].Secret.Reveal())
	require.NoError(t, err)
	require.NoError(t, s.Revoke(t.Context(), keys[1].Key.ID, "leaked"))
	require.NoError(t, s.Disable(t.Context(), keys[2].Key.ID, "paused"))
	rotated, err := s.Rotate(t.Context(), keys[3].Key.ID, time.Minute)
	require.NoError(t, err)
	saved := backup(t, s)
	for _, k := range keys {
		require.NotContains(t, string(saved), k.Secret.Reveal())
	}

	other := open(t, nil)
	own := create(t, other, keystore.Spec{})
	for range 2 { // the second time changes nothing
		restore(t, other, saved)
		want := all(t, s)
		require.False(t, want[keys[0].Key.ID].LastUsedAt.IsZero())
		got := all(t, other)
		require.Contains(t, got, own.Key.ID)
		delete(got, own.Key.ID)
		require.Equal(t, want, got)
	}
	for token, want := range map[string]error{
		keys[0].Secret.Reveal(): nil,
		keys[1].Secret.Reveal(): keystore.ErrRevoked,
		keys[2].Secret.Reveal(): keystore.ErrDisabled,
		keys[3].Secret.Reveal(): nil,
		rotated.Secret.Reveal(): nil,
	} {
		_, err := other.Verify(ctx, token)
		require.ErrorIs(t, err, want)
	}
	events := 0
	for e, err := range other.Events(t.Context(), keystore.EventQuery{}) {
		require.NoError(t, err)
		if e.Action == keystore.ActionRestore {
			events++
		}
	}
	require.Equal(t, len(keys), events)
}

// Eight writers count, each along a chain of keys. At every moment, a key of a chain has the count
// of the key before, or one less. The same holds for the keys of a backup that is of one moment.
func TestBackupIsOfOneMoment(t *testing.T) {
	needsDirectory(t)
	const writers, chain = 8, 8
	s := open(t, nil)
	fill(t, s, 2000, func(int) keystore.Spec { return keystore.Spec{} }) // several pages
	var chains [writers][chain]string
	for i := range chain {
		for w := range writers {
			chains[w][i] = create(t, s, keystore.Spec{Metadata: map[string]string{"n": "0"}}).Key.ID
			fill(t, s, 100, func(int) keystore.Spec { return keystore.Spec{} })
		}
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var counted atomic.Int64
	for w := range writers {
		wg.Go(func() {
			for n := 1; ; n++ {
				for _, id := range chains[w] {
					select {
					case <-stop:
						return
					default:
					}
					_, err := s.Update(context.Background(), id, func(spec *keystore.Spec) error {
						spec.Metadata["n"] = strconv.Itoa(n)
						return nil
					})
					if err != nil {
						t.Error(err)
						return
					}
					counted.Add(1)
				}
			}
		})
	}
	for range 5 {
		start := counted.Load()
		var b bytes.Buffer
		err := s.Backup(t.Context(), &slow{&b, func() {
			// The writers get on between two writes of the backup.
			for counted.Load() < start+100 && !t.Failed() {
				time.Sleep(time.Millisecond)
			}
			start = counted.Load()
		}})
		require.NoError(t, err)
		other := open(t, nil)
		restore(t, other, b.Bytes())
		got := all(t, other)
		require.Len(t, got, 2000+writers*chain*101)
		for w := range writers {
			counts := make([]int, chain)
			for i, id := range chains[w] {
				key := got[id]
				counts[i], err = strconv.Atoi(key.Metadata()["n"])
				require.NoError(t, err)
				require.EqualValues(t, counts[i]+1, got[id].Revision)
				require.LessOrEqual(t, counts[i], counts[0])
				require.GreaterOrEqual(t, counts[i], counts[0]-1)
				require.True(t, i == 0 || counts[i] <= counts[i-1], "%v", counts)
			}
		}
		require.NoError(t, other.Close())
	}
	close(stop)
	wg.Wait()
}

// A slow writer waits before each write.
type slow struct {
	*bytes.Buffer
	wait func()
}

func (s *slow) Write(p []byte) (int, error) {
	s.wait()
	return s.Buffer.Write(p)
}

func TestDamagedBackupChangesNothing(t *testing.T) {
	s := open(t, nil)
	keys := fill(t, s, 100, func(i int) keystore.Spec {
		return keystore.Spec{Owner: fmt.Sprint(i)}
	})
	_, err := s.Verify(t.Context(), keys[0].Secret.Reveal())
	require.NoError(t, err)
	require.NoError(t, s.Revoke(t.Context(), keys[1].Key.ID, ""))
	saved := backup(t, s)

	other := open(t, nil)
	create(t, other, keystore.Spec{})
	before := all(t, other)
	refused := func(b []byte, what string, at int) {
		t.Helper()
		err := other.Restore(t.Context(), bytes.NewReader(b))
		require.Error(t, err, "%s at %d of %d", what, at, len(saved))
		if !errors.Is(err, keystore.ErrInvalid) {
			require.ErrorIs(t, err, keystore.ErrCorrupt)
		}
	}
	for i := range 500 {
		at := i * len(saved) / 500
		damaged := bytes.Clone(saved)
		damaged[at] ^= 1 << rand.IntN(8)
		refused(damaged, "a flipped bit", at)
		refused(saved[:at], "a cut", at)
	}
	for at := len(saved) - 64; at < len(saved); at++ { // every byte of the trailer
		damaged := bytes.Clone(saved)
		damaged[at] ^= 1 << rand.IntN(8)
		refused(damaged, "a flipped bit", at)
		refused(saved[:at], "a cut", at)
	}
	refused(append(bytes.Clone(saved), 0), "another byte", len(saved))
	refused(append(bytes.Clone(saved), saved...), "another backup", len(saved))
	refused([]byte("hello"), "no backup", 0)
	boom := errors.New("boom")
	slow := iotest.TimeoutReader(iotest.OneByteReader(bytes.NewReader(saved)))
	require.ErrorIs(t, other.Restore(t.Context(), slow), iotest.ErrTimeout)
	require.ErrorIs(t, other.Restore(t.Context(), iotest.ErrReader(boom)), boom)
	require.Equal(t, before, all(t, other))
	for e, err := range other.Events(t.Context(), keystore.EventQuery{}) {
		require.NoError(t, err)
		require.Equal(t, keystore.ActionCreate, e.Action)
	}
	restore(t, other, saved)
}

// A change is what a test does to a key.
type change = func(t *testing.T, s *keystore.Store, id string)

func TestRestoreMerges(t *testing.T) {
	touch := func(t *testing.T, s *keystore.Store, id, text string) {
		t.Helper()
		_, err := s.Update(t.Context(), id, func(spec *keystore.Spec) error {
			spec.Owner = text
			return nil
		})
		require.NoError(t, err)
	}
	owners := func(texts ...string) change {
		return func(t *testing.T, s *keystore.Store, id string) {
			for _, text := range texts {
				touch(t, s, id, text)
			}
		}
	}
	revoke := func(t *testing.T, s *keystore.Store, id string) {
		require.NoError(t, s.Revoke(t.Context(), id, ""))
	}
	for name, tt := range map[string]struct {
		then change // between the first backup and the second
		now  change // in the other store, which began with the first backup

		owner    string
		revision uint64
		denied   error
	}{
		"the backup is newer": {
			then:  owners("a", "b"),
			now:   owners("x"),
			owner: "b", revision: 3,
		},
		"the store is newer": {
			then:  owners("a"),
			now:   owners("x", "y"),
			owner: "y", revision: 3,
		},
		"as new": {
			then:  owners("a"),
			now:   owners("x"),
			owner: "x", revision: 2,
		},
		"revoked in the backup, newer in the store": {
			then:  revoke,
			now:   owners("x", "y"),
			owner: "y", revision: 4, denied: keystore.ErrRevoked,
		},
		"revoked in the backup, and newer": {
			then: func(t *testing.T, s *keystore.Store, id string) {
				touch(t, s, id, "a")
				require.NoError(t, s.Revoke(t.Context(), id, ""))
			},
			now:   owners(),
			owner: "a", revision: 3, denied: keystore.ErrRevoked,
		},
		"revoked in the store, newer in the backup": {
			then:  owners("a", "b"),
			now:   revoke,
			owner: "", revision: 2, denied: keystore.ErrRevoked,
		},
		"disabled in the backup": {
			then: func(t *testing.T, s *keystore.Store, id string) {
				require.NoError(t, s.Disable(t.Context(), id, ""))
			},
			now:   owners(),
			owner: "", revision: 2, denied: keystore.ErrDisabled,
		},
		"purged in the store": {
			then: owners("a", "b"),
			now: func(t *testing.T, s *keystore.Store, id string) {
				require.NoError(t, s.Revoke(t.Context(), id, ""))
				_, err := s.Purge(t.Context(), time.Now())
				require.NoError(t, err)
			},
			denied: keystore.ErrUnknown,
		},
		"purged in the backup": {
			then: func(t *testing.T, s *keystore.Store, id string) {
				require.NoError(t, s.Revoke(t.Context(), id, ""))
				_, err := s.Purge(t.Context(), time.Now())
				require.NoError(t, err)
			},
			now:    owners("x", "y", "z"),
			denied: keystore.ErrUnknown,
		},
	} {
		t.Run(name, func(t *testing.T) {
			one, other := open(t, nil), open(t, nil)
			issued := create(t, one, keystore.Spec{})
			id, token := issued.Key.ID, issued.Secret.Reveal()
			restore(t, other, backup(t, one))
			tt.then(t, one, id)
			tt.now(t, other, id)
			_, _ = other.Verify(t.Context(), token) // it is cached
			saved := backup(t, one)
			for range 2 {
				restore(t, other, saved)
				_, err := other.Verify(t.Context(), token)
				require.ErrorIs(t, err, tt.denied)
				key, err := other.Get(t.Context(), id)
				if tt.revision == 0 {
					require.ErrorIs(t, err, keystore.ErrNotFound)
					continue
				}
				require.NoError(t, err)
				require.Equal(t, tt.owner, key.Owner)
				require.Equal(t, tt.revision, key.Revision)
			}
		})
	}
}

func TestRestoreEndsLiveContexts(t *testing.T) {
	one, other := open(t, nil), open(t, nil)
	issued := create(t, one, keystore.Spec{})
	restore(t, other, backup(t, one))
	live := bind(t, other, issued.Secret.Reveal())
	require.NoError(t, one.Revoke(t.Context(), issued.Key.ID, ""))
	restore(t, other, backup(t, one))
	require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
}

// The last uses are a part that a backup can do without.
func TestBackupWithoutTheLastUses(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	for _, err := range []error{backend.ErrFull, backend.ErrConflict} {
		require.NoError(t, verify(t, s, issued.Secret.Reveal()))
		b.failApply.Store(&err)
		saved := backup(t, s)
		b.failApply.Store(nil)
		other := inMemory(t)
		restore(t, other, saved)
		require.NoError(t, verify(t, other, issued.Secret.Reveal()))
	}
}

// A revocation takes what the store has of a key, which may be much more than the backup has.
func TestRestoreRevokesKeysThatHaveGrown(t *testing.T) {
	const n = 20
	one, other := inMemory(t), inMemory(t)
	keys := fill(t, one, n, func(int) keystore.Spec { return keystore.Spec{} })
	restore(t, other, backup(t, one))
	for _, k := range keys {
		require.NoError(t, one.Revoke(t.Context(), k.Key.ID, "leaked"))
		for _, what := range []string{"x", "y"} {
			_, err := other.Update(t.Context(), k.Key.ID, func(spec *keystore.Spec) error {
				spec.Metadata["m"] = strings.Repeat(what, 15<<10)
				return nil
			})
			require.NoError(t, err)
		}
	}
	restore(t, other, backup(t, one))
	require.Zero(t, admitted(t, other, keys))
	restored := 0
	for _, e := range events(t, other, keystore.EventQuery{}) {
		if e.Action == keystore.ActionRestore {
			restored++
		}
	}
	require.Equal(t, 2*n, restored)
}

// Two stores diverge, and each rotates the key. Live contexts of a secret that the other store's
// secret replaces end, although both secrets have the same number. Other live contexts continue.
func TestRestoreOfAnotherSecretEndsLiveContexts(t *testing.T) {
	update := func(t *testing.T, s *keystore.Store, id string) {
		_, err := s.Update(t.Context(), id, func(spec *keystore.Spec) error {
			spec.Owner += "x"
			return nil
		})
		require.NoError(t, err)
	}
	rotate := func(t *testing.T, s *keystore.Store, id string, grace time.Duration) string {
		issued, err := s.Rotate(t.Context(), id, grace)
		require.NoError(t, err)
		return issued.Secret.Reveal()
	}
	parted := func(t *testing.T) (one, other *keystore.Store, id, token string) {
		one, other = inMemory(t), inMemory(t)
		issued := create(t, one, keystore.Spec{})
		restore(t, other, backup(t, one))
		return one, other, issued.Key.ID, issued.Secret.Reveal()
	}
	t.Run("both have rotated", func(t *testing.T) {
		for _, grace := range []time.Duration{0, time.Hour} {
			one, other, id, _ := parted(t)
			theirs := rotate(t, one, id, grace)
			update(t, one, id)
			replaced := rotate(t, other, id, 0)
			live := bind(t, other, replaced)
			restore(t, other, backup(t, one))
			require.ErrorIs(t, verify(t, other, replaced), keystore.ErrUnknown)
			require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
			live = bind(t, other, theirs)
			update(t, one, id)
			update(t, one, id)
			restore(t, other, backup(t, one))
			require.NoError(t, live.Err(), "the secret is the same, whatever its number")
			rotate(t, other, id, 0)
			require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
		}
	})
	t.Run("the other store has", func(t *testing.T) {
		one, other, id, token := parted(t)
		live := bind(t, other, token)
		theirs := rotate(t, one, id, time.Hour)
		restore(t, other, backup(t, one))
		require.NoError(t, live.Err(), "it is in its grace")
		require.NoError(t, verify(t, other, theirs))
		rotate(t, other, id, time.Hour)
		require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
	})
	t.Run("this store has, with a grace", func(t *testing.T) {
		one, other, id, token := parted(t)
		live := bind(t, other, token)
		replaced := bind(t, other, rotate(t, other, id, time.Hour))
		update(t, one, id)
		update(t, one, id)
		restore(t, other, backup(t, one))
		require.NoError(t, verify(t, other, token))
		require.ErrorIs(t, context.Cause(replaced), keystore.ErrRevoked)
		require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked, "to be safe")
	})
}

func TestBackupAndRestoreRefuse(t *testing.T) {
	s := open(t, nil)
	create(t, s, keystore.Spec{})
	saved := backup(t, s)
	boom := errors.New("boom")
	require.ErrorIs(t, s.Backup(t.Context(), failing{boom}), boom)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, s.Backup(cancelled, new(bytes.Buffer)), context.Canceled)
	require.ErrorIs(t, s.Restore(cancelled, bytes.NewReader(saved)), context.Canceled)
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Backup(t.Context(), new(bytes.Buffer)), keystore.ErrClosed)
	require.ErrorIs(t, s.Restore(t.Context(), bytes.NewReader(saved)), keystore.ErrClosed)
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }
