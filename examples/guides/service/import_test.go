package main

import (
	"context"
	"io"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

// acceptDRF returns the options of a store that admits tokens of djangorestframework-api-key. The
// first hasher is the hasher of the service, and the others match imported digests.
func acceptDRF() (*keystore.Options, error) {
	hasher, err := hashing.Keyring(hashing.SHA256(), hashing.SHA512(), hashing.PBKDF2SHA256())
	if err != nil {
		return nil, err
	}
	return &keystore.Options{Hasher: hasher, Legacy: importer.DRF().Formats()}, nil
}

// importDRF imports an export while the service runs, and logs each row that was not imported.
func importDRF(ctx context.Context, store *keystore.Store, export io.Reader) error {
	result, err := store.Import(ctx, importer.DRF().Read(export, nil), &keystore.ImportOptions{
		Problem: func(p *keystore.ImportProblem) { slog.Warn("row not imported", "problem", p) },
	})
	slog.Info("import", "imported", result.Imported, "before", result.Unchanged,
		"refused", result.Refused)
	return err
}

// The steps of the guide import.md: import, run both, rotate, and remove what the old keys needed.
func TestImportGuide(t *testing.T) {
	const data = "../../../keystore/importer/testdata/drf-3.1.0"
	dir, ctx := t.TempDir(), t.Context()
	opts, err := acceptDRF()
	require.NoError(t, err)
	store, err := keystore.Open(dir, opts)
	require.NoError(t, err)
	for range 2 { // the second time for the keys that were added since
		export, err := os.Open(data + ".csv")
		require.NoError(t, err)
		require.NoError(t, importDRF(ctx, store, export))
		require.NoError(t, export.Close())
	}
	text, err := os.ReadFile(data + ".tokens")
	require.NoError(t, err)
	var tokens []string
	for line := range strings.Lines(string(text)) {
		if token, ok := strings.CutPrefix(strings.TrimSpace(line), "admitted "); ok {
			tokens = append(tokens, token)
		}
	}
	require.NotEmpty(t, tokens)

	// Old keys work, and their digests are replaced as they are used.
	for _, token := range tokens {
		_, err := store.Verify(ctx, token)
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool {
		replaced := 0
		for e, err := range store.Events(ctx, keystore.EventQuery{Action: keystore.ActionRehash}) {
			require.NoError(t, err)
			require.NotEmpty(t, e.KeyID)
			replaced++
		}
		return replaced == len(tokens)
	}, time.Minute, 5*time.Millisecond)

	// Each client gets a new token; during the grace, both work.
	fresh := make(map[string]string)
	for key, err := range store.List(ctx, keystore.Query{Status: keystore.StatusActive}) {
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(key.Hint, "drf_"))
		issued, err := store.Rotate(ctx, key.ID, 24*time.Hour)
		require.NoError(t, err)
		fresh[key.ID] = issued.Secret.Reveal()
	}
	for _, token := range tokens {
		key, err := store.Verify(ctx, token)
		require.NoError(t, err)
		again, err := store.Verify(ctx, fresh[key.ID])
		require.NoError(t, err)
		require.Equal(t, key.ID, again.ID)
	}
	// The keys that no client used were expired or revoked in the other system.
	for key, err := range store.List(ctx, keystore.Query{Status: keystore.StatusExpired}) {
		require.NoError(t, err)
		require.NoError(t, store.Revoke(ctx, key.ID, "expired before the import"))
	}
	require.NoError(t, store.Close())
	store, err = keystore.Open(dir, opts)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return store.Stats().Outdated == 0 }, time.Minute,
		5*time.Millisecond)
	require.NoError(t, store.Close())

	// Without the formats and the hashers, the new tokens work, and the old ones do not.
	store, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	for _, token := range fresh {
		_, err := store.Verify(ctx, token)
		require.NoError(t, err)
	}
	for _, token := range tokens {
		_, err := store.Verify(ctx, token)
		require.ErrorIs(t, err, keystore.ErrMalformed)
	}
}
