package keystore_test

import (
	"context"
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

// A use is known by its minute, which began before it: no key is taken for unused that was used after the moment.
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
		require.Equal(t, 1, selected(time.Now().Truncate(time.Minute).Add(time.Minute)))
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
				require.NoError(t, s.Revoke(context.Background(), id, "now"))
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
