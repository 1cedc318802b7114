package badgerdb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// holderDir names a directory in the environment of a process that opens it and waits to be killed.
const holderDir = "BADGERDB_HOLDER_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holderDir); dir != "" {
		if _, err := Open(dir, Options{}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("open")
		select {}
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, dir string) *DB {
	t.Helper()
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

func TestConformance(t *testing.T) {
	backendtest.RunDurable(t, func(t *testing.T, dir string) backend.Backend { return open(t, dir) })
}

func change(key, value string, expect uint64) backend.Change {
	return backend.Change{Key: []byte(key), Value: []byte(value), Expect: expect}
}

// After a commit that failed, nothing is served: its writes are visible in Badger's memory, and may or may not be on
// disk.
func TestFailedCommitPoisons(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	ctx := t.Context()
	require.NoError(t, db.Apply(ctx, change("k", "old", 0)))
	db.commitFault = func() error { return syscall.EIO }

	var wg sync.WaitGroup
	var told atomic.Int64
	for n := range 16 {
		wg.Go(func() {
			if err := db.Apply(ctx, change(fmt.Sprint("k", n), "new", 0)); errors.Is(err, backend.ErrFailed) {
				told.Add(1)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 16, told.Load(), "everyone in the group, and everyone after it")
	db.commitFault = nil
	require.ErrorIs(t, db.Apply(ctx, change("k", "new", 1)), backend.ErrFailed)
	_, err := db.Get(ctx, []byte("k"))
	require.ErrorIs(t, err, backend.ErrFailed)
	require.ErrorIs(t, err, syscall.EIO, "it says why")
	for _, err := range db.Scan(ctx, nil, nil) {
		require.ErrorIs(t, err, backend.ErrFailed)
	}

	require.NoError(t, db.Close())
	e, err := open(t, dir).Get(ctx, []byte("k"))
	require.NoError(t, err, "reopening recovers")
	require.Equal(t, "old", string(e.Value))
}

// What a group has not made durable yet, nobody sees.
func TestReadsSeeOnlyWhatIsDurable(t *testing.T) {
	db := open(t, t.TempDir())
	ctx := t.Context()
	require.NoError(t, db.Apply(ctx, change("k", "old", 0)))
	committed, seen := make(chan struct{}), make(chan struct{})
	db.commitFault = func() error { // Badger has the write; the committer has not acknowledged it
		close(committed)
		<-seen
		return nil
	}
	done := make(chan error)
	go func() { done <- db.Apply(ctx, change("k", "new", 1)) }()
	<-committed
	e, err := db.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, "old", string(e.Value))
	close(seen)
	require.NoError(t, <-done)
	e, err = db.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, "new", string(e.Value))
}

// An Apply whose context ends while it waits for the committer has changed nothing; one that was taken is waited for.
func TestApplyAndItsContext(t *testing.T) {
	db := open(t, t.TempDir())
	taken, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	db.commitFault = func() error {
		once.Do(func() {
			close(taken)
			<-release
		})
		return nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- db.Apply(ctx, change("first", "v", 0)) }()
	<-taken
	go func() { second <- db.Apply(ctx, change("second", "v", 0)) }()
	cancel()
	require.ErrorIs(t, <-second, context.Canceled)
	select {
	case err := <-first:
		require.Fail(t, "it was taken", "%v", err)
	default:
	}
	close(release)
	require.NoError(t, <-first)
	_, err := db.Get(t.Context(), []byte("first"))
	require.NoError(t, err)
	_, err = db.Get(t.Context(), []byte("second"))
	require.ErrorIs(t, err, backend.ErrNotFound)
}

// Versions that Badger may drop are those that no reader needs: a read that is under way keeps the discard timestamp
// where it is.
func TestDiscardWaitsForReaders(t *testing.T) {
	db := open(t, t.TempDir())
	ctx := t.Context()
	require.NoError(t, db.Apply(ctx, change("k", "0", 0)))
	err := db.read(ctx, func(txn *badger.Txn) error {
		for n := range uint64(2 * discardEvery) {
			if err := db.Apply(ctx, change("k", fmt.Sprint(n+1), n+1)); err != nil {
				return err
			}
		}
		require.NoError(t, db.badger.Flatten(1))
		item, err := txn.Get(storedKey([]byte("k")))
		if err != nil {
			return err
		}
		e, err := entry(item)
		require.Equal(t, "0", string(e.Value))
		return err
	})
	require.NoError(t, err)
}

func TestDamagedEntry(t *testing.T) {
	db := open(t, t.TempDir())
	txn := db.badger.NewTransactionAt(0, true)
	require.NoError(t, txn.Set(storedKey([]byte("k")), []byte("short")))
	require.NoError(t, txn.CommitAt(1, nil))
	db.durable.Store(1)
	_, err := db.Get(t.Context(), []byte("k"))
	require.ErrorIs(t, err, backend.ErrCorrupt)
	require.ErrorContains(t, err, "6b", "the key, in hexadecimal")
	require.ErrorIs(t, db.Apply(t.Context(), change("k", "v", 1)), backend.ErrCorrupt)
}

func TestLogger(t *testing.T) {
	var out strings.Builder
	db, err := Open(t.TempDir(), Options{Logger: slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	require.NoError(t, err)
	require.NoError(t, db.Close())
	require.Contains(t, out.String(), "level=DEBUG msg=\"badger: ")
	require.NotContains(t, out.String(), "level=INFO")
}

func TestDirectory(t *testing.T) {
	refused := func(t *testing.T, dir string) error {
		t.Helper()
		db, err := Open(dir, Options{})
		if err == nil {
			require.NoError(t, db.Close())
		}
		require.Error(t, err)
		return err
	}
	mode := func(t *testing.T, path string) os.FileMode {
		t.Helper()
		info, err := os.Stat(path)
		require.NoError(t, err)
		return info.Mode().Perm()
	}
	t.Run("missing", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "a", "b")
		open(t, dir)
		require.Equal(t, os.FileMode(0o700), mode(t, dir))
	})
	t.Run("without a name", func(t *testing.T) {
		require.ErrorContains(t, refused(t, ""), "no name")
	})
	t.Run("a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "f")
		require.NoError(t, os.WriteFile(file, nil, 0o600))
		require.ErrorContains(t, refused(t, file), "is a file")
		require.ErrorContains(t, refused(t, filepath.Join(file, "below")), "not a directory")
	})
	t.Run("open to others", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "d")
		require.NoError(t, os.Mkdir(dir, 0o700))
		for range 2 { // empty, then a store's
			require.NoError(t, os.Chmod(dir, 0o755))
			db, err := Open(dir, Options{})
			require.NoError(t, err)
			require.Equal(t, os.FileMode(0o700), mode(t, dir))
			require.NoError(t, db.Close())
		}
	})
	t.Run("somebody else's", func(t *testing.T) {
		dir := t.TempDir()
		require.NoError(t, os.Chmod(dir, 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, "thesis.txt"), nil, 0o644))
		require.ErrorContains(t, refused(t, dir), "thesis.txt")
		require.Equal(t, os.FileMode(0o755), mode(t, dir), "it is not touched")
	})
	t.Run("the root of a file system", func(t *testing.T) {
		dir := t.TempDir()
		require.NoError(t, os.Mkdir(filepath.Join(dir, "lost+found"), 0o700))
		open(t, dir)
	})
	t.Run("without its manifest", func(t *testing.T) {
		dir := t.TempDir()
		db := open(t, dir)
		require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
		require.NoError(t, db.Close())
		require.NoError(t, os.Rename(filepath.Join(dir, "MANIFEST"), filepath.Join(t.TempDir(), "MANIFEST")))
		before, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.ErrorIs(t, refused(t, dir), backend.ErrCorrupt)
		after, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Len(t, after, len(before), "nothing was deleted")
	})
	t.Run("read-only", func(t *testing.T) {
		dir := readOnly(t)
		for _, dir := range []string{dir, filepath.Join(dir, "new")} {
			err := refused(t, dir)
			require.ErrorContains(t, err, dir)
			require.Regexp(t, "read-only file system|permission denied", err)
		}
	})
}

// readOnly returns an empty directory that nothing can be written to. Root may write where the mode forbids it, but
// not to a file system that is mounted so.
func readOnly(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if os.Geteuid() != 0 {
		require.NoError(t, os.Chmod(dir, 0o500))
		t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
		return dir
	}
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "ro,mode=0700", "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: root, who may write anywhere, cannot mount a read-only file system here: %v: %s", err, out)
	}
	t.Cleanup(func() { require.NoError(t, exec.Command("umount", dir).Run()) })
	return dir
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	_, err := Open(dir, Options{})
	require.ErrorIs(t, err, backend.ErrLocked)
	require.ErrorContains(t, err, fmt.Sprintf("this process (pid %d)", os.Getpid()))
	require.ErrorContains(t, err, dir)
	require.NoError(t, db.Close())

	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), holderDir+"="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line := make([]byte, 5)
	_, err = out.Read(line)
	require.NoError(t, err)
	require.Equal(t, "open\n", string(line))
	_, err = Open(dir, Options{})
	require.ErrorIs(t, err, backend.ErrLocked)
	require.ErrorContains(t, err, fmt.Sprintf("pid %d", cmd.Process.Pid))

	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	open(t, dir)
}

func BenchmarkGet(b *testing.B) {
	db := open(b, b.TempDir())
	require.NoError(b, db.Apply(b.Context(), change("k", "v", 0)))
	for name, key := range map[string]string{"hit": "k", "miss": "none"} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				_, _ = db.Get(b.Context(), []byte(key))
			}
		})
	}
}

// Reads while eight writers commit, against reads while none does: x-idle is the ratio of the medians.
func BenchmarkGetBesideWriters(b *testing.B) {
	db := open(b, b.TempDir())
	require.NoError(b, db.Apply(b.Context(), change("k", "v", 0)))
	read := func() time.Duration {
		begin := time.Now()
		for range 100 {
			_, _ = db.Get(b.Context(), []byte("k"))
		}
		return time.Since(begin)
	}
	var idle, busy []time.Duration
	for range 200 {
		idle = append(idle, read())
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
					_ = db.Apply(context.Background(), change(fmt.Sprint(n, "-", i), "v", 0))
				}
			}
		})
	}
	for b.Loop() {
		busy = append(busy, read())
	}
	close(stop)
	wg.Wait()
	b.ReportMetric(float64(median(busy))/float64(median(idle)), "x-idle")
}

func median(d []time.Duration) time.Duration { return slices.Sorted(slices.Values(d))[len(d)/2] }
