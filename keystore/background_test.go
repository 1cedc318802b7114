package keystore_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// underAnEarlierHasher returns a backend with n keys whose digests an earlier hasher has made, and
// the earlier hasher.
func underAnEarlierHasher(
	t testing.TB, n int,
) (backend.Backend, []*keystore.Issued, hashing.Hasher) {
	t.Helper()
	b, earlier := &mortal{Backend: backendtest.NewMemory()}, pepper(t, "2025", 1)
	s, err := keystore.New(b, &keystore.Options{Hasher: earlier})
	require.NoError(t, err)
	keys := fill(t, s, n, func(int) keystore.Spec { return keystore.Spec{} })
	require.NoError(t, s.Close())
	return b, keys, earlier
}

// Hundreds of digests are replaced, for a second each. Meanwhile a key is used every ten seconds:
// that is known, and written.
func TestLastUseWhileDigestsAreReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner, keys, earlier := underAnEarlierHasher(t, 250)
		s, err := keystore.New(&latent{inner, time.Second},
			&keystore.Options{Hasher: keyring(t, hashing.SHA256(), earlier)})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		used := create(t, s, keystore.Spec{})
		time.Sleep(10 * time.Second)
		require.Equal(t, len(keys), admitted(t, s, keys))
		for range 20 {
			require.NoError(t, verify(t, s, used.Secret.Reveal()))
			require.Equal(t, time.Now().Truncate(time.Minute).UTC(), lastUsed(t, s, used.Key.ID))
			time.Sleep(10 * time.Second)
		}
		require.Less(t, countEvents(t, s, keystore.ActionRehash), len(keys),
			"digests are still being replaced")
		n, err := s.RevokeAll(t.Context(),
			keystore.Query{UnusedSince: time.Now().Add(-3 * time.Minute)}, "", nil)
		require.NoError(t, err)
		require.Zero(t, n)
		require.GreaterOrEqual(t, latestWrittenUse(t, inner),
			uint64(time.Now().Add(-2*time.Minute).Unix()/60))
	})
}

func countEvents(t testing.TB, s *keystore.Store, action keystore.Action) (n int) {
	t.Helper()
	for _, e := range events(t, s, keystore.EventQuery{}) {
		if e.Action == action {
			n++
		}
	}
	return n
}

// latestWrittenUse returns the latest minute of use that a backend has.
func latestWrittenUse(t testing.TB, b backend.Backend) (latest uint64) {
	t.Helper()
	for e, err := range b.Scan(t.Context(), []byte("u"), []byte("v")) {
		require.NoError(t, err)
		minute, _ := binary.Uvarint(e.Value)
		latest = max(latest, minute)
	}
	return latest
}

// A hanging backend holds each Scan of a space back until the context of the Scan ends, and each
// Apply that begins with an entry of a space.
type hanging struct {
	backend.Backend
	scan, apply byte
}

func (b *hanging) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if from[0] != b.scan {
		return b.Backend.Scan(ctx, from, to)
	}
	return func(yield func(backend.Entry, error) bool) {
		<-ctx.Done()
		yield(backend.Entry{}, ctx.Err())
	}
}

func (b *hanging) Apply(ctx context.Context, changes ...backend.Change) error {
	if changes[0].Key[0] != b.apply {
		return b.Backend.Apply(ctx, changes...)
	}
	<-ctx.Done()
	return ctx.Err()
}

// What hangs in the background delays nothing else there, and Close ends it.
func TestBackgroundWorkIsIndependent(t *testing.T) {
	for name, tt := range map[string]struct {
		hanging       hanging
		minute, sweep bool // what goes on
		written       bool
	}{
		"a count of outdated digests": {hanging{scan: 'k'}, true, true, true},
		"the write of last uses":      {hanging{apply: 'u'}, true, true, false},
		"the removal of old events":   {hanging{apply: 'e'}, true, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				inner, keys, earlier := underAnEarlierHasher(t, 2)
				tt.hanging.Backend = inner
				s, err := keystore.New(&tt.hanging, &keystore.Options{
					Hasher: keyring(t, hashing.SHA256(), earlier), EventRetention: time.Minute,
					Timeout: 3 * time.Hour,
				})
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				streaming := create(t, s, keystore.Spec{})
				_, _, release, err := parts(s.Bind(t.Context(), streaming.Secret.Reveal()))
				require.NoError(t, err)
				defer release()
				time.Sleep(2*time.Hour + 30*time.Second)
				require.Equal(t, len(keys), admitted(t, s, keys))
				now := time.Now().Truncate(time.Minute).UTC()
				require.Equal(t, now, lastUsed(t, s, keys[0].Key.ID))
				require.Equal(t, now, lastUsed(t, s, streaming.Key.ID), "it is in use")
				release()
				require.Equal(t, now, lastUsed(t, s, streaming.Key.ID), "it was in use")
				require.Equal(t, tt.sweep, countEvents(t, s, keystore.ActionCreate) == 0)
				time.Sleep(time.Minute)
				synctest.Wait()
				require.Equal(t, tt.written, latestWrittenUse(t, inner) == uint64(now.Unix()/60))
				require.Equal(t, len(keys), countEvents(t, s, keystore.ActionRehash),
					"digests are replaced")
			})
		})
	}
}

// A counting hasher counts the digests that it makes.
type counting struct {
	hashing.Hasher
	digests atomic.Int64
}

func (h *counting) Digest(text string) hashing.Digest {
	h.digests.Add(1)
	return h.Hasher.Digest(text)
}

func (h *counting) HasEarlier() bool { return true }

// A blocked backend holds every Apply of a key's record back until free is closed.
type blocked struct {
	backend.Backend
	free chan struct{}
}

func (b *blocked) Apply(ctx context.Context, changes ...backend.Change) error {
	if changes[0].Key[0] == 'k' {
		<-b.free
	}
	return b.Backend.Apply(ctx, changes...)
}

// 300 keys with outdated digests are used again and again, and 256 can wait for a new digest. No
// other digest is made meanwhile, and a later use replaces each of the others.
func TestAFullQueueOfRehashes(t *testing.T) {
	for _, cache := range []int{0, -1} {
		t.Run(fmt.Sprint("cache ", cache), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				inner, keys, earlier := underAnEarlierHasher(t, 300)
				b := &blocked{inner, make(chan struct{})}
				h := &counting{Hasher: keyring(t, hashing.SHA256(), earlier)}
				s, err := keystore.New(b, &keystore.Options{Hasher: h, CacheSize: cache,
					Timeout: -1})
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				synctest.Wait()
				require.Equal(t, 300, s.Stats().Outdated)
				before := h.digests.Load()
				for range 5 {
					require.NoError(t, verify(t, s, keys[0].Secret.Reveal()))
				}
				require.EqualValues(t, 1, h.digests.Load()-before, "one for each key")
				for range 3 {
					require.Equal(t, 300, admitted(t, s, keys))
				}
				require.EqualValues(t, 256, h.digests.Load()-before)
				close(b.free)
				synctest.Wait()
				require.Equal(t, 256, countEvents(t, s, keystore.ActionRehash))
				require.Equal(t, 300, admitted(t, s, keys))
				synctest.Wait()
				require.Equal(t, 300, countEvents(t, s, keystore.ActionRehash))
				require.EqualValues(t, 300, h.digests.Load()-before)
				time.Sleep(time.Minute)
				synctest.Wait()
				require.Zero(t, s.Stats().Outdated)
			})
		})
	}
}

// A hasher that panics while a new digest is made leaves no trace: the next use tries again.
func TestAHasherPanicsOverANewDigest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner, keys, earlier := underAnEarlierHasher(t, 1)
		h := &panicking{counting: counting{Hasher: keyring(t, hashing.SHA256(), earlier)}}
		s, err := keystore.New(inner, &keystore.Options{Hasher: h})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		h.panics.Store(true)
		func() {
			defer func() { _ = recover() }()
			_, _ = s.Verify(t.Context(), keys[0].Secret.Reveal())
		}()
		h.panics.Store(false)
		require.NoError(t, verify(t, s, keys[0].Secret.Reveal()))
		synctest.Wait()
		require.Equal(t, 1, countEvents(t, s, keystore.ActionRehash))
	})
}

type panicking struct {
	counting
	panics atomic.Bool
}

func (h *panicking) Digest(text string) hashing.Digest {
	if h.panics.Load() {
		panic("the hasher's own")
	}
	return h.counting.Digest(text)
}

// A recorder counts the writes that remove events, and notes where the last Scan of them began.
type recorder struct {
	backend.Backend
	removals atomic.Int64
	from     atomic.Pointer[[]byte]
	fail     atomic.Bool
}

func (b *recorder) Apply(ctx context.Context, changes ...backend.Change) error {
	if changes[0].Delete && changes[0].Key[0] == 'e' {
		if n := b.removals.Add(1); b.fail.Load() && n == 2 {
			return backend.ErrFull
		}
	}
	return b.Backend.Apply(ctx, changes...)
}

func (b *recorder) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if from[0] == 'e' {
		b.from.Store(&from)
	}
	return b.Backend.Scan(ctx, from, to)
}

// Hundreds of events are removed in several writes. The next sweep begins after the last event that
// was removed, also if a write has failed.
func TestASweepOfSeveralBatches(t *testing.T) {
	for _, fails := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := &recorder{Backend: backendtest.NewMemory()}
			s, err := keystore.New(b, &keystore.Options{EventRetention: 24 * time.Hour})
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			fill(t, s, 300, func(int) keystore.Spec { return keystore.Spec{} })
			all := events(t, s, keystore.EventQuery{})
			require.Len(t, all, 300)
			b.fail.Store(fails)
			time.Sleep(25*time.Hour - time.Minute)
			require.Zero(t, b.removals.Load())
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			last := 299
			if fails {
				require.EqualValues(t, 2, b.removals.Load())
				require.Equal(t, all[128:], events(t, s, keystore.EventQuery{}))
				last = 127
			} else {
				require.EqualValues(t, 3, b.removals.Load())
				require.Empty(t, events(t, s, keystore.EventQuery{}))
			}
			fresh := create(t, s, keystore.Spec{})
			time.Sleep(time.Hour)
			synctest.Wait()
			left := events(t, s, keystore.EventQuery{After: all[299].At})
			require.Len(t, left, 1)
			require.Equal(t, fresh.Key.ID, left[0].KeyID)
			time.Sleep(time.Hour)
			synctest.Wait()
			if !fails {
				from := *b.from.Load()
				require.Len(t, from, 1+8+1, "the least key after an event's")
				require.Equal(t, uint64(all[last].At.UnixNano()), binary.BigEndian.Uint64(from[1:]))
			} else {
				require.Equal(t, left, events(t, s, keystore.EventQuery{}))
			}
		})
	}
}

// A slowly reading backend takes a second for each entry that a Scan yields.
type slowlyReading struct{ backend.Backend }

func (b slowlyReading) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range b.Backend.Scan(ctx, from, to) {
			time.Sleep(time.Second)
			if !yield(e, err) {
				return
			}
		}
	}
}

// The clock is years behind the events of a store. They take longer to read than Options.Timeout,
// and Open does not read them. The next event is after all of them.
func TestOpenWithAClockThatIsYearsBack(t *testing.T) {
	for _, n := range []int{1, 2, 100} {
		synctest.Test(t, func(t *testing.T) {
			inner := &mortal{Backend: backendtest.NewMemory()}
			s, err := keystore.New(inner, nil)
			require.NoError(t, err)
			fill(t, s, n, func(int) keystore.Spec { return keystore.Spec{} })
			written := events(t, s, keystore.EventQuery{})
			require.NoError(t, s.Close())
			ahead := backendtest.NewMemory()
			stamp := func(i int) uint64 { return uint64(time.Now().AddDate(5, 0, i).UnixNano()) }
			i := 0
			for e, err := range inner.Scan(t.Context(), nil, nil) {
				require.NoError(t, err)
				if e.Key[0] == 'e' {
					e.Key = binary.BigEndian.AppendUint64([]byte{'e'}, stamp(i))
					i++
				}
				require.NoError(t, ahead.Apply(t.Context(),
					backend.Change{Key: e.Key, Value: e.Value, Revision: e.Revision}))
			}
			last := time.Unix(0, int64(stamp(n-1)))
			s, err = keystore.New(slowlyReading{ahead}, nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			fresh := create(t, s, keystore.Spec{})
			all := events(t, s, keystore.EventQuery{})
			require.Len(t, all, len(written)+1)
			require.Equal(t, fresh.Key.ID, all[n].KeyID)
			require.Equal(t, last.Add(1).UTC(), all[n].At)
		})
	}
}
