package keystore_test

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An Open recovers a directory, and then fails: here because of the pepper, but its process might
// also be killed. The recovery may have lost index entries and last uses. So the next Open builds
// the indexes again, and does not take the remaining last uses for all last uses.
func TestOpenFailsAfterItsRecovery(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	pepper := func(b byte) hashing.Hasher {
		h, err := hashing.HMACSHA256("1", bytes.Repeat([]byte{b}, 32))
		require.NoError(t, err)
		return h
	}
	s, err := keystore.Open(dir, &keystore.Options{Hasher: pepper(1)})
	require.NoError(t, err)
	create(t, s, keystore.Spec{Owner: "o"})
	before := time.Now()
	require.NoError(t, s.Close())
	require.NoError(t, os.Remove(filepath.Join(dir, "LAST")))

	reports := 0
	_, err = keystore.Open(dir, &keystore.Options{
		Hasher: pepper(2), Recover: func(error) { reports++ },
	})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	require.Equal(t, 1, reports)

	var log bytes.Buffer
	s, err = keystore.Open(dir, &keystore.Options{
		Hasher: pepper(1), Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	require.NoError(t, err)
	defer s.Close()
	require.Contains(t, log.String(), "has built its indexes")
	_, err = s.Count(t.Context(), keystore.Query{Owner: "o", UnusedSince: before})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	require.ErrorContains(t, err, "UnusedSince")
	require.NoError(t, s.CheckIntegrity(t.Context()))
}
