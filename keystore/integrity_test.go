package keystore_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A directory that is damaged is refused with ErrCorrupt, and opened by Options.Recover, which says
// what is left.
func TestDamagedDirectory(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	kept, revoked := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
	require.NoError(t, s.Revoke(t.Context(), revoked.Key.ID, "leaked"))
	require.NoError(t, s.CheckIntegrity(t.Context()))
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(filepath.Join(dir, "MANIFEST")))

	_, err = keystore.Open(dir, nil)
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.NotErrorIs(t, err, keystore.ErrDenied)
	require.ErrorContains(t, err, "MANIFEST")
	require.ErrorContains(t, err, dir)

	var lost error
	s, err = keystore.Open(dir, &keystore.Options{Recover: func(err error) { lost = err }})
	require.NoError(t, err)
	defer s.Close()
	require.ErrorIs(t, lost, keystore.ErrCorrupt)
	// two keys, three events, an index entry, and the state
	require.ErrorContains(t, lost, "all 7 entries are left")
	_, err = s.Verify(t.Context(), kept.Secret.Reveal())
	require.NoError(t, err)
	_, err = s.Verify(t.Context(), revoked.Secret.Reveal())
	require.ErrorIs(t, err, keystore.ErrRevoked)
	require.NoError(t, s.CheckIntegrity(t.Context()))
}

func TestCheckIntegrityNamesDamagedRecords(t *testing.T) {
	b := backendtest.NewMemory()
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	defer s.Close()
	issued := create(t, s, keystore.Spec{})
	require.NoError(t, s.CheckIntegrity(t.Context()))
	for e, err := range b.Scan(t.Context(), []byte("k"), []byte("l")) {
		require.NoError(t, err)
		require.NoError(t, b.Apply(t.Context(),
			backend.Change{Key: e.Key, Value: []byte("nonsense"), Expect: 1}))
	}
	err = s.CheckIntegrity(t.Context())
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.ErrorContains(t, err, issued.Key.ID)
}

// A full disk refuses what is not urgent, with nothing changed, and is over when there is room
// again.
func TestFullDiskIsUnavailable(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	_, err := s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	full := errors.Join(backend.ErrFull)
	b.fail.Store(&full)
	_, err = s.Create(t.Context(), keystore.Spec{Name: "n"})
	require.ErrorIs(t, err, keystore.ErrUnavailable)
	require.ErrorContains(t, err, "the disk is full")
	b.fail.Store(nil)
	_, err = s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	create(t, s, keystore.Spec{})
	require.Equal(t, 1, s.Stats().Cached, "nobody is in doubt")
}
