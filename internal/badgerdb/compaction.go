package badgerdb

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/pb"
	"google.golang.org/protobuf/proto"
)

// A compaction of Badger's makes new tables of some that there are, names them in the manifest in the place of those, and
// deletes those. Where it cannot make one, for want of a file descriptor for example, Badger v4.9 loses the error (it is an
// argument of a defer, in levels.go, subcompact) and goes on without the table: what was in it is gone, and older versions
// may come to light.
//
// So each compaction is watched. Badger tells its logger of it, and does so on the goroutine that compacts: how many keys
// go into a table, before it makes that, and when all is done. The invariants:
//
//  1. From the first table of a compaction until it is done there is no other: what comes and goes are its own tables, but
//     for those that are flushed, which hold newer commits than any table before. (Open waits for what it finds in logs.)
//  2. No table is deleted before the compaction that has replaced it has been found to be whole, because a hold has a
//     reference to each. After one that was not, none is deleted any more, and nothing is served: Open finds what the
//     manifest has forgotten, and puts it in order (survey.forgotten).
//     A compaction waits before its first table until there is space for all of its tables.
//  3. A read is not answered while it may have seen the tables of a compaction that is not found to be whole yet.
type compactions struct {
	db    *DB
	ready chan struct{} // closed when db.badger is set
	vain  chan struct{} // closed when it will not be

	room    room                  // a copy of the db's, of which it uses what does not change
	waiting atomic.Pointer[error] // why a compaction waits for space; nil: none does
	closing atomic.Bool           // Badger is being closed
	probing sync.Mutex            // held in a probe of room, when now is set, and until the old tables are removed

	mu   sync.Mutex
	over sync.Cond // that now has become nil
	now  atomic.Pointer[compaction]
}

// A compaction is one that is under way.
type compaction struct {
	by      int             // which of Badger's compactors it is
	before  map[uint64]bool // the tables that there were
	newest  uint64          // the highest version in them
	tables  int             // that it makes
	keys    uint64          // that go into them
	release func()          // what the hold of before needs to end; nil: there is none

	manifest os.FileInfo
	without  atomic.Int64 // up to this offset the manifest has no compaction
	done     chan struct{}
}

// What Badger says, by its format.
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

// hear is told of everything that Badger logs.
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

// added takes note of a table that is about to be made.
func (c *compactions) added(by int, keys uint64) {
	select {
	case <-c.ready:
	case <-c.vain: // Badger cannot be opened, and waits for its compactions before it says so
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

// awaitSpace returns when there is space for a compaction, which would end the process without. Meanwhile Badger serves as
// before, and Close returns ErrFull. If Badger is being closed already, awaitSpace stops the DB, so that Close gives up.
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

// whileIdle calls f while Badger writes no tables, or returns false. Only the committer calls it, and whoever has waited for
// the committer to end: a commit would begin another log.
func (c *compactions) whileIdle(f func()) bool {
	c.probing.Lock()
	defer c.probing.Unlock()
	if c.now.Load() != nil {
		return false
	}
	if logs, err := filesOf(c.db.dir, ".mem"); err == nil && len(logs) > 1 { // a log is removed when its table is there
		return false
	}
	f()
	return true
}

// blocked returns why no compaction will end soon, or nil.
func (c *compactions) blocked() error {
	if err := c.waiting.Load(); err != nil {
		return *err
	}
	if err := c.db.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// spaceEvery is how long a compaction waits between two looks at the disk.
const spaceEvery = 100 * time.Millisecond

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

// done looks whether what the compaction has made is all that it was to make.
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
	c.probing.Lock() // until the old tables are removed, which take space
	defer c.probing.Unlock()
	c.end(now)
	if whole && now.release != nil {
		now.release()
	}
}

// failed stops everything if the manifest may have been written to. Other failures are before the first table, and harmless.
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

// vouch is called after something was read, and returns an error if that must not be believed; see invariant 3.
func (c *compactions) vouch() error {
	if now := c.now.Load(); now != nil && now.committed(c.db.manifest()) {
		<-now.done
	}
	if err := c.db.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// committed reports whether the manifest names the new tables, or may do so: before it does, nobody sees them.
func (now *compaction) committed(manifest string) bool {
	f, err := os.Open(manifest)
	if err != nil {
		return true
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !os.SameFile(info, now.manifest) { // Badger writes it anew from time to time
		return true
	}
	from := now.without.Load()
	if info.Size() == from {
		return false
	}
	if info.Size() < from {
		return true // what was known of it is not so
	}
	b := make([]byte, info.Size()-from)
	if _, err := f.ReadAt(b, from); err != nil {
		return true
	}
	for rest := b; len(rest) > 0; {
		const header = 8 // length and checksum
		if len(rest) < header {
			return true
		}
		n := uint64(binary.BigEndian.Uint32(rest))
		if rest = rest[header:]; n > uint64(len(rest)) {
			return true
		}
		var set pb.ManifestChangeSet
		if proto.Unmarshal(rest[:n], &set) != nil {
			return true
		}
		for _, change := range set.Changes {
			if change.Op == pb.ManifestChange_DELETE {
				return true
			}
		}
		rest = rest[n:]
	}
	now.without.Store(info.Size())
	return false
}

// hold keeps every table and log that there is from being deleted, until release is called. It is nil if Badger is being
// closed; then there is one already.
func (db *DB) hold() (release func()) {
	defer func() {
		if recover() != nil { // Badger's way to say so
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
