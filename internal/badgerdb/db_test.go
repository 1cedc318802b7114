package badgerdb

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"log/slog"
	"math/bits"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func TestMain(m *testing.M) {
	runChild()              // which does not return in a process that a test has started
	if bits.UintSize < 64 { // where Open refuses
		flag.Parse()
		_ = flag.Set("test.run", "WordSize")
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
	backendtest.RunDurable(t, func(t *testing.T, dir string) backend.Backend {
		return open(t, dir)
	})
}

func change(key, value string, expect uint64) backend.Change {
	return backend.Change{Key: []byte(key), Value: []byte(value), Expect: expect}
}

// After a commit that failed, nothing is served: its writes are visible in Badger's memory, and may
// or may not be on disk.
func TestFailedCommitStopsTheDB(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	ctx := t.Context()
	require.NoError(t, db.Apply(ctx, change("k", "old", 0)))
	db.commitFault = func() error { return syscall.EIO }

	var wg sync.WaitGroup
	var told atomic.Int64
	for n := range 16 {
		wg.Go(func() {
			err := db.Apply(ctx, change(fmt.Sprint("k", n), "new", 0))
			if errors.Is(err, backend.ErrFailed) {
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

// An Apply whose context ends while it waits for the committer has changed nothing; one that was
// taken is waited for.
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

// Versions that Badger may drop are those that no reader needs: a read that is under way keeps the
// discard timestamp where it is.
func TestDiscardWaitsForReaders(t *testing.T) {
	db := open(t, t.TempDir())
	ctx := t.Context()
	require.NoError(t, db.Apply(ctx, change("k", "0", 0)))
	err := db.read(ctx, db.durable.Load, func(txn *badger.Txn) error {
		for n := range uint64(4 * discardEvery) {
			if err := db.Apply(ctx, change("k", fmt.Sprint(n+1), n+1)); err != nil {
				return err
			}
		}
		require.NoError(t, db.badger.Flatten(1))
		item, err := txn.Get(layout.StoredKey([]byte("k")))
		if err != nil {
			return err
		}
		e, _, err := decodeItem(item)
		require.Equal(t, "0", string(e.Value))
		return err
	})
	require.NoError(t, err)
}

// In Badger, a snapshot keeps what it shows while everything is written over, flushed and
// compacted.
func TestSnapshotKeepsItsVersions(t *testing.T) {
	db, err := Open(t.TempDir(), Options{memTableSize: 1 << 20})
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	const entries, deleted = 600, "k0599"
	write := func(round uint64) {
		t.Helper()
		var changes []backend.Change
		for n := range entries {
			key := fmt.Sprintf("k%04d", n)
			value := fmt.Sprint(key, "-", round, strings.Repeat(".", 200))
			changes = append(changes, change(key, value, round))
		}
		for part := range slices.Chunk(changes, 100) {
			require.NoError(t, db.Apply(t.Context(), part...))
		}
	}
	// Rounds of six commits, so that the discard timestamp could move.
	const pause = discardEvery/6 + 1
	round := uint64(0)
	overwrite := func() {
		for range pause {
			write(round)
			round++
		}
		require.NoError(t, db.badger.Flatten(1))
	}
	overwrite()
	before := versions(t, db)

	shown := round - 1
	n := 0
	for e, err := range db.Snapshot(t.Context(), nil, nil) {
		require.NoError(t, err)
		key := fmt.Sprintf("k%04d", n)
		require.Equal(t, key, string(e.Key))
		require.Equal(t, shown+1, e.Revision)
		require.True(t, strings.HasPrefix(string(e.Value), fmt.Sprint(key, "-", shown, ".")), "%s",
			e.Value[:20])
		if n++; n == 1 || n == pageEntries+1 {
			tables := tableIDs(db)
			overwrite()
			require.Greater(t, slices.Max(tableIDs(db)), slices.Max(tables)+2,
				"memtables were flushed, and tables compacted")
		}
		if n == 2 {
			require.NoError(t, db.Apply(t.Context(),
				backend.Change{Key: []byte(deleted), Expect: round, Delete: true}))
			require.NoError(t, db.Apply(t.Context(),
				backend.Change{Key: []byte(deleted), Value: []byte("new"), Revision: round}))
		}
	}
	require.Equal(t, entries, n)
	require.GreaterOrEqual(t, versions(t, db), 2*pause*entries, "nothing was dropped meanwhile")

	overwrite()
	overwrite()
	require.Less(t, versions(t, db), before+3*pause*entries/2,
		"it holds on to nothing once it has ended")
}

// versions counts what Badger has of all entries.
func versions(t *testing.T, db *DB) (n int) {
	t.Helper()
	txn := db.badger.NewTransactionAt(db.durable.Load(), false)
	defer txn.Discard()
	o := badger.DefaultIteratorOptions
	o.AllVersions = true
	o.Prefix = []byte{layout.KeyPrefix}
	it := txn.NewIterator(o)
	defer it.Close()
	for it.Rewind(); it.Valid(); it.Next() {
		n++
	}
	return n
}

func tableIDs(db *DB) (ids []uint64) {
	for _, table := range db.badger.Tables() {
		ids = append(ids, table.ID)
	}
	return ids
}

// However its loop ends, a snapshot holds on to nothing afterwards.
func TestVersionsAreDroppedAfterASnapshot(t *testing.T) {
	db := open(t, t.TempDir())
	for n := range pageEntries + 1 {
		require.NoError(t, db.Apply(t.Context(), change(fmt.Sprintf("k%04d", n), "v", 0)))
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	all := db.Snapshot(ctx, nil, nil)
	for _, err := range all {
		require.NoError(t, err)
		require.EqualValues(t, 1, db.readers.total())
	}
	require.Zero(t, db.readers.total(), "read to its end")
	for _, err := range all {
		require.NoError(t, err)
		break
	}
	require.Zero(t, db.readers.total(), "break")
	require.Panics(t, func() {
		for range all {
			panic("in the body")
		}
	})
	require.Zero(t, db.readers.total(), "panic")
	next, stop := iter.Pull2(all)
	_, _, ok := next()
	require.True(t, ok)
	for range all {
		require.EqualValues(t, 2, db.readers.total())
		break
	}
	require.EqualValues(t, 1, db.readers.total())
	stop()
	require.Zero(t, db.readers.total(), "stop")
	var last error
	for _, last = range all {
		cancel()
	}
	require.ErrorIs(t, last, context.Canceled)
	require.Zero(t, db.readers.total(), "an ended context")
	for _, err := range all {
		require.ErrorIs(t, err, context.Canceled)
	}
	require.Zero(t, db.readers.total(), "a context that ended before")
}

// Close does not wait for somebody who has stopped in the middle of a snapshot.
func TestCloseDuringSnapshot(t *testing.T) {
	db := open(t, t.TempDir())
	require.NoError(t, db.Apply(t.Context(), change("a", "v", 0), change("b", "v", 0)))
	next, stop := iter.Pull2(db.Snapshot(t.Context(), nil, nil))
	defer stop()
	e, err, ok := next()
	require.True(t, ok)
	require.NoError(t, err)
	require.Equal(t, "a", string(e.Key))
	require.NoError(t, db.Close())
	_, err, ok = next()
	require.True(t, ok)
	require.ErrorIs(t, err, backend.ErrClosed)
	_, _, ok = next()
	require.False(t, ok)
	require.Zero(t, db.readers.total())
}

// What Badger knows is that an entry was written over. So the version below it does not come back,
// wherever the two are: in memory, in tables of one level or of two, compacted or not.
func TestDeletedStaysDeleted(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	ctx := t.Context()
	absent := func() {
		t.Helper()
		_, err := db.Get(ctx, []byte("k"))
		require.ErrorIs(t, err, backend.ErrNotFound)
		for _, all := range []iter.Seq2[backend.Entry, error]{db.Scan(ctx, nil, nil),
			db.Snapshot(ctx, nil, nil)} {
			for e, err := range all {
				require.NoError(t, err)
				require.NotEqual(t, "k", string(e.Key))
			}
		}
		require.ErrorIs(t, db.Apply(ctx, change("k", "back", 1)), backend.ErrConflict)
	}
	reopen := func() { // which flushes
		t.Helper()
		require.NoError(t, db.Close())
		db = open(t, dir)
	}
	require.NoError(t, db.Apply(ctx, change("k", "old", 0)))
	reopen()
	require.NoError(t, db.badger.Flatten(1))
	require.NoError(t, db.Apply(ctx, backend.Change{Key: []byte("k"), Expect: 1, Delete: true}))
	absent() // in memory, above a table
	reopen()
	absent() // in a table, above another
	for n := range uint64(discardEvery) {
		require.NoError(t, db.Apply(ctx, change("other", "v", n)))
	}
	require.NoError(t, db.badger.Flatten(1))
	absent()
	reopen()
	require.NoError(t, db.badger.Flatten(1))
	absent()
	require.NoError(t, db.Apply(ctx, change("k", "new", 0)))
	reopen()
	e, err := db.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, backend.Entry{Key: []byte("k"), Value: []byte("new"), Revision: 1}, e)
}

// A page that looks at nothing but deleted entries ends all the same, and the next goes on behind
// it.
func TestPagesOverDeletedEntries(t *testing.T) {
	db := open(t, t.TempDir())
	ctx := t.Context()
	const entries = 2*pageEntries + 1
	for n := range entries {
		key := fmt.Sprintf("k%04d", n)
		require.NoError(t, db.Apply(ctx, change(key, "v", 0)))
		if n < entries-1 {
			require.NoError(t, db.Apply(ctx,
				backend.Change{Key: []byte(key), Expect: 1, Delete: true}))
		}
	}
	var from []byte
	for range 2 {
		page, next, err := db.page(ctx, db.durable.Load, from, nil, false, nil)
		require.NoError(t, err)
		require.Empty(t, page)
		require.NotNil(t, next)
		from = next
	}
	page, next, err := db.page(ctx, db.durable.Load, from, nil, false, nil)
	require.NoError(t, err)
	require.Len(t, page, 1)
	require.Nil(t, next)

	var to []byte
	for n := range 2 {
		page, next, err := db.page(ctx, db.durable.Load, nil, to, true, nil)
		require.NoError(t, err)
		require.Len(t, page, 1-n, "in descending order, the first page has the entry")
		require.NotNil(t, next)
		to = next
	}
	page, next, err = db.page(ctx, db.durable.Load, nil, to, true, nil)
	require.NoError(t, err)
	require.Empty(t, page)
	require.Nil(t, next)
}

// A table that cannot be read any more, as after an error of the disk, is trouble for whoever reads
// it, and does not end the process.
func TestUnreadableTable(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
	require.NoError(t, db.Close())
	db = open(t, dir)
	tables, err := badgerfile.FilesOf(dir, badgerfile.TableFiles)
	require.NoError(t, err)
	require.Len(t, tables, 1, "one is not compacted, which would end the process")
	require.NoError(t, os.Truncate(tables[0], 0))
	require.ErrorIs(t, db.Apply(t.Context(), change("k", "w", 1)), backend.ErrFailed)
	_, err = db.Get(t.Context(), []byte("k"))
	require.ErrorIs(t, err, backend.ErrFailed)
}

// A stored value is a revision and a value, or nothing. Anything between is damage.
func TestDamagedEntry(t *testing.T) {
	db := open(t, t.TempDir())
	for ts := range uint64(7) {
		txn := db.badger.NewTransactionAt(ts, true)
		require.NoError(t, txn.Set(layout.StoredKey([]byte("k")), make([]byte, ts+1)))
		require.NoError(t, txn.CommitAt(ts+1, nil))
		db.durable.Store(ts + 1)
		_, err := db.Get(t.Context(), []byte("k"))
		require.ErrorIs(t, err, backend.ErrCorrupt)
		require.ErrorContains(t, err, "6b", "the key, in hexadecimal")
		all, err := db.GetAll(t.Context(), [][]byte{[]byte("j"), []byte("k")})
		require.ErrorIs(t, err, backend.ErrCorrupt)
		require.Nil(t, all)
		for _, err := range db.Scan(t.Context(), nil, nil) {
			require.ErrorIs(t, err, backend.ErrCorrupt)
		}
		require.ErrorIs(t, db.Apply(t.Context(), change("k", "v", 0)), backend.ErrCorrupt)
		require.ErrorIs(t, db.Apply(t.Context(), change("k", "v", 1)), backend.ErrCorrupt)
	}
}

func TestLogger(t *testing.T) {
	var out strings.Builder
	handler := slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})
	db, err := Open(t.TempDir(), Options{Logger: slog.New(handler)})
	require.NoError(t, err)
	require.NoError(t, db.Close())
	require.Contains(t, out.String(), "level=DEBUG msg=\"badger: ")
	require.NotContains(t, out.String(), `level=INFO msg="badger`)
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
	t.Run("relative, and the process goes elsewhere", func(t *testing.T) {
		home, away := t.TempDir(), t.TempDir()
		t.Chdir(home)
		db, err := Open("store/", Options{memTableSize: smallMemtable})
		require.NoError(t, err)
		t.Chdir(away)
		require.NoError(t, os.Mkdir("store", 0o700))
		for i := range 200 { // until there are tables
			require.NoError(t, db.Apply(t.Context(),
				change(fmt.Sprint(i), strings.Repeat("v", 30_000), 0)))
		}
		require.NoError(t, db.Close())
		require.Empty(t, names(t, filepath.Join(away, "store")))
		require.Len(t, read(t, open(t, filepath.Join(home, "store"))), 200)
	})
	t.Run("a name that is a pattern", func(t *testing.T) {
		f := newFixture(t)
		top := t.TempDir()
		neighbour := filepath.Join(top, "store-a")
		copyDir(t, f.dir, neighbour)
		before := names(t, neighbour)
		for _, name := range []string{"store-[a-z]", "store-[", "store-*", `store-\a`} {
			dir := filepath.Join(top, name)
			copyDir(t, f.dir, dir)
			require.Equal(t, f.entries, read(t, open(t, dir)), name)
			require.Equal(t, before, names(t, neighbour))
		}
	})
	t.Run("without a name", func(t *testing.T) {
		require.ErrorContains(t, refused(t, ""), "the path of the directory is empty")
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
	t.Run("with a file of somebody else's", func(t *testing.T) {
		dir := t.TempDir()
		db, err := Open(dir, Options{})
		require.NoError(t, err)
		require.NoError(t, db.Close())
		notes := filepath.Join(dir, "notes-KEYREGISTRY")
		require.NoError(t, os.WriteFile(notes, nil, 0o600))
		open(t, dir)
		require.FileExists(t, notes)
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
		require.NoError(t, os.Rename(filepath.Join(dir, "MANIFEST"),
			filepath.Join(t.TempDir(), "MANIFEST")))
		before := tree(t, dir)
		require.ErrorIs(t, refused(t, dir), backend.ErrCorrupt)
		require.Equal(t, before, tree(t, dir))
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

// readOnly returns an empty directory that nothing can be written to. Root may write where the mode
// forbids it, but not to a file system that is mounted so.
func readOnly(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if os.Geteuid() != 0 {
		require.NoError(t, os.Chmod(dir, 0o500))
		t.Cleanup(func() { _ = os.Chmod(dir, 0o700) })
		return dir
	}
	mount := exec.Command("mount", "-t", "tmpfs", "-o", "ro,mode=0700", "tmpfs", dir)
	if out, err := mount.CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: root, who may write anywhere, cannot mount a read-only file system "+
			"here: %v: %s", err, out)
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

	held, v := child{Dir: dir}.hold(t)
	require.Empty(t, v.Text)
	_, err = Open(dir, Options{})
	require.ErrorIs(t, err, backend.ErrLocked)
	require.ErrorContains(t, err, fmt.Sprintf("pid %d", held.Process.Pid))
	host, hostErr := os.Hostname()
	require.NoError(t, hostErr)
	require.ErrorContains(t, err, host)
	require.ErrorContains(t, err, dir)

	require.NoError(t, held.Process.Kill())
	_ = held.Wait()
	open(t, dir)
}

// The file LOCK of a process that was killed belongs to another user, or was written by another
// program: it is replaced.
func TestLockFileOfOthers(t *testing.T) {
	dir := t.TempDir()
	path, pid := filepath.Join(dir, fsys.LockName), fmt.Appendf(nil, "%d\n", os.Getpid())
	require.NoError(t, os.WriteFile(path, pid, 0o400))
	db := open(t, dir)
	_, err := Open(dir, Options{})
	require.ErrorContains(t, err, fmt.Sprintf("this process (pid %d)", os.Getpid()))
	// What another program with Badger writes, with the pid of this process: another process may
	// have that pid on its host.
	require.NoError(t, os.WriteFile(path, pid, 0o600))
	_, err = Open(dir, Options{})
	require.ErrorContains(t, err, fmt.Sprintf("the process with pid %d", os.Getpid()))
	require.NotContains(t, err.Error(), "this process")
	for _, text := range []string{"", "x", "1\n2\n", strings.Repeat("\x1b[31m", 1000)} {
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		_, err = Open(dir, Options{})
		require.ErrorContains(t, err, "another process has")
	}
	require.NoError(t, db.Close())
	require.NotContains(t, names(t, dir), fsys.LockName)
}

// A Badger that cannot write cannot be closed. Close says so each time, and the directory stays
// held, until Badger is closed.
func TestCloseThatFails(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
	// Badger cannot make a table while another file has its name. It tries the next one each
	// second.
	var obstacles []string
	for id := range uint64(600) {
		obstacles = append(obstacles, filepath.Join(dir, table.IDToFilename(id+1)))
		require.NoError(t, os.WriteFile(obstacles[id], nil, 0o600))
	}
	for range 2 {
		require.ErrorContains(t, db.Close(), "could not be closed")
		_, err = Open(dir, Options{})
		require.ErrorIs(t, err, backend.ErrLocked)
		_, err = db.Get(t.Context(), []byte("k"))
		require.ErrorIs(t, err, backend.ErrClosed)
	}
	for _, path := range obstacles {
		require.NoError(t, os.Remove(path))
	}
	require.NoError(t, db.Close())
	require.NoError(t, db.Close())
	require.Equal(t, map[string]string{"k": "v"}, read(t, open(t, dir)))
}
