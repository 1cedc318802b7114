package badgerdb

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
)

// A compactions watches every compaction of Badger, and stops the DB if a compaction lost a table.
//
// WARNING: THE WATCH DEPENDS ON LOG TEXTS OF BADGER v4.9. The constants saysAdded, saysDone,
// saysFailed and saysOpenFailed must match the format strings in Badger's levels.go and db.go
// exactly, with the types of the arguments and the goroutines that log the texts. If only the text
// of Added changes, onDone stops the DB. If only the text of DONE changes, reads wait without end.
// If both texts change, compactions run unwatched. So compare the texts at each upgrade of Badger,
// and run compaction_test.go.
//
// A compaction writes new tables from old tables, replaces the old names in the manifest, and
// deletes the old files. Badger may be unable to make a table, for example because no file
// descriptor is free. Badger v4.9 then loses the error (an argument of a defer, in levels.go,
// subcompact) and continues without the table. The content of the table is lost, and older versions
// may reappear.
//
// Badger logs the number of keys for each table, before Badger makes the table, and logs DONE at
// the end. The logger runs on the goroutine of Badger that logs, so the logger can block a
// compaction:
//
//	compactor             subcompact               builder          reader, committer
//	(1 per compaction)    (1 per key range)        (1 per table)    (any number)
//	     |
//	start subcompacts --> collect keys in memory
//	wait for builders     log Added -> onTable:                     read
//	     :                  wait until Badger is                    waitVerified: no delete in
//	     :                    open (ready), or was not              the manifest, so the read
//	     :                    (openFailed)                          is answered
//	     :                  wait for the compaction
//	     :                    of another compactor
//	     :                  first table only:
//	     :                    wait for disk space
//	     :                    begin: list and pin
//	     :                    the old tables
//	     :                start a builder -------> write the
//	     :                next table, or end       new table
//	builders ended <------------------------------ end
//	     |
//	manifest: create new,                                           read
//	  delete old                                                    waitVerified: the manifest has
//	use the new tables                                                a delete: wait for the
//	drop the old tables                                               channel compaction.done
//	  (pinned: files stay)                                               :
//	     |                                                               :
//	log DONE -> onDone:                                                  :
//	  compare new tables                                                 :
//	    with Added                                                       :
//	  table missing: fail                                                :
//	  close compaction.done --------------------------------------> answer, or the error
//	  whole: unpin, so that                                           of a failed DB
//	    the old files go
//
// The invariants:
//
//  1. Compactions run one at a time. So from the first table of a compaction until DONE, every
//     table that appears or disappears belongs to that compaction, or is a flush. A flushed table
//     holds newer commits than any table before. (Open waits for the tables of the logs that Open
//     finds.)
//  2. No table is deleted before the compaction that replaced the table was found whole, because a
//     call of pinFiles has a reference to each table. After a compaction that was not whole, no
//     table is deleted any more, and the DB serves nothing. The next Open finds the entries that
//     the manifest has lost, and restores order (checkOrphans of package survey).
//     A compaction waits before its first table until there is space for all of its tables.
//  3. A read is not answered while the read may have seen the tables of a compaction that was not
//     found whole yet.
type compactions struct {
	db         *DB
	ready      chan struct{} // closed when db.badger is set
	openFailed chan struct{} // closed when Badger cannot be opened

	// space is a copy of db.space. Only the fields that do not change are used.
	space   spaceGuard
	waiting atomic.Pointer[error] // why a compaction waits for space; nil: no compaction waits
	closing atomic.Bool           // Badger is being closed
	// probing is held during a probe of space, to set active to a compaction, and at the end of a
	// compaction until the old tables are removed.
	probing sync.Mutex

	mu     sync.Mutex
	ended  sync.Cond // signals that active has become nil
	active atomic.Pointer[compaction]
}

// A compaction is the state of the compaction that is running.
type compaction struct {
	compactor int             // the number of Badger's compactor
	before    map[uint64]bool // the tables at the beginning
	newest    uint64          // the highest version in the tables of before
	tables    int             // the number of tables that the compaction makes
	keys      uint64          // the number of keys that go into the new tables
	release   func()          // unpins the tables of before; nil: the compaction has pinned nothing

	manifest        os.FileInfo
	manifestScanned atomic.Int64 // the manifest holds no delete record before this offset
	done            chan struct{}
}

// THESE TEXTS ARE LOG FORMATS OF BADGER v4.9 (levels.go and db.go), AND MUST MATCH EXACTLY: see
// compactions.
const (
	saysAdded      = "[%d] LOG Compact. Added %d keys. Skipped %d keys. Iteration took: %v"
	saysDone       = "[Compactor: %d] Compaction for level: %d DONE"
	saysFailed     = "[Compactor: %d] LOG Compact FAILED with error: %+v: %+v"
	saysOpenFailed = "Received err: %v. Cleaning up..."
)

func newCompactions(db *DB) *compactions {
	c := &compactions{db: db, ready: make(chan struct{}), openFailed: make(chan struct{})}
	c.ended.L = &c.mu
	return c
}

// onLog is called by the logger for each message of Badger except Infof messages, on the goroutine
// of Badger that logs.
func (c *compactions) onLog(format string, args []any) {
	compactor := func() int {
		number, _ := args[0].(int)
		return number
	}
	switch format {
	case saysAdded:
		keys, _ := args[1].(uint64)
		c.onTable(compactor(), keys)
	case saysDone:
		c.onDone(compactor())
	case saysFailed:
		c.onFailed(compactor())
	case saysOpenFailed:
		close(c.openFailed)
	}
}

// onTable counts a table that Badger is about to make. For the first table of a compaction, onTable
// first waits for the compaction of another compactor to end, and for space.
func (c *compactions) onTable(compactor int, keys uint64) {
	select {
	case <-c.ready:
	case <-c.openFailed:
		// Badger cannot be opened, and waits for its compactions before Badger returns the error.
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.active.Load() != nil && c.active.Load().compactor != compactor {
		c.ended.Wait()
	}
	active := c.active.Load()
	if active == nil {
		c.awaitSpace()
		active = c.begin(compactor)
		c.probing.Lock()
		c.active.Store(active)
		c.probing.Unlock()
	}
	if keys > 0 {
		active.tables++
		active.keys += keys
	}
}

// awaitSpace waits until there is space for a compaction. Without the space, a compaction would end
// the process. During the wait Badger serves as before, and Close returns ErrFull. If Badger is
// being closed already, awaitSpace stops the DB, so that Close gives up.
func (c *compactions) awaitSpace() {
	defer c.waiting.Store(nil)
	for err := c.space.toCompact(); err != nil; err = c.space.toCompact() {
		c.waiting.Store(&err)
		if c.closing.Load() {
			c.db.fail("compact", err)
		}
		time.Sleep(spaceEvery)
	}
}

// whileIdle calls f while Badger writes no tables. If Badger writes tables, whileIdle returns
// false. Only the committer may call whileIdle, or a caller after the end of the committer: a
// commit at the same time would begin another log.
func (c *compactions) whileIdle(f func()) bool {
	c.probing.Lock()
	defer c.probing.Unlock()
	if c.active.Load() != nil {
		return false
	}
	// Badger removes a log when the table of the log exists.
	if logs, err := badgerfile.FilesOf(c.db.dir, badgerfile.LogFiles); err == nil && len(logs) > 1 {
		return false
	}
	f()
	return true
}

// blocked returns why no compaction will end soon, or nil if there is no such reason.
func (c *compactions) blocked() error {
	if err := c.waiting.Load(); err != nil {
		return *err
	}
	if err := c.db.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// spaceEvery is the time between two checks of the disk while a compaction waits for space.
const spaceEvery = 100 * time.Millisecond

// begin pins the tables of Badger, and records the tables and the size of the manifest.
func (c *compactions) begin(compactor int) *compaction {
	active := &compaction{
		compactor: compactor,
		before:    make(map[uint64]bool),
		release:   c.db.pinFiles(),
		done:      make(chan struct{}),
	}
	for _, t := range c.db.badger.Tables() {
		active.before[t.ID] = true
		active.newest = max(active.newest, t.MaxVersion)
	}
	if info, err := os.Stat(c.db.manifest()); err == nil {
		active.manifest = info
		active.manifestScanned.Store(info.Size())
	}
	return active
}

// onDone checks that the compaction has made every table and every key that Badger has logged as
// Added. If a table is missing, onDone stops the DB. Otherwise onDone unpins the old tables.
func (c *compactions) onDone(compactor int) {
	active := c.active.Load()
	if active == nil || active.compactor != compactor {
		c.db.fail("compact", errors.New(
			"a compaction went unwatched: this version of Badger is not known"))
		return
	}
	for _, t := range c.db.badger.Tables() {
		if !active.before[t.ID] && t.MaxVersion <= active.newest {
			active.tables--
			active.keys -= uint64(t.KeyCount)
		}
	}
	if active.tables != 0 || active.keys != 0 {
		c.db.fail("compact", errors.New("a table could not be made"))
	}
	whole := c.db.failed.Load() == nil
	c.probing.Lock() // until the old tables are removed, because old tables take space
	defer c.probing.Unlock()
	c.finish(active)
	if whole && active.release != nil {
		active.release()
	}
}

// onFailed stops the DB if the compaction may have written to the manifest. Other failures come
// before the first table, and are harmless.
func (c *compactions) onFailed(compactor int) {
	if active := c.active.Load(); active != nil && active.compactor == compactor {
		c.db.fail("compact", errors.New("the compaction failed"))
		c.finish(active)
	}
}

func (c *compactions) finish(active *compaction) {
	c.mu.Lock()
	c.active.Store(nil)
	c.mu.Unlock()
	c.ended.Broadcast()
	close(active.done)
}

// waitVerified returns an error if the result of a read must not be trusted. Call waitVerified
// after the read. If the read may have seen new tables, waitVerified waits for the end of the
// compaction; see invariant 3.
func (c *compactions) waitVerified() error {
	if active := c.active.Load(); active != nil && active.committed(c.db.manifest()) {
		<-active.done
	}
	if err := c.db.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// committed reports whether the manifest names the new tables, or may name the new tables. Before
// the manifest names the new tables, no read sees the new tables.
func (c *compaction) committed(manifest string) bool {
	f, err := os.Open(manifest)
	if err != nil {
		return true
	}
	defer f.Close()
	info, err := f.Stat()
	// Badger replaces the manifest from time to time.
	if err != nil || !os.SameFile(info, c.manifest) {
		return true
	}
	from := c.manifestScanned.Load()
	if info.Size() == from {
		return false
	}
	if info.Size() < from {
		return true // the manifest has shrunk, so the offset is not valid any more
	}
	b := make([]byte, info.Size()-from)
	if _, err := f.ReadAt(b, from); err != nil {
		return true
	}
	if badgerfile.MayDelete(b) {
		return true
	}
	c.manifestScanned.Store(info.Size())
	return false
}

// pinFiles prevents the deletion of every table and log in the directory until the caller calls
// release. release is nil if Badger is being closed. In this case closeBadger has pinned the files
// already.
func (db *DB) pinFiles() (release func()) {
	defer func() {
		if recover() != nil { // Badger panics while Badger is being closed
			release = nil
		}
	}()
	txn := db.badger.NewTransactionAt(0, false)
	it := txn.NewIterator(badger.IteratorOptions{})
	return func() {
		it.Close()
		txn.Discard()
	}
}
