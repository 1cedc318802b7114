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

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// As the disk fills up, usual changes are refused first; urgent ones go on in the space that the log has already, until
// that is used up, with no byte left on the disk. Nothing is changed by what is refused, and all goes on when there is
// room again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	var free atomic.Int64
	db.room.disk = func(string) (int64, int64, bool) { return free.Load(), 1 << 30, true }
	put := func(key string, urgent bool) error {
		c := change(key, strings.Repeat("v", 1000), 0)
		c.Urgent = urgent
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
	free.Store(db.room.need(0) + db.room.memtable)
	ok("just enough", false)
	free.Add(-1)
	err = put("one byte less", false)
	require.ErrorIs(t, err, backend.ErrFull)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.NotErrorIs(t, err, backend.ErrFailed)
	require.ErrorContains(t, err, dir)
	ok("urgent", true)

	free.Store(0)
	if !db.room.allocated {
		t.Log("SKIPPED the reserve in the log: this file system cannot allocate space for a file")
		free.Store(db.room.memtable)
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

// A group may hold urgent changes and others.
func TestFullDiskWithinAGroup(t *testing.T) {
	db := open(t, t.TempDir())
	db.room.disk = func(string) (int64, int64, bool) { return db.room.memtable, 1 << 30, true }
	defer func() { db.room.disk = disk }()
	usual := &request{changes: []backend.Change{change("a", "v", 0)}}
	urgent := &request{changes: []backend.Change{change("b", "v", 0)}, urgent: true}
	conflicting := &request{changes: []backend.Change{change("b", "v", 0)}, urgent: true}
	require.NoError(t, db.commit([]*request{usual, urgent, conflicting}))
	require.ErrorIs(t, usual.err, backend.ErrFull)
	require.NoError(t, urgent.err)
	require.ErrorIs(t, conflicting.err, backend.ErrConflict)
	require.Equal(t, map[string]string{"b": "v"}, read(t, db))
}

// A copy that cannot be written poisons as Badger's own commit does, and so does what Badger reports from the background.
func TestWhatPoisons(t *testing.T) {
	for name, harm := range map[string]func(db *DB){
		"LAST cannot be written": func(db *DB) {
			require.NoError(t, db.last.file.Close())
		},
		"Badger cannot write a table": func(db *DB) {
			logger{to: quiet, db: db}.Errorf("error flushing memtable to disk: %v, retrying", errors.New("input/output error"))
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
func TestRoomAfterRedo(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	put := func(db *DB, from int) error {
		var changes []backend.Change
		for i := range 3 {
			c := change(fmt.Sprint("k", from+i), strings.Repeat("v", 32<<10), 0)
			c.Urgent = true
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
	number, free := db.room.log, int64(0)
	if !db.room.allocated { // the file system cannot: then the log may use what is spare
		free = db.room.memtable
	}
	db.room.disk = func(string) (int64, int64, bool) { return free, 1 << 30, true }
	for n := 10; err == nil; n++ {
		require.Less(t, n, 100, "it goes on for ever")
		err = put(db, 10*n)
	}
	require.ErrorIs(t, err, backend.ErrFull)
	require.Equal(t, number, db.room.log, "Badger was never made to begin another log")
	db.room.disk = disk
}

// A log can be opened with the memtable that is chosen for it, be its entries large or small.
func TestSmallMemtables(t *testing.T) {
	small := func(string) (int64, int64, bool) { return smallDisk / 2, smallDisk - 1, true }
	large := func(string) (int64, int64, bool) { return smallDisk, smallDisk, true }
	unknown := func(string) (int64, int64, bool) { return 0, 0, false }
	for name, value := range map[string]string{"small values": "v", "usual values": strings.Repeat("v", 300)} {
		dir := t.TempDir()
		db, err := Open(dir, Options{memTableSize: usualMemtable})
		require.NoError(t, err)
		chosen := int64(smallMemtable)
		for n := 0; chosen == smallMemtable; n++ {
			crash := filepath.Join(t.TempDir(), "crash")
			copyDir(t, dir, crash)
			s, err := surveyDir(crash)
			require.NoError(t, err)
			require.Len(t, s.logs, 1)
			chosen = memtableFor(small, crash, s.logs[0].memory)
			require.EqualValues(t, usualMemtable, memtableFor(large, crash, s.logs[0].memory))
			require.EqualValues(t, usualMemtable, memtableFor(unknown, crash, s.logs[0].memory))
			if s.logs[0].memory > smallMemtable {
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
