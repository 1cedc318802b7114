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
// saysFailed and saysVain must match the format strings in Badger's levels.go and db.go exactly,
// with the types of the arguments and the goroutines that log the texts. If only the text of Added
// changes, done stops the DB. If only the text of DONE changes, reads wait without end. If both
// texts change, compactions run unwatched. So compare the texts at each upgrade of Badger, and run
// compaction_test.go.
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
//	wait for builders     log Added -> added:                       read
//	     :                  wait until Badger is                    vouch: no delete in the
//	     :                    open (ready or vain)                  manifest, so the read
//	     :                  wait for the compaction                 is answered
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
//	  delete old                                                    vouch: the manifest has
//	use the new tables                                                a delete: wait for the
//	drop the old tables                                               channel compaction.done
//	  (pinned: files stay)                                               :
//	     |                                                               :
//	log DONE -> done:                                                    :
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
//     hold has a reference to each table. After a compaction that was not whole, no table is
//     deleted any more, and the DB serves nothing. The next Open finds the entries that the
//     manifest has lost, and restores order (checkOrphans of package survey).
//     A compaction waits before its first table until there is space for all of its tables.
//  3. A read is not answered while the read may have seen the tables of a compaction that was not
//     found whole yet.
type compactions struct {
	db    *DB
	ready chan struct{} // closed when db.badger is set
	vain  chan struct{} // closed when Badger cannot be opened

	// room is a copy of db.room. Only the fields that do not change are used.
	room    room
	waiting atomic.Pointer[error] // why a compaction waits for space; nil: no compaction waits
	closing atomic.Bool           // Badger is being closed
	// probing is held during a probe of room, to set now to a compaction, and at the end of a
	// compaction until the old tables are removed.
	probing sync.Mutex

	mu   sync.Mutex
	over sync.Cond // signals that now has become nil
	now  atomic.Pointer[compaction]
}

// A compaction is the state of the compaction that is running.
type compaction struct {
	by      int             // the number of Badger's compactor
	before  map[uint64]bool // the tables at the beginning
	newest  uint64          // the highest version in the tables of before
	tables  int             // the number of tables that the compaction makes
	keys    uint64          // the number of keys that go into the new tables
	release func()          // unpins the tables of before; nil: the compaction has no hold

	manifest os.FileInfo
	without  atomic.Int64 // the manifest holds no delete record before this offset
	done     chan struct{}
}

// THESE TEXTS ARE LOG FORMATS OF BADGER v4.9 (levels.go and db.go), AND MUST MATCH EXACTLY: see
// compactions.
const (
	saysAdded  = "[%d] LOG Compact. Added %d keys. Skipped %d keys. Iteration took: %v"
	saysDone   = "[Compactor: %d] Compaction for level: %d DONE"
	saysFailed = "[Compactor: %d] LOG Compact FAILED with error: %+v: %+v"
	saysVain   = "Received err: %v. Cleaning up..."
)

func newCompactions(db *DB) *compactions {
	c := &compactions{db: db, ready: make(chan struct{}), vain: make(chan struct{})}
	c.over.L = &c.mu
	return c
}

// The logger calls this method for each message of Badger except Infof messages, on the goroutine
// of Badger that logs.
func (c *compactions) hear(format string, args []any) {
	compactor := func() int {
		by, _ := args[0].(int)
		return by
	}
	switch format {
	case saysAdded:
		keys, _ := args[1].(uint64)
		c.added(compactor(), keys)
	case saysDone:
		c.done(compactor())
	case saysFailed:
		c.failed(compactor())
	case saysVain:
		close(c.vain)
	}
}

// added counts a table that Badger is about to make. For the first table of a compaction, added
// first waits for the compaction of another compactor to end, and for space.
func (c *compactions) added(by int, keys uint64) {
	select {
	case <-c.ready:
	case <-c.vain:
		// Badger cannot be opened, and waits for its compactions before Badger returns the error.
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.now.Load() != nil && c.now.Load().by != by {
		c.over.Wait()
	}
	now := c.now.Load()
	if now == nil {
		c.awaitSpace()
		now = c.begin(by)
		c.probing.Lock()
		c.now.Store(now)
		c.probing.Unlock()
	}
	if keys > 0 {
		now.tables++
		now.keys += keys
	}
}

// awaitSpace waits until there is space for a compaction. Without the space, a compaction would end
// the process. During the wait Badger serves as before, and Close returns ErrFull. If Badger is
// being closed already, awaitSpace stops the DB, so that Close gives up.
func (c *compactions) awaitSpace() {
	defer c.waiting.Store(nil)
	for err := c.room.toCompact(); err != nil; err = c.room.toCompact() {
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
	if c.now.Load() != nil {
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
func (c *compactions) begin(by int) *compaction {
	now := &compaction{by: by, before: make(map[uint64]bool), release: c.db.hold(), done: make(chan struct{})}
	for _, t := range c.db.badger.Tables() {
		now.before[t.ID] = true
		now.newest = max(now.newest, t.MaxVersion)
	}
	if info, err := os.Stat(c.db.manifest()); err == nil {
		now.manifest = info
		now.without.Store(info.Size())
	}
	return now
}

// done checks that the compaction has made every table and every key that Badger has logged as
// Added. If a table is missing, done stops the DB. Otherwise done unpins the old tables.
func (c *compactions) done(by int) {
	now := c.now.Load()
	if now == nil || now.by != by {
		c.db.fail("compact", errors.New("a compaction went unwatched: this version of Badger is not known"))
		return
	}
	for _, t := range c.db.badger.Tables() {
		if !now.before[t.ID] && t.MaxVersion <= now.newest {
			now.tables--
			now.keys -= uint64(t.KeyCount)
		}
	}
	if now.tables != 0 || now.keys != 0 {
		c.db.fail("compact", errors.New("a table could not be made"))
	}
	whole := c.db.failed.Load() == nil
	c.probing.Lock() // until the old tables are removed, because old tables take space
	defer c.probing.Unlock()
	c.end(now)
	if whole && now.release != nil {
		now.release()
	}
}

// failed stops the DB if the compaction may have written to the manifest. Other failures come
// before the first table, and are harmless.
func (c *compactions) failed(by int) {
	if now := c.now.Load(); now != nil && now.by == by {
		c.db.fail("compact", errors.New("the compaction failed"))
		c.end(now)
	}
}

func (c *compactions) end(now *compaction) {
	c.mu.Lock()
	c.now.Store(nil)
	c.mu.Unlock()
	c.over.Broadcast()
	close(now.done)
}

// vouch returns an error if the result of a read must not be trusted. Call vouch after the read. If
// the read may have seen new tables, vouch waits for the end of the compaction; see invariant 3.
func (c *compactions) vouch() error {
	if now := c.now.Load(); now != nil && now.committed(c.db.manifest()) {
		<-now.done
	}
	if err := c.db.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// committed reports whether the manifest names the new tables, or may name the new tables. Before
// the manifest names the new tables, no read sees the new tables.
func (now *compaction) committed(manifest string) bool {
	f, err := os.Open(manifest)
	if err != nil {
		return true
	}
	defer f.Close()
	info, err := f.Stat()
	// Badger replaces the manifest from time to time.
	if err != nil || !os.SameFile(info, now.manifest) {
		return true
	}
	from := now.without.Load()
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
	now.without.Store(info.Size())
	return false
}

// hold prevents the deletion of every table and log in the directory until the caller calls
// release. release is nil if Badger is being closed. In this case closeBadger has a hold already.
func (db *DB) hold() (release func()) {
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
