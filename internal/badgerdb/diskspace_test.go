package badgerdb

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/survey"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// As the disk fills up, usual changes are refused first; urgent ones go on in the space that the
// log has already, until that is used up, with no byte left on the disk. Nothing is changed by what
// is refused, and all goes on when there is room again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	var free atomic.Int64
	db.space.disk = func(string) (int64, int64, bool) { return free.Load(), 1 << 30, true }
	put := func(key string, urgent bool) error {
		c := change(key, strings.Repeat("v", 1000), 0)
		c.Restricts = urgent
		return db.Apply(t.Context(), c)
	}
	want := make(map[string]bool)
	ok := func(key string, urgent bool) {
		t.Helper()
		require.NoError(t, put(key, urgent))
		want[key] = true
	}

	free.Store(1 << 30)
	ok("plenty", false)
	free.Store(db.space.need(0) + db.space.memtable)
	ok("just enough", false)
	free.Add(-1)
	err = put("one byte less", false)
	require.ErrorIs(t, err, backend.ErrFull)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.NotErrorIs(t, err, backend.ErrFailed)
	require.ErrorContains(t, err, dir)
	ok("urgent", true)

	free.Store(0)
	if !db.space.allocated {
		t.Log("SKIPPED the reserve in the log: this file system cannot allocate space for a file")
		free.Store(db.space.memtable)
	}
	n := 0
	for ; ; n++ {
		key := fmt.Sprint("reserve", n)
		if err := put(key, true); err != nil {
			require.ErrorIs(t, err, backend.ErrFull)
			break
		}
		want[key] = true
		require.Less(t, n, 2000, "it goes on for ever")
	}
	require.Greater(t, n, 500, "the log has room for more")
	logs, err := filepath.Glob(filepath.Join(dir, "*.mem"))
	require.NoError(t, err)
	require.Len(t, logs, 1, "Badger was never made to begin another log")
	require.ErrorIs(t, db.Close(), backend.ErrFull)
	require.ErrorIs(t, db.Close(), backend.ErrFull, "it can be tried again")

	free.Store(1 << 30)
	require.NoError(t, db.Close())
	db, err = Open(dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	defer db.Close()
	got := read(t, db)
	require.Len(t, got, len(want))
	for key := range want {
		require.Contains(t, got, key)
	}
	require.NoError(t, put("again", false))
}

// A quota that the disk does not tell of is found by allocating: usual changes are refused first,
// urgent ones when there is nothing left but what the log has already. A probe that found enough
// holds for a while, but not into the next log. An Open that has too little space says which it is.
func TestQuota(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	var left atomic.Int64
	probes := 0
	db.space.disk = func(string) (int64, int64, bool) { return 1 << 40, 1 << 40, true }
	db.space.probe = func(_ string, size int64) error {
		probes++
		if size > left.Load() {
			return syscall.EDQUOT
		}
		return nil
	}
	n := 0
	put := func(urgent bool) error {
		n++
		c := change(fmt.Sprint("k", n), strings.Repeat("v", 1000), 0)
		c.Restricts = urgent
		return db.Apply(t.Context(), c)
	}
	refused := func(err error) {
		t.Helper()
		require.ErrorIs(t, err, backend.ErrFull)
		require.ErrorIs(t, err, syscall.ENOSPC)
		require.ErrorIs(t, err, syscall.EDQUOT)
		require.NotErrorIs(t, err, backend.ErrFailed)
		require.ErrorContains(t, err, dir)
	}
	left.Store(1 << 30)
	require.NoError(t, put(false))
	require.Equal(t, 1, probes)
	db.space.probed = time.Now().Add(time.Hour) // the while does not end
	log := db.space.log
	for db.space.log == log {
		require.NoError(t, put(false))
	}
	require.Equal(t, 1, probes, "a probe holds")
	require.Eventually(t, func() bool {
		logs, err := badgerfile.FilesOf(dir, badgerfile.LogFiles)
		return err == nil && len(logs) == 1
	}, time.Minute, time.Millisecond)
	require.NoError(t, put(false))
	require.Equal(t, 2, probes, "but not into the next log")

	db.space.probed = time.Time{} // the while is over
	left.Store(db.space.need(db.space.tables()) + db.space.memtable - 1)
	refused(put(false))
	require.NoError(t, put(true))
	refused(put(false))
	left.Store(db.space.need(db.space.tables()) + db.space.memtable)
	require.NoError(t, put(false), "a refusal does not hold")

	db.space.probed = time.Time{}
	left.Store(db.space.memtable)
	if !db.space.allocated {
		t.Log("SKIPPED the reserve in the log: this file system cannot allocate space for a file")
	} else {
		left.Store(0)
	}
	for err = nil; err == nil; err = put(true) {
		require.Less(t, n, 5000, "it goes on for ever")
	}
	refused(err)
	refused(db.Close())
	left.Store(2 * db.space.memtable)
	require.NoError(t, db.Close())

	r := newSpaceGuard(dir, smallMemtable, 0)
	r.probe = func(string, int64) error { return syscall.EDQUOT }
	refused(r.toOpen(0))
	refused(r.toSalvage())
}

// A compaction can write all tables anew: one table with the first key of one kind and the last key
// of another is merged with everything between. Of 41 MB of tables all were written at once, with
// memtables of 1 MB.
func TestNeedCoversAllTables(t *testing.T) {
	r := newSpaceGuard(t.TempDir(), smallMemtable, 0)
	require.EqualValues(t, int64(1<<40), r.need(1<<40)-r.need(0))
}

// A probe would take the space from a table that is being written. So there is none then; what the
// last one found holds, but not into a third log.
func TestNoProbeWhileTablesAreWritten(t *testing.T) {
	db, err := Open(t.TempDir(), Options{memTableSize: smallMemtable, noCompactors: true})
	require.NoError(t, err)
	var left atomic.Int64
	var probes atomic.Int64
	left.Store(1 << 40)
	probeAgain := func() { db.space.probed = time.Time{} }
	probeAgain()
	db.space.probe = func(_ string, size int64) error {
		probes.Add(1)
		if size > left.Load() {
			return syscall.EDQUOT
		}
		return nil
	}
	revision := uint64(0)
	put := func() error {
		err := db.Apply(t.Context(), change("k", strings.Repeat("v", 10_000), revision))
		if err == nil {
			revision++
		}
		return err
	}
	require.NoError(t, put())
	require.EqualValues(t, 1, probes.Load())
	now := db.compactions.begin(0)
	db.compactions.active.Store(now)
	for log := db.space.log; db.space.log < log+2; {
		require.NoError(t, put())
	}
	require.EqualValues(t, 1, probes.Load(), "there is a compaction")
	told := make(chan error, 1)
	go func() { told <- put() }()
	select {
	case err := <-told:
		require.Fail(t, "it did not wait", "%v", err)
	case <-time.After(50 * time.Millisecond):
	}
	left.Store(0)
	db.compactions.finish(now)
	now.release()
	require.ErrorIs(t, <-told, backend.ErrFull)
	require.Greater(t, probes.Load(), int64(1))

	left.Store(1 << 40)
	require.NoError(t, put())
	before := probes.Load()
	probeAgain()
	// As if there were a log whose table is being made.
	require.NoError(t, os.WriteFile(db.space.path(99), nil, 0o600))
	require.NoError(t, put())
	require.Equal(t, before, probes.Load(), "a table is being flushed")
	require.NoError(t, os.Remove(db.space.path(99)))
	require.NoError(t, put())
	require.Greater(t, probes.Load(), before)

	db.space.logs = 2
	probeAgain()
	db.compactions.active.Store(db.compactions.begin(0))
	failed := errors.New("as if")
	db.compactions.waiting.Store(&failed)
	require.ErrorIs(t, put(), failed, "it does not wait for a compaction that waits for space")
	db.compactions.waiting.Store(nil)
	now = db.compactions.active.Load()
	db.compactions.finish(now)
	now.release()
	require.NoError(t, db.Close())
}

// Where space cannot be reserved in the log, urgent changes need what Badger needs.
func TestQuotaWithoutAReserve(t *testing.T) {
	db := open(t, t.TempDir())
	left := db.space.need(db.space.tables())
	db.space.allocated, db.space.copies = false, true
	db.space.probe = func(_ string, size int64) error {
		if size > left {
			return syscall.EDQUOT
		}
		return nil
	}
	defer func() { db.space.probe = fsys.Probe }()
	urgent := change("k", "v", 0)
	urgent.Restricts = true
	require.NoError(t, db.Apply(t.Context(), urgent))
	left--
	urgent.Expect = 1
	require.ErrorIs(t, db.Apply(t.Context(), urgent), backend.ErrFull)
}

// Badger has only the text of an error of the operating system.
func TestAsFull(t *testing.T) {
	for _, cause := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		for _, err := range []error{
			&os.PathError{Op: "open", Path: "p", Err: cause},
			errors.New("badger: " + cause.Error()),
		} {
			full := asFull(err)
			require.ErrorIs(t, full, backend.ErrFull)
			require.ErrorIs(t, full, syscall.ENOSPC)
			require.ErrorIs(t, full, cause)
			require.ErrorIs(t, full, err)
			require.EqualError(t, full, err.Error())
		}
	}
	require.NoError(t, asFull(nil))
	for _, err := range []error{syscall.EIO, backend.ErrFull, backend.ErrLocked} {
		require.Equal(t, err, asFull(err))
	}
}

// A group may hold urgent changes and others.
func TestFullDiskWithinAGroup(t *testing.T) {
	db := open(t, t.TempDir())
	db.space.disk = func(string) (int64, int64, bool) { return db.space.memtable, 1 << 30, true }
	defer func() { db.space.disk = fsys.Disk }()
	requestOf := func(key string, urgent bool) *request {
		c := change(key, "v", 0)
		c.Restricts = urgent
		r := &request{changes: []backend.Change{c}}
		require.NoError(t, r.check(db))
		return r
	}
	usual, urgent, conflicting := requestOf("a", false), requestOf("b", true), requestOf("b", true)
	require.NoError(t, db.commit([]*request{usual, urgent, conflicting}))
	require.ErrorIs(t, usual.err, backend.ErrFull)
	require.NoError(t, urgent.err)
	require.ErrorIs(t, conflicting.err, backend.ErrConflict)
	require.Equal(t, map[string]string{"b": "v"}, read(t, db))
}

// A copy that cannot be written poisons as Badger's own commit does, and so does what Badger
// reports from the background.
func TestErrorsThatStopTheDB(t *testing.T) {
	for name, harm := range map[string]func(db *DB){
		"LAST cannot be written": func(db *DB) {
			require.NoError(t, db.commitFile.Close())
		},
		"Badger cannot write a table": func(db *DB) {
			logger{to: quiet, db: db}.Errorf("error flushing memtable to disk: %v, retrying",
				errors.New("input/output error"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			db, err := Open(dir, Options{})
			require.NoError(t, err)
			require.NoError(t, db.Apply(t.Context(), change("k", "old", 0)))
			harm(db)
			require.ErrorIs(t, db.Apply(t.Context(), change("k", "new", 1)), backend.ErrFailed)
			_, err = db.Get(t.Context(), []byte("k"))
			require.ErrorIs(t, err, backend.ErrFailed)
			_ = db.Close() // LAST is closed already

			_, err = open(t, dir).Get(t.Context(), []byte("k"))
			require.NoError(t, err, "reopening recovers")
		})
	}
}

// Commits that are made again when the directory is opened take their room in the log too.
func TestSpaceAfterRedo(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	put := func(db *DB, from int) error {
		var changes []backend.Change
		for i := range 3 {
			c := change(fmt.Sprint("k", from+i), strings.Repeat("v", 32<<10), 0)
			c.Restricts = true
			changes = append(changes, c)
		}
		return db.Apply(t.Context(), changes...)
	}
	for i := range 4 {
		require.NoError(t, put(db, 10*i))
	}
	f := fixture{dir: filepath.Join(t.TempDir(), "crash")}
	copyDir(t, dir, f.dir)
	require.NoError(t, db.Close())
	log := f.file(t, "*.mem")
	require.NoError(t, os.Truncate(log, logEnd(t, log)-110_000)) // more than the last commit

	db, err = Open(f.dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	defer db.Close()
	require.Len(t, read(t, db), 12)
	number, free := db.space.log, int64(0)
	if !db.space.allocated { // the file system cannot: then the log may use what is spare
		free = db.space.memtable
	}
	db.space.disk = func(string) (int64, int64, bool) { return free, 1 << 30, true }
	for n := 10; err == nil; n++ {
		require.Less(t, n, 100, "it goes on for ever")
		err = put(db, 10*n)
	}
	require.ErrorIs(t, err, backend.ErrFull)
	require.Equal(t, number, db.space.log, "Badger was never made to begin another log")
	db.space.disk = fsys.Disk
}

// A log can be opened with the memtable that is chosen for it, be its entries large or small.
func TestSmallMemtables(t *testing.T) {
	small := func(string) (int64, int64, bool) { return smallDisk / 2, smallDisk - 1, true }
	large := func(string) (int64, int64, bool) { return smallDisk, smallDisk, true }
	unknown := func(string) (int64, int64, bool) { return 0, 0, false }
	unlimited := func(string, int64) error { return nil }
	quota := func(_ string, size int64) error { return syscall.EDQUOT }
	for name, value := range map[string]string{
		"small values": "v", "usual values": strings.Repeat("v", 300),
	} {
		dir := t.TempDir()
		db, err := Open(dir, Options{memTableSize: usualMemtable})
		require.NoError(t, err)
		chosen := int64(smallMemtable)
		for n := 0; chosen == smallMemtable; n++ {
			crash := filepath.Join(t.TempDir(), "crash")
			copyDir(t, dir, crash)
			s, err := survey.Read(crash)
			require.NoError(t, err)
			require.Len(t, s.Logs, 1)
			chosen = memtableFor(small, unlimited, crash, s.Logs[0].Memory)
			require.EqualValues(t, usualMemtable,
				memtableFor(large, unlimited, crash, s.Logs[0].Memory))
			require.Equal(t, chosen, memtableFor(large, quota, crash, s.Logs[0].Memory))
			require.EqualValues(t, usualMemtable,
				memtableFor(unknown, unlimited, crash, s.Logs[0].Memory))
			if s.Logs[0].Memory > smallMemtable {
				db, err := Open(crash, Options{memTableSize: chosen}) // or Badger ends the process
				require.NoError(t, err, name)
				require.NoError(t, db.Close())
			}
			for i := range 16 {
				var changes []backend.Change
				for j := range backend.MaxChanges {
					changes = append(changes, change(fmt.Sprintf("%016d", n<<16|i<<8|j), value, 0))
				}
				require.NoError(t, db.Apply(t.Context(), changes...))
			}
		}
		require.NoError(t, db.Close())
	}
}
