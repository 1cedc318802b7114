package keystore

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A storage key that is too short for an event is damage, and no panic.
func TestEventWithAShortStorageKey(t *testing.T) {
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	_, err := s.Create(t.Context(), Spec{Name: "n"})
	require.NoError(t, err)
	short := append(eventKey(1)[:5], 1)
	require.NoError(t, b.Apply(t.Context(), backend.Change{Key: short}))
	var good, corrupt int
	for _, err := range s.Events(t.Context(), EventQuery{}) {
		if err == nil {
			good++
		} else {
			require.ErrorIs(t, err, ErrCorrupt)
			corrupt++
		}
	}
	require.Equal(t, 1, good)
	require.Equal(t, 1, corrupt)
}

// A backup may have been made by another program. A purged key with an owner gets no entry in the
// owner index.
func TestRestoreOfAPurgedKeyWithAnOwner(t *testing.T) {
	ctx := t.Context()
	value, err := record.Encode(&record.Record{
		Status: record.Status_STATUS_PURGED, PurgedAt: 1, Owner: "o",
	})
	require.NoError(t, err)
	from := backendtest.NewMemory()
	require.NoError(t, from.Apply(ctx, backend.Change{Key: graveKey(token.ID{1}), Value: value}))
	other := newStoreOn(t, from)
	defer other.Close()
	var saved bytes.Buffer
	require.NoError(t, other.Backup(ctx, &saved))

	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	require.NoError(t, s.Restore(ctx, &saved))
	require.NoError(t, s.CheckIntegrity(ctx))
	requireIndexed(t, b)
}
