package keystore

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

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
