package keystore_test

import (
	"context"
	"encoding/binary"
	"errors"
	"iter"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func lastUsed(t testing.TB, s *keystore.Store, id string) time.Time {
	t.Helper()
	key, err := s.Get(t.Context(), id)
	require.NoError(t, err)
	return key.LastUsedAt
}

// A watched backend counts writes, and calls a hook before each write of a usage.
type watched struct {
	backend.Backend
	applies atomic.Int64
	onUsage atomic.Pointer[func()]
}

func (b *watched) Apply(ctx context.Context, changes ...backend.Change) error {
	b.applies.Add(1)
	if f := b.onUsage.Load(); f != nil && changes[0].Key[0] == 'u' {
		(*f)()
	}
	return b.Backend.Apply(ctx, changes...)
}

func TestLastUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &watched{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued := create(t, s, keystore.Spec{})
		id, token := issued.Key.ID, issued.Secret.Reveal()
		require.Zero(t, lastUsed(t, s, id))
		require.ErrorIs(t, verify(t, s, token[:len(token)-1]+"~"), keystore.ErrDenied)
		require.Zero(t, lastUsed(t, s, id), "a refusal is no use")

		writes := b.applies.Load()
		first := time.Now().Truncate(time.Minute).UTC()
		for range 1000 {
			require.NoError(t, verify(t, s, token))
		}
		require.Equal(t, first, lastUsed(t, s, id), "before it is written")
		require.Equal(t, writes, b.applies.Load(), "nothing is written on the way")
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, writes+1, b.applies.Load(), "one write for all")
		require.Equal(t, first, lastUsed(t, s, id))
		time.Sleep(10 * time.Minute)
		synctest.Wait() // the background has seen the new minute
		require.Equal(t, writes+1, b.applies.Load(), "and none without a use")
		bind(t, s, token)
		require.Equal(t, time.Now().Truncate(time.Minute).UTC(), lastUsed(t, s, id))
		require.EqualValues(t, 1, issued.Key.Revision)
		key, err := s.Get(t.Context(), id)
		require.NoError(t, err)
		require.EqualValues(t, 1, key.Revision, "a use is no change")
	})
}

func TestLastUseIsWrittenByClose(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	issued := create(t, s, keystore.Spec{})
	before := time.Now().Truncate(time.Minute)
	require.NoError(t, verify(t, s, issued.Secret.Reveal()))
	require.NoError(t, s.Close())
	s, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	require.False(t, lastUsed(t, s, issued.Key.ID).Before(before.UTC()))
}

// A use is known by its minute, which began before it, and may be the one before: no key is taken
// for unused that was used after the moment.
func TestUnusedSinceIsSafeWithinAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		issued := create(t, s, keystore.Spec{})
		time.Sleep(30 * time.Second)
		since := time.Now()
		time.Sleep(29 * time.Second)
		require.NoError(t, verify(t, s, issued.Secret.Reveal()))
		selected := func(since time.Time) (n int) {
			for _, err := range s.List(t.Context(), keystore.Query{UnusedSince: since}) {
				require.NoError(t, err)
				n++
			}
			return n
		}
		require.Zero(t, selected(since))
		next := time.Now().Truncate(time.Minute).Add(time.Minute)
		require.Zero(t, selected(next))
		require.Zero(t, selected(next.Add(time.Minute-1)))
		require.Equal(t, 1, selected(next.Add(time.Minute)))
	})
}

// A key is revoked at the worst moment: when its use is about to be written.
func TestUsageCannotBringAKeyBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &watched{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		issued := create(t, s, keystore.Spec{})
		id, token := issued.Key.ID, issued.Secret.Reveal()
		require.NoError(t, verify(t, s, token))
		used := lastUsed(t, s, id)
		revoked := false
		revoke := func() {
			if !revoked {
				revoked = true
				if err := s.Revoke(context.Background(), id, "now"); err != nil {
					t.Error(err)
				}
			}
		}
		b.onUsage.Store(&revoke)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.True(t, revoked)
		require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked)
		key, err := s.Get(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, keystore.StatusRevoked, key.Status())
		require.Equal(t, used, key.LastUsedAt, "and the use is known")
		require.NoError(t, s.Close())
	})
}

// A mortal backend has crashed once dead is set: nothing is written any more. Its Close leaves the
// backend that it wraps open for the next store.
type mortal struct {
	backend.Backend
	dead atomic.Bool
}

func (b *mortal) Apply(ctx context.Context, changes ...backend.Change) error {
	if b.dead.Load() {
		return backend.ErrFailed
	}
	return b.Backend.Apply(ctx, changes...)
}

func (b *mortal) Close() error { return nil }

// selected returns how many keys a query selects, by each call that selects keys, and requires that
// the calls agree.
func selected(t testing.TB, s *keystore.Store, q keystore.Query) (n int, err error) {
	t.Helper()
	for _, listed := range s.List(t.Context(), q) {
		if err = listed; err == nil {
			n++
		}
	}
	for _, dry := range []bool{true, false} {
		revoked, revokeErr := s.RevokeAll(t.Context(), q, "",
			&keystore.RevokeAllOptions{DryRun: dry})
		require.Equal(t, n, revoked)
		if err != nil {
			require.EqualError(t, revokeErr, err.Error())
		} else {
			require.NoError(t, revokeErr)
		}
	}
	return n, err
}

// Each of 70,000 keys is used in the same minute.
func TestEveryUseOfAMinuteIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		keys := fill(t, s, 70_000, func(int) keystore.Spec { return keystore.Spec{} })
		time.Sleep(time.Hour)
		require.Equal(t, len(keys), admitted(t, s, keys))
		unknown := 0
		for _, k := range keys {
			if lastUsed(t, s, k.Key.ID).IsZero() {
				unknown++
			}
		}
		require.Zero(t, unknown)
	})
}

// The uses of the last minute before a crash are lost. No key is taken for unused because of that.
func TestUsesBeforeACrashAreUnknown(t *testing.T) {
	for name, before := range map[string]int{"the first store": 0,
		"a store that was closed before": 1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				disk := backendtest.NewMemory()
				b := &mortal{Backend: disk}
				s, err := keystore.New(b, nil)
				require.NoError(t, err)
				used, unused := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
				for range before {
					require.NoError(t, s.Close())
					s, err = keystore.New(b, nil)
					require.NoError(t, err)
				}
				time.Sleep(2 * time.Hour)
				synctest.Wait() // the store has written the uses of the last minute
				require.NoError(t, verify(t, s, used.Secret.Reveal()))
				b.dead.Store(true)
				require.NoError(t, s.Close())

				s, err = keystore.New(disk, nil)
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				opened := time.Now()
				require.Zero(t, lastUsed(t, s, used.Key.ID), "it was lost")
				time.Sleep(10 * time.Minute)
				for _, since := range []time.Time{time.Now().Add(-time.Hour), opened.Add(-1)} {
					n, err := selected(t, s, keystore.Query{UnusedSince: since})
					require.ErrorIs(t, err, keystore.ErrInvalid)
					require.ErrorContains(t, err, opened.UTC().Format(time.RFC3339))
					require.Zero(t, n)
				}
				n, err := selected(t, s,
					keystore.Query{UnusedSince: time.Now().Add(-24 * time.Hour)})
				require.NoError(t, err, "no key is as old")
				require.Zero(t, n)

				require.NoError(t, verify(t, s, used.Secret.Reveal()))
				n, err = selected(t, s, keystore.Query{UnusedSince: opened})
				require.NoError(t, err)
				require.Equal(t, 1, n)
				require.NoError(t, verify(t, s, used.Secret.Reveal()))
				require.ErrorIs(t, verify(t, s, unused.Secret.Reveal()), keystore.ErrRevoked)
			})
		})
	}
}

// Close writes every use, so a store that was closed knows of the uses of its predecessors.
func TestUsesBeforeACloseAreKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &mortal{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		used, unused := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
		time.Sleep(2 * time.Hour)
		require.NoError(t, verify(t, s, used.Secret.Reveal()))
		for range 2 {
			require.NoError(t, s.Close())
			s, err = keystore.New(b, nil)
			require.NoError(t, err)
		}
		defer func() { require.NoError(t, s.Close()) }()
		n, err := selected(t, s, keystore.Query{UnusedSince: time.Now().Add(-time.Hour)})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, verify(t, s, used.Secret.Reveal()))
		require.ErrorIs(t, verify(t, s, unused.Secret.Reveal()), keystore.ErrRevoked)
	})
}

// An unwilling backend does not write when keys were used.
type unwilling struct{ mortal }

func (b *unwilling) Apply(ctx context.Context, changes ...backend.Change) error {
	if changes[0].Key[0] == 'u' {
		return backend.ErrFull
	}
	return b.mortal.Apply(ctx, changes...)
}

// A Close that cannot write the last uses does not say that they are known.
func TestUsesThatCloseCouldNotWriteAreUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &unwilling{mortal{Backend: backendtest.NewMemory()}}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		used := create(t, s, keystore.Spec{})
		time.Sleep(2 * time.Hour)
		require.NoError(t, verify(t, s, used.Secret.Reveal()))
		require.NoError(t, s.Close())
		s, err = keystore.New(b.Backend, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		_, err = selected(t, s, keystore.Query{UnusedSince: time.Now().Add(-time.Hour)})
		require.ErrorIs(t, err, keystore.ErrInvalid)
		require.NoError(t, verify(t, s, used.Secret.Reveal()))
	})
}

// A backend that is full when the store is opened gets the mark later, so the uses before a crash
// are unknown all the same.
func TestAStoreThatWasOpenedOnAFullDiskIsMarkedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		disk := backendtest.NewMemory()
		s, err := keystore.New(&mortal{Backend: disk}, nil)
		require.NoError(t, err)
		used := create(t, s, keystore.Spec{})
		require.NoError(t, s.Close())
		b := &mortal{Backend: disk}
		b.dead.Store(true)
		full := &fullAtFirst{mortal: b}
		s, err = keystore.New(full, nil)
		require.NoError(t, err)
		time.Sleep(2 * time.Hour)
		b.dead.Store(false)
		time.Sleep(2 * time.Minute)
		synctest.Wait() // the store has written the mark, and the uses of the last minute
		require.NoError(t, verify(t, s, used.Secret.Reveal()))
		b.dead.Store(true)
		require.NoError(t, s.Close())
		s, err = keystore.New(disk, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		_, err = selected(t, s, keystore.Query{UnusedSince: time.Now().Add(-time.Hour)})
		require.ErrorIs(t, err, keystore.ErrInvalid)
	})
}

// fullAtFirst is a mortal backend whose disk is full while the backend is dead.
type fullAtFirst struct{ *mortal }

func (b *fullAtFirst) Apply(ctx context.Context, changes ...backend.Change) error {
	if b.dead.Load() {
		return backend.ErrFull
	}
	return b.Backend.Apply(ctx, changes...)
}

// A backup does not know how its keys were used after it.
func TestUsesBeforeARestoreAreUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		from := inMemory(t)
		issued := create(t, from, keystore.Spec{})
		saved := backup(t, from)
		time.Sleep(2 * time.Hour)
		require.NoError(t, verify(t, from, issued.Secret.Reveal()))
		to := inMemory(t)
		time.Sleep(time.Minute)
		restore(t, to, saved)
		restored := time.Now()
		time.Sleep(time.Minute)
		_, err := selected(t, to, keystore.Query{UnusedSince: restored.Add(-1)})
		require.ErrorIs(t, err, keystore.ErrInvalid)
		require.NoError(t, verify(t, to, issued.Secret.Reveal()))
	})
}

// A key is in use while a context from Bind lives under the key, and was last used when the last of
// them ended, by whomever.
func TestALiveContextIsAUse(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, s *keystore.Store, id string,
		release func()){
		"its owner": func(_ *testing.T, _ *keystore.Store, _ string, release func()) { release() },
		"a change of the key": func(t *testing.T, s *keystore.Store, id string, release func()) {
			_, err := s.Update(t.Context(), id,
				func(spec *keystore.Spec) error { spec.Scopes = nil; return nil })
			require.NoError(t, err)
			time.AfterFunc(2*time.Hour, release) // the owner is slow
		},
		"the end of a grace": func(t *testing.T, s *keystore.Store, id string, _ func()) {
			_, err := s.Rotate(t.Context(), id, time.Second)
			require.NoError(t, err)
			time.Sleep(time.Second)
			synctest.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := backendtest.NewMemory()
				s, err := keystore.New(b, nil)
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				issued := create(t, s, keystore.Spec{Scopes: []string{"a"}})
				id := issued.Key.ID
				bound, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
				require.NoError(t, err)
				defer release()
				time.Sleep(3*time.Hour + time.Second)
				n, err := selected(t, s, keystore.Query{UnusedSince: time.Now().Add(-time.Hour)})
				require.NoError(t, err)
				require.Zero(t, n)
				require.NoError(t, bound.Err())
				require.Equal(t, time.Now().Truncate(time.Minute).UTC(), lastUsed(t, s, id))
				require.Equal(t, uint64(time.Now().Unix()/60), writtenUse(t, b),
					"a crash forgets the last minutes at most")

				time.Sleep(57 * time.Second) // the last seconds of a minute
				end(t, s, id, release)
				require.Error(t, bound.Err())
				ended := time.Now().Truncate(time.Minute).UTC()
				require.Equal(t, ended, lastUsed(t, s, id))
				time.Sleep(3 * time.Hour)
				require.Equal(t, ended, lastUsed(t, s, id))
				n, err = selected(t, s, keystore.Query{UnusedSince: time.Now().Add(-time.Hour)})
				require.NoError(t, err)
				require.Equal(t, 1, n)
			})
		})
	}
}

// writtenUse returns the minute of the one use that a backend has.
func writtenUse(t testing.TB, b backend.Backend) (minute uint64) {
	t.Helper()
	for e, err := range b.Scan(t.Context(), []byte("u"), []byte("v")) {
		require.NoError(t, err)
		require.Zero(t, minute)
		minute, _ = binary.Uvarint(e.Value)
	}
	return minute
}

// Close ends the contexts that live, and writes that their keys were used until then.
func TestCloseKnowsOfLiveContexts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &mortal{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		issued := create(t, s, keystore.Spec{})
		bind(t, s, issued.Secret.Reveal())
		time.Sleep(3*time.Hour - time.Nanosecond)
		closed := time.Now().Truncate(time.Minute).UTC()
		require.NoError(t, s.Close())
		s, err = keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		require.Equal(t, closed, lastUsed(t, s, issued.Key.ID))
	})
}

// What Allow allows is a use, such as a message of a stream.
func TestAllowIsAUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		issued := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1e-6,
			Burst: 2}})
		key, err := s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		time.Sleep(time.Hour)
		synctest.Wait() // the background has seen the new minute
		require.NoError(t, key.Allow())
		used := time.Now().Truncate(time.Minute).UTC()
		require.Equal(t, used, lastUsed(t, s, issued.Key.ID))
		time.Sleep(time.Hour)
		require.Error(t, key.Allow())
		require.Equal(t, used, lastUsed(t, s, issued.Key.ID), "a refusal is no use")
	})
}

// A staged backend calls between before a Scan of the keys yields the key with a number.
type staged struct {
	backend.Backend
	at      int
	between func()
}

func (b *staged) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		n := 0
		for e, err := range b.Backend.Scan(ctx, from, to) {
			if b.between != nil && err == nil && e.Key[0] == 'k' {
				if n == b.at {
					b.between()
				}
				n++
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// A key that is used after it was selected, and before it is revoked, is not revoked.
func TestRevokeAllChecksTheLastUseAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &staged{Backend: backendtest.NewMemory(), at: 1}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		first := create(t, s, keystore.Spec{})
		time.Sleep(time.Millisecond)
		second := create(t, s, keystore.Spec{})
		time.Sleep(2 * time.Hour)
		// which has been selected
		b.between = func() { require.NoError(t, verify(t, s, first.Secret.Reveal())) }
		n, err := s.RevokeAll(t.Context(), keystore.Query{UnusedSince: time.Now().Add(-time.Hour)},
			"", nil)
		b.between = nil
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.NoError(t, verify(t, s, first.Secret.Reveal()))
		require.ErrorIs(t, verify(t, s, second.Secret.Reveal()), keystore.ErrRevoked)
	})
}

// A Verify that the end of the store overtakes admits nobody: its use could not be written any
// more.
func TestAVerifyThatCloseOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &unlucky{Backend: &mortal{Backend: backendtest.NewMemory()}}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		issued := create(t, s, keystore.Spec{})
		b.between = func() { require.NoError(t, s.Close()) }
		_, err = s.Verify(context.WithValue(t.Context(), marked{}, true), issued.Secret.Reveal())
		require.ErrorIs(t, err, keystore.ErrClosed)
	})
}

// A use is written after the key was purged. The next Purge removes what was written; so do all for
// keys that are there.
func TestALateUseOfAPurgedKeyIsRemoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		memory := backendtest.NewMemory()
		b := &watched{Backend: memory}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		stays, goes := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
		require.NoError(t, verify(t, s, stays.Secret.Reveal()))
		require.NoError(t, verify(t, s, goes.Secret.Reveal()))
		purge := func() {
			b.onUsage.Store(nil)
			revokeErr := s.Revoke(context.Background(), goes.Key.ID, "")
			time.Sleep(time.Second)
			n, err := s.Purge(context.Background(), time.Now())
			if err := errors.Join(revokeErr, err); err != nil || n != 1 {
				t.Error(n, err)
			}
		}
		b.onUsage.Store(&purge)
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		uses := func() (n int) {
			for _, err := range memory.Scan(t.Context(), []byte("u"), []byte("v")) {
				require.NoError(t, err)
				n++
			}
			return n
		}
		require.Equal(t, 2, uses(), "one of them is late")
		_, err = s.Purge(t.Context(), time.Now())
		require.NoError(t, err)
		require.Equal(t, 1, uses())
		require.NotZero(t, lastUsed(t, s, stays.Key.ID))
	})
}
