package keystore_test

import (
	"context"
	"encoding/json"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Get, List and Inspect show how many sessions a Revoke of the key would end.
func TestLiveSessionsOfAKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		ctx := t.Context()
		issued := create(t, s, keystore.Spec{Scopes: []string{"a"},
			ExpiresAt: time.Now().Add(time.Hour)})
		other := create(t, s, keystore.Spec{})
		live := func(want int) {
			t.Helper()
			key, err := s.Get(ctx, issued.Key.ID)
			require.NoError(t, err)
			require.Equal(t, want, key.Live)
			inspection, err := s.Inspect(ctx, issued.Secret.Reveal())
			require.NoError(t, err)
			require.Equal(t, want, inspection.Key.Live)
			all := make(map[string]int)
			for key, err := range s.List(ctx, keystore.Query{}) {
				require.NoError(t, err)
				all[key.ID] = key.Live
			}
			require.Equal(t, map[string]int{issued.Key.ID: want, other.Key.ID: 1}, all)
		}
		open := func(ctx context.Context, issued *keystore.Issued) *keystore.Session {
			session, err := s.Bind(ctx, issued.Secret.Reveal())
			require.NoError(t, err)
			return session
		}
		defer open(ctx, other).Close()
		live(0)
		a, b := open(ctx, issued), open(ctx, issued)
		live(2)
		seen, err := s.Get(ctx, issued.Key.ID)
		require.NoError(t, err)
		text, err := json.Marshal(seen)
		require.NoError(t, err)
		require.Contains(t, string(text), `"Live":2`)
		var decoded keystore.Key
		require.NoError(t, json.Unmarshal(text, &decoded))
		require.Equal(t, *seen, decoded)
		a.Close()
		a.Close()
		live(1)
		_, err = s.Bind(ctx, issued.Secret.Reveal()+"x")
		require.Error(t, err)
		live(1)
		left, cancel := context.WithCancel(ctx)
		c := open(left, issued)
		cancel()
		live(2)
		c.Close()
		live(1)
		_, err = s.Update(ctx, issued.Key.ID,
			func(spec *keystore.Spec) error { spec.Scopes = nil; return nil })
		require.NoError(t, err)
		live(0)
		b.Close()
		open(ctx, issued)
		key, err := s.Verify(ctx, issued.Secret.Reveal())
		require.NoError(t, err)
		require.Zero(t, key.Live, "all callers of Verify share the key")
		live(1)
		require.NoError(t, s.Disable(ctx, issued.Key.ID, ""))
		live(0)
		require.NoError(t, s.Enable(ctx, issued.Key.ID))
		open(ctx, issued)
		time.Sleep(time.Hour)
		synctest.Wait()
		live(0)
	})
}
