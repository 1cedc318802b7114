package badgerdb

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A compaction that fails when its tables are made, and cannot be named in the manifest, ends the
// DB: nothing is served, and all is there when the directory is opened again.
func TestCompactionThatFails(t *testing.T) {
	const attempts = 20
	for range attempts {
		if compactionFails(t) {
			return
		}
	}
	require.Fail(t, "no compaction was the first to fail")
}

// compactionFails runs the test once. The result is false if a flush, which writes the manifest
// too, failed before the compaction.
func compactionFails(t *testing.T) bool {
	dir := t.TempDir()
	o := &failing{dir: dir}
	told := make(chan error, 1)
	db, err := Open(dir, Options{memTableSize: smallMemtable, Logger: slog.New(o),
		Failed: func(err error) { told <- err }})
	require.NoError(t, err)
	acknowledged := uint64(0)
	for err == nil {
		require.Less(t, acknowledged, uint64(10_000), "there is no compaction")
		err = db.Apply(t.Context(), change("k", strings.Repeat("v", 10_000), acknowledged))
		if err == nil {
			acknowledged++
		}
	}
	require.ErrorIs(t, err, backend.ErrFailed)
	failure := <-told
	byFlush := strings.Contains(failure.Error(), "error flushing memtable")
	if byFlush {
		t.Log("a flush was the first to fail")
	} else {
		require.ErrorContains(t, failure, "compact: the compaction failed")
	}
	// The watch reports the failure first, and ends the compaction then. No reader waits for long.
	require.Eventually(t, func() bool { return db.compactions.active.Load() == nil },
		time.Minute, time.Millisecond)
	_, err = db.Get(t.Context(), []byte("k"))
	require.ErrorIs(t, err, backend.ErrFailed)

	require.NoError(t, o.err)
	// The manifest can be written again.
	require.NoError(t, unix.Dup3(o.copied, o.fd, unix.O_CLOEXEC))
	require.NoError(t, unix.Close(o.copied))
	require.NoError(t, db.Close())
	db = open(t, dir)
	e, err := db.Get(t.Context(), []byte("k"))
	require.NoError(t, err)
	require.GreaterOrEqual(t, e.Revision, acknowledged)
	require.NoError(t, db.Check(t.Context()))
	return !byFlush
}

// A failing logger makes the manifest unwritable, for Badger's descriptor of it, when a compaction
// begins its first table.
type failing struct {
	slog.Handler
	dir string

	mu     sync.Mutex
	begun  bool
	fd     int // Badger's
	copied int // of what it was
	err    error
}

func (*failing) Enabled(context.Context, slog.Level) bool { return true }

func (f *failing) Handle(_ context.Context, r slog.Record) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.begun && strings.Contains(r.Message, "LOG Compact. Added") {
		f.begun = true
		f.fd, f.copied, f.err = unwritable(filepath.Join(f.dir, badger.ManifestFilename))
	}
	return nil
}

// unwritable puts a descriptor for reading in the place of the one that this process has of a file,
// and returns the descriptor and a copy of what it was.
func unwritable(path string) (fd, copied int, err error) {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0, 0, err
	}
	for _, entry := range fds {
		if to, err := os.Readlink("/proc/self/fd/" + entry.Name()); err != nil || to != path {
			continue
		}
		if _, err := fmt.Sscan(entry.Name(), &fd); err != nil {
			return 0, 0, err
		}
		if copied, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			return 0, 0, err
		}
		reader, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, 0, err
		}
		if err := unix.Dup3(reader, fd, unix.O_CLOEXEC); err != nil {
			return 0, 0, err
		}
		return fd, copied, unix.Close(reader)
	}
	return 0, 0, fmt.Errorf("%s is not open", path)
}
