package keystore

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Graves are damaged. Purge leaves the keys of these graves, removes all other keys, and names the
// damaged graves. The keys that stay are still revoked.
func TestPurgePassesDamagedGraves(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	damaged := make(map[string]bool)
	var secrets []Secret
	for i := range 100 {
		issued, err := s.Create(ctx, Spec{Name: "n", Owner: "o"})
		require.NoError(t, err)
		require.NoError(t, s.Revoke(ctx, issued.Key.ID, ""))
		if i%40 == 5 {
			damaged[issued.Key.ID] = true
			secrets = append(secrets, issued.Secret)
			id, err := parseID("", issued.Key.ID)
			require.NoError(t, err)
			require.NoError(t, b.Apply(ctx, backend.Change{Key: graveKey(id), Value: []byte("x")}))
		}
	}
	live, err := s.Create(ctx, Spec{Name: "n", Owner: "o"})
	require.NoError(t, err)
	for _, want := range []int{100 - len(damaged), 0} {
		n, err := s.Purge(ctx, time.Now())
		require.ErrorIs(t, err, ErrCorrupt)
		require.Equal(t, want, n)
		for id := range damaged {
			require.ErrorContains(t, err, id)
		}
		left := make(map[string]bool)
		for _, k := range listed(t, s, Query{}) {
			left[k.ID] = true
		}
		require.Len(t, left, len(damaged)+1)
		require.True(t, left[live.Key.ID])
		for id := range damaged {
			require.True(t, left[id])
		}
	}
	for _, secret := range secrets {
		_, err := s.Verify(ctx, secret.Reveal())
		require.ErrorIs(t, err, ErrRevoked)
	}
	require.ErrorIs(t, s.CheckIntegrity(ctx), ErrCorrupt)
}

// Many graves are damaged. The error names some of the graves, and says that there are more.
func TestPurgeNamesSomeDamagedGraves(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	for range backend.MaxChanges / maxChanges * (enough + 2) {
		issued, err := s.Create(ctx, Spec{Name: "n"})
		require.NoError(t, err)
		id, err := parseID("", issued.Key.ID)
		require.NoError(t, err)
		require.NoError(t, b.Apply(ctx, backend.Change{Key: graveKey(id), Value: []byte("x")}))
	}
	_, err := s.RevokeAll(ctx, Query{}, "", &RevokeAllOptions{All: true})
	require.NoError(t, err)
	n, err := s.Purge(ctx, time.Now())
	require.Zero(t, n)
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorContains(t, err, "and there is more damage: call CheckIntegrity")
	require.Less(t, len(err.Error()), 100_000)
}

// A restored key has an empty grave. If the record is lost and the grave is not, Restore brings the
// key back all the same.
func TestRestoreOfALostRecord(t *testing.T) {
	ctx := t.Context()
	first := newStoreOn(t, backendtest.NewMemory())
	defer first.Close()
	key, err := first.Create(ctx, Spec{Name: "n", Owner: "o"})
	require.NoError(t, err)
	var saved bytes.Buffer
	require.NoError(t, first.Backup(ctx, &saved))

	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	require.NoError(t, s.Restore(ctx, bytes.NewReader(saved.Bytes())))
	require.NoError(t, s.Close())
	for _, e := range read(t, b, keySpace, stateSpace) { // as after a recovery
		require.NoError(t, b.Apply(ctx, backend.Change{Key: e.Key, Expect: e.Revision,
			Delete: true}))
	}
	s = newStoreOn(t, b)
	defer s.Close()
	require.NoError(t, s.Restore(ctx, bytes.NewReader(saved.Bytes())))
	_, err = s.Verify(ctx, key.Secret.Reveal())
	require.NoError(t, err)
	require.NoError(t, s.CheckIntegrity(ctx))
	requireIndexed(t, b)
}
