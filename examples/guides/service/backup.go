package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// nightly calls work every night at three o'clock UTC, until ctx ends.
func nightly(ctx context.Context, logger *slog.Logger, work func(context.Context) error) {
	for {
		now := time.Now().UTC()
		next := time.Date(now.Year(), now.Month(), now.Day(), 3, 0, 0, 0, time.UTC)
		if !next.After(now) {
			next = next.AddDate(0, 0, 1)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(next.Sub(now)):
		}
		if err := work(ctx); err != nil && ctx.Err() == nil {
			logger.Error("backup failed", "error", err)
		}
	}
}

// backUp writes a backup of the store into dir. Before the backup gets its final name, backUp tests
// the backup: backUp restores the backup into a temporary store. Then backUp removes all
// backups except the latest. keep is the number of backups that remain.
func backUp(
	ctx context.Context, logger *slog.Logger, store *keystore.Store, opts *keystore.Options,
	dir string, keep int,
) error {
	file, err := os.CreateTemp(dir, "unfinished-*")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) // does nothing after the file has got its final name
	defer file.Close()
	if err := store.Backup(ctx, file); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	keys, err := testRestore(ctx, opts, file)
	if err != nil {
		return fmt.Errorf("the backup cannot be restored: %w", err)
	}
	name := filepath.Join(dir, time.Now().UTC().Format("keys-20060102T150405.000Z"))
	if err := os.Rename(file.Name(), name); err != nil {
		return err
	}
	logger.Info("backup made", "file", name, "keys", keys)

	backups, err := filepath.Glob(filepath.Join(dir, "keys-*"))
	if err != nil {
		return err
	}
	slices.Sort(backups) // sorted by time
	for _, old := range backups[:max(0, len(backups)-keep)] {
		if err := os.Remove(old); err != nil {
			return err
		}
	}
	return nil
}

// restore restores the keys of a backup into the store.
func restore(ctx context.Context, store *keystore.Store, file string) error {
	backup, err := os.Open(file)
	if err != nil {
		return err
	}
	defer backup.Close()
	return store.Restore(ctx, backup)
}

// testRestore restores a backup into a temporary store, and returns the number of keys in the
// store.
func testRestore(
	ctx context.Context, opts *keystore.Options, backup *os.File,
) (keys int, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(backup.Name()), "restored-*")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if _, err := backup.Seek(0, 0); err != nil {
		return 0, err
	}
	store, err := keystore.Open(filepath.Join(dir, "keys"), &keystore.Options{Hasher: opts.Hasher})
	if err != nil {
		return 0, err
	}
	defer store.Close()
	if err := store.Restore(ctx, backup); err != nil {
		return 0, err
	}
	for _, err := range store.List(ctx, keystore.Query{}) {
		if err != nil {
			return 0, err
		}
		keys++
	}
	return keys, store.CheckIntegrity(ctx)
}
