package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func TestBackUp(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	keys, dir := filepath.Join(t.TempDir(), "keys"), t.TempDir()
	store, err := keystore.Open(keys, nil)
	require.NoError(t, err)
	defer store.Close()
	issued, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
	require.NoError(t, err)
	opts := &keystore.Options{}
	for range 4 {
		require.NoError(t, backUp(t.Context(), logger, store, opts, dir, 2))
	}
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 2, "the latest two, and nothing of the test restore")

	// The disaster in the guide: the directory is lost, and the key was revoked after the backup.
	require.NoError(t, store.Revoke(t.Context(), issued.Key.ID, ""))
	require.NoError(t, store.Close())
	require.NoError(t, os.Rename(keys, keys+".lost"))
	require.NoError(t,
		run(t.Context(), config{keys: keys, restore: filepath.Join(dir, left[1].Name())}))
	store, err = keystore.Open(keys, nil)
	require.NoError(t, err)
	defer store.Close()
	_, err = store.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err, "a backup does not know what was revoked after it")
}

func TestBackUpFails(t *testing.T) {
	logger := slog.New(slog.DiscardHandler)
	dir := t.TempDir()
	store, err := keystore.Open(filepath.Join(t.TempDir(), "keys"), nil)
	require.NoError(t, err)
	require.NoError(t, store.Close())
	require.ErrorIs(t, backUp(t.Context(), logger, store, &keystore.Options{}, dir, 2),
		keystore.ErrClosed)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left, "no file that is half a backup")

	damaged, err := os.CreateTemp(dir, "")
	require.NoError(t, err)
	defer damaged.Close()
	_, err = damaged.WriteString("half a backup")
	require.NoError(t, err)
	_, err = testRestore(t.Context(), &keystore.Options{}, damaged)
	require.Error(t, err)
}

func TestNightly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		begin := time.Now()
		var at []time.Time
		go nightly(ctx, slog.New(slog.DiscardHandler), func(context.Context) error {
			at = append(at, time.Now().UTC())
			return context.DeadlineExceeded // nightly must continue after a failure
		})
		time.Sleep(3 * 24 * time.Hour)
		synctest.Wait()
		cancel()
		require.Len(t, at, 3)
		for i, moment := range at {
			require.Equal(t, 3, moment.Hour())
			require.Less(t, moment.Sub(begin), time.Duration(i+1)*24*time.Hour)
		}
	})
}
