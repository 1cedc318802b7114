package badgerdb

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/bits"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Options are the settings of a DB.
type Options struct {
	Logger *slog.Logger // told what Badger has to say; nil means silence

	// Recover opens a damaged directory with what is left of it; nil means that Open refuses,
	// unless it is certain that nothing is lost. It is told what was damaged and what is left, by
	// an error that wraps ErrCorrupt. A panic in it is an error of Open's. Where it has not
	// returned, because of that or of a crash, the next Open calls it again.
	Recover func(lost error)

	// MustExist makes Open refuse a directory that is missing, and one that is empty, as the mount
	// point of a volume that is not mounted, instead of making a store there. The error matches
	// fs.ErrNotExist.
	MustExist bool

	// Failed is told that the DB has stopped for good, by whichever goroutine finds out: Badger's too, while nobody
	// asks for anything. It should be quick. Nil means nobody.
	Failed func(error)

	memTableSize int64             // for tests; 0 outside, which means that it depends on the disk
	noCompactors bool              // for tests: Badger compacts nothing
	crash        func(step string) // for tests; called after each step of a recovery; nil outside
}

var quiet = slog.New(slog.DiscardHandler)

// How many commits go by between two attempts to let Badger drop old versions, and the most requests in a group.
const (
	discardEvery = 256
	maxGroup     = 512
)

// level0Stall is how many tables there may be in Badger's level 0 before the next one waits for a compaction.
const level0Stall = 8

// Open opens the directory, and creates it if need be. What becomes of a directory:
//
//	missing, or empty    a new store is made, or refused with fs.ErrNotExist; see Options.MustExist
//	a store's            it is opened. Files of others in it are left alone
//	a damaged store's    see Options.Recover
//	anything else        it is refused, and not touched. Tables without a LAST, in which no head of
//	                     a store is found, are another program's
//
// The directory, once it is the store's, has mode 0700. The error wraps backend.ErrLocked if the
// directory is open elsewhere, backend.ErrCorrupt, which says what is damaged, or backend.ErrFull,
// with syscall.EDQUOT if a quota is the reason; errors of the operating system match as they do. On
// a 32-bit system the error wraps errors.ErrUnsupported: see errWordSize.
func Open(dir string, opts Options) (*DB, error) {
	if bits.UintSize < 64 {
		return nil, errWordSize
	}
	db, err := openDir(dir, opts)
	return db, asFull(err)
}

// On a 32-bit system Badger damages its tables: the allocator of its table builder (z.Allocator.Allocate of ristretto, up to
// v2.4.2 at least) shifts an int by 32 bits. When its first buffer is full it begins that again, and writes over blocks
// that are there already: a table lacks entries, and neither Badger nor the checksum of the table says so.
var errWordSize = fmt.Errorf("a directory cannot hold a store on a 32-bit system, where Badger damages its tables: "+
	"use keystore.New with a backend of your own: %w", errors.ErrUnsupported)

func openDir(dir string, opts Options) (_ *DB, err error) {
	if opts.Logger == nil {
		opts.Logger = quiet
	}
	if dir == "" {
		return nil, errors.New("the directory has no name: pass one that is the store's own")
	}
	dir, err = filepath.Abs(dir) // the process may go elsewhere
	if err != nil {
		return nil, err
	}
	lock, err := enter(dir, opts.MustExist)
	if err != nil {
		return nil, explain(dir, err)
	}
	db := &DB{
		dir:     dir,
		lock:    lock,
		queue:   make(chan *request),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	isOpen := false
	defer func() { // also if Options.Recover ends the goroutine
		if !isOpen {
			err = errors.Join(err, db.release())
		}
	}()
	r, err := db.open(opts)
	if err == nil && r != nil {
		if err = r.tell(opts); err == nil {
			err = r.discard()
		}
	}
	if err != nil {
		return nil, explain(dir, err)
	}
	isOpen = true
	go db.committer()
	db.tell.Store(&opts.Failed)
	if err := db.failed.Load(); err != nil {
		db.tellFailure(*err)
	}
	return db, nil
}

// open surveys the directory, and has Badger open it if nothing is lost, or if what is left is to
// be recovered. It returns the recovery that has replaced the files, and that has not been told
// yet.
func (db *DB) open(opts Options) (*recovery, error) {
	c, err := listDir(db.dir)
	if err != nil {
		return nil, err
	}
	if !c.last && len(c.badger) == 0 && len(c.recoveries) == 0 && c.foreign != "" {
		return nil, notAStore(db.dir, c.foreign, othersFile)
	}
	if err := c.mayWrite(db.dir); err != nil {
		return nil, err
	}
	r, at, err := begunRecovery(db.dir, c.recoveries)
	if err != nil {
		return nil, err
	}
	if r != nil {
		r.crash = opts.crash
		if err := r.refuse(db.dir, opts); err != nil {
			return nil, err
		}
		if at == begun {
			if err := r.replace(db.dir, db.claim); err != nil {
				return nil, err
			}
		}
		if c, err = listDir(db.dir); err != nil {
			return nil, err
		}
	}
	var slots []slot
	kind := lastBlank
	if c.last {
		if db.last, err = openLast(db.dir); err != nil {
			return nil, err
		}
		if slots, kind, err = db.last.slots(); err != nil {
			return nil, err
		}
	}
	s, err := surveyDir(db.dir)
	if err != nil {
		return nil, err
	}
	isNew := false
	if kind != lastOurs && s.head.seq == 0 { // nothing here is a store's
		switch {
		case kind == lastUnknown:
			return nil, notAStore(db.dir, lastName, othersFile)
		case len(c.badger) > 0:
			return nil, notAStore(db.dir, c.badger[0], othersDatabase)
		case c.foreign != "":
			return nil, notAStore(db.dir, c.foreign, othersFile)
		case opts.MustExist:
			return nil, noStore(db.dir, "the directory is empty")
		}
		isNew = true
	}
	if s.foreign != "" {
		return nil, fmt.Errorf("%w: %s: %s: %w", backend.ErrCorrupt, db.dir, s.foreign, errForeign)
	}
	if c.inTheWay != "" {
		return nil, fmt.Errorf("%s holds %s, which Badger would take for a file of its own: "+
			"move that file elsewhere", db.dir, c.inTheWay)
	}
	var inLogs, largest int64
	for _, l := range s.logs {
		inLogs += l.end
		largest = max(largest, l.memory)
	}
	db.room = newRoom(db.dir, opts.memTableSize, largest)
	if err := db.room.toOpen(inLogs); err != nil {
		return nil, err
	}
	if isNew {
		if err := db.claim(); err != nil {
			return nil, err
		}
		err := db.last.close() // a blank one
		if err != nil {
			return nil, err
		}
		var first slot
		if db.last, first, err = beginLast(db.dir); err != nil {
			return nil, err
		}
		slots = append(slots, first)
		opts.Logger.Info("made a new API key store", "dir", db.dir)
	}
	absent := error(nil)
	switch {
	case c.data != "" && !c.last && !isNew:
		absent = missing(db.dir, c.data, lastName)
	case c.data != "" && !c.manifest:
		absent = missing(db.dir, c.data, badger.ManifestFilename)
	}
	if absent != nil && opts.Recover == nil {
		return nil, absent
	}
	redo, err := s.reconcile(slots)
	if err = cmp.Or(absent, err); err != nil {
		return db.damaged(s, slots, r, opts, err)
	}
	if err := db.claim(); err != nil {
		return nil, err
	}
	if err := discardUnfinished(db.dir, c.recoveries, slots[0].store); err != nil {
		return nil, err
	}
	if err := s.tidy(); err != nil {
		return nil, fmt.Errorf("%s cannot be written to, as a store must, also to be read: %w", db.dir, err)
	}
	db.compactions = newCompactions(db)
	// While it is opened there is no compaction, for which Badger would wait once it had so many tables in level 0.
	options := db.options(opts).WithNumLevelZeroTablesStall(level0Stall + s.level0 + len(s.logs))
	if db.badger, err = badger.OpenManaged(options); err != nil {
		db.badger = nil
		return nil, openError(db.dir, err)
	}
	if err := db.awaitTables(s.logs); err != nil {
		return nil, err
	}
	db.compactions.room = db.room
	db.room.idle, db.room.busy = db.compactions.whileIdle, db.compactions.blocked
	close(db.compactions.ready)
	db.keep = db.last.write
	if err := db.settle(s, slots, redo); err != nil {
		if closeErr := db.closeBadger(); closeErr != nil {
			return nil, errors.Join(err, closeErr)
		}
		db.badger = nil
		return db.damaged(s, slots, r, opts, err)
	}
	return r, db.room.opened(db.last.reserve())
}

// awaitTables waits until Badger has made tables of the logs that it found. A log may have a table already, if the process
// ended before it was removed: its second one has nothing newer, and a compaction would take that for its own.
func (db *DB) awaitTables(logs []logFile) error {
	for _, l := range logs {
		for l.last > 0 { // tidy has removed the others
			if _, err := os.Stat(filepath.Join(db.dir, l.name)); errors.Is(err, fs.ErrNotExist) {
				break
			}
			if err := db.failed.Load(); err != nil {
				return *err
			}
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}

// damaged returns the error, or opens what is left: if it is to, and tells what is lost, or if that is nothing.
//
// All may be there though Badger would not find it: after an error in writing its manifest, Badger goes on with another
// table of the same content, and removes the one that the manifest names. The count of the entries and the sum of their
// checksums, which LAST has, prove that all is there, as it was.
//
// An earlier recovery that nobody has been told of yet is told together with the new one.
func (db *DB) damaged(s *survey, slots []slot, earlier *recovery, opts Options, damage error) (
	*recovery, error) {
	if !errors.Is(damage, backend.ErrCorrupt) || db.salvaged {
		return nil, damage
	}
	if opts.Recover != nil {
		if err := db.claim(); err != nil {
			return nil, err
		}
	}
	if earlier != nil {
		damage = errors.Join(&plainError{earlier.Lost, backend.ErrCorrupt}, damage)
	}
	r, err := db.salvage(s, slots, opts, damage)
	switch {
	case err == nil && !r.Whole && opts.Recover == nil:
		return nil, errors.Join(damage, r.discard())
	case errors.Is(err, errForeign):
		return nil, errors.Join(damage, err)
	case err != nil && opts.Recover == nil:
		return nil, damage
	case err != nil:
		return nil, fmt.Errorf("%s cannot be recovered: %w", db.dir, err)
	}
	err = db.last.close()
	db.last = nil
	if err := errors.Join(err, r.replace(db.dir, db.claim)); err != nil {
		return nil, err
	}
	if earlier != nil { // the new recovery tells of both from here on
		if err := earlier.discard(); err != nil {
			return nil, err
		}
	}
	db.salvaged = true
	db.failed.Store(nil) // what Badger could not open
	return db.open(opts)
}

func (db *DB) options(opts Options) badger.Options {
	compactors := 2
	if opts.noCompactors {
		compactors = 0
	}
	return badger.DefaultOptions(db.dir).
		WithSyncWrites(true).
		WithMemTableSize(db.room.memtable).
		// In Badger's own proportions, so that a compaction of small memtables' tables is no larger than room says.
		WithBaseTableSize(db.room.memtable / 4).
		WithBaseLevelSize(db.room.memtable * 5 / 4).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(level0Stall).
		WithNumCompactors(compactors).
		WithValueLogFileSize(1 << 20).
		WithValueThreshold(64 << 10).
		// Digests do not compress. Uncompressed tables are read in place, and need no cache.
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		// The survey has checked the tables. See the package's comment on what Badger makes of a damaged block.
		WithChecksumVerificationMode(options.NoVerification).
		WithMetricsEnabled(false).
		WithDetectConflicts(false). // there is one writer
		WithNumVersionsToKeep(1).
		WithBypassLockGuard(true). // this package holds Badger's lock
		WithLogger(logger{opts.Logger, db, db.compactions})
}

// settle brings Badger to where the last commits are, and last to where Badger is.
func (db *DB) settle(s *survey, slots, redo []slot) error {
	// The entries of files that Badger has just made may not be durable yet.
	if err := syncDir(db.dir); err != nil {
		return err
	}
	if got := db.badger.MaxVersion(); got != s.head.seq {
		return s.corrupt(fmt.Errorf("badger opened it at commit %d, and not at %d", got, s.head.seq))
	}
	db.durable.Store(s.head.seq)
	if db.head = s.head; s.head.seq == 0 {
		db.head = head{store: slots[0].store}
	}
	for _, commit := range redo {
		if err := db.redo(commit); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(slots, func(s slot) bool { return s.seq == db.head.seq }) {
		return nil
	}
	// Its copy was not finished. The next commit goes over the only one that is whole.
	return db.last.write(slot{head: db.head, writes: s.writes})
}

// redo makes a commit again that Badger has lost.
func (db *DB) redo(commit slot) error {
	txn := db.badger.NewTransactionAt(db.durable.Load(), true)
	defer txn.Discard()
	for _, w := range commit.writes {
		if err := txn.SetEntry(badger.NewEntry(w.key, w.value)); err != nil {
			return fmt.Errorf("badgerdb: make commit %d again: %w", commit.seq, err)
		}
	}
	if err := db.make(txn, commit); err != nil {
		return err
	}
	db.room.use(commit.writes)
	return nil
}

// headAt returns the head of the commit that txn reads at.
func headAt(txn *badger.Txn) (head, error) {
	item, err := txn.Get(headKey)
	if err != nil {
		return head{}, fmt.Errorf("the head: %w", err)
	}
	value, err := item.ValueCopy(nil)
	if err != nil {
		return head{}, fmt.Errorf("the head: %w", err)
	}
	h, ok := parseHead(value)
	if !ok || h.seq != txn.ReadTs() {
		return head{}, fmt.Errorf("the head is not that of commit %d", txn.ReadTs())
	}
	return h, nil
}
