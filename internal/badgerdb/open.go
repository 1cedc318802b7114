package badgerdb

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
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

	// Recover opens a damaged directory with what is left of it; nil means that Open refuses, unless it is certain that
	// nothing is lost. It is told what was damaged and what is left, by an error that wraps ErrCorrupt.
	Recover func(lost error)

	// Failed is told that the DB has stopped for good, by whichever goroutine finds out: Badger's too, while nobody
	// asks for anything. It should be quick. Nil means nobody.
	Failed func(error)

	memTableSize int64 // for tests; 0 outside, which means that it depends on the disk
}

var quiet = slog.New(slog.DiscardHandler)

// How many commits go by between two attempts to let Badger drop old versions, and the most requests in a group.
const (
	discardEvery = 256
	maxGroup     = 512
)

// level0Stall is how many tables there may be in Badger's level 0 before the next one waits for a compaction.
const level0Stall = 8

// Open opens the directory, and creates it if need be; see prepare for what it must be like. The error wraps
// backend.ErrLocked if it is open elsewhere, backend.ErrCorrupt, which says what is damaged, or backend.ErrFull.
func Open(dir string, opts Options) (*DB, error) {
	if opts.Logger == nil {
		opts.Logger = quiet
	}
	if dir == "" {
		return nil, errors.New("the directory has no name: pass one that is the store's own")
	}
	dir, err := filepath.Abs(dir) // the process may go elsewhere
	if err != nil {
		return nil, err
	}
	if err := prepare(dir); err != nil && !(opts.Recover != nil && errors.Is(err, backend.ErrCorrupt)) {
		return nil, err
	}
	l, err := openLast(dir)
	if errors.Is(err, backend.ErrLocked) {
		return nil, locked(dir)
	}
	if err != nil {
		return nil, err
	}
	db := &DB{
		dir:     dir,
		last:    l,
		keep:    l.write,
		queue:   make(chan *request),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	if err := db.open(opts); err != nil {
		return nil, errors.Join(err, l.close())
	}
	go db.committer()
	db.tell.Store(&opts.Failed)
	if err := db.failed.Load(); err != nil {
		db.tellFailure(*err)
	}
	return db, nil
}

// open surveys the directory, and has Badger open it if nothing is lost, or if what is left is to be recovered.
func (db *DB) open(opts Options) error {
	if recoverable(db.dir) {
		if err := moveRecovery(db.dir); err != nil {
			return err
		}
	}
	isRecovery := recoverable(db.dir)
	slots, err := db.last.slots()
	if err != nil {
		return err
	}
	s, err := surveyDir(db.dir)
	if err != nil {
		return err
	}
	var inLogs, largest int64
	for _, l := range s.logs {
		inLogs += l.end
		largest = max(largest, l.memory)
	}
	db.room = newRoom(db.dir, opts.memTableSize, largest)
	if err := db.room.toOpen(inLogs); err != nil {
		return err
	}
	if len(slots) == 0 && !s.used {
		first, err := db.last.begin(db.dir)
		if err != nil {
			return err
		}
		slots = append(slots, first)
		opts.Logger.Info("made a new API key store", "dir", db.dir)
	}
	var redo []slot
	if !isRecovery {
		redo, err = s.reconcile(slots)
	}
	if err != nil {
		return db.damaged(s, slots, opts, err)
	}
	if err := s.tidy(); err != nil {
		return fmt.Errorf("%s cannot be written to, as a store must, also to be read: %w", db.dir, err)
	}
	db.compactions = newCompactions(db)
	// While it is opened there is no compaction, for which Badger would wait once it had so many tables in level 0.
	options := db.options(opts).WithNumLevelZeroTablesStall(level0Stall + s.level0 + len(s.logs))
	if db.badger, err = badger.OpenManaged(options); err != nil {
		return openError(db.dir, err)
	}
	if err := db.awaitTables(s.logs); err != nil {
		return errors.Join(err, db.closeBadger())
	}
	close(db.compactions.ready)
	if isRecovery {
		err = db.adopt()
	} else {
		err = db.settle(s, slots, redo)
	}
	if err == nil {
		return db.room.opened(db.last.reserve())
	}
	err = errors.Join(err, db.closeBadger())
	if isRecovery {
		return err
	}
	return db.damaged(s, slots, opts, err)
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
func (db *DB) damaged(s *survey, slots []slot, opts Options, damage error) error {
	if !errors.Is(damage, backend.ErrCorrupt) {
		return damage
	}
	whole, lost, err := db.salvage(s, slots, opts, damage)
	if err == nil && !whole && opts.Recover == nil {
		return errors.Join(damage, os.RemoveAll(filepath.Join(db.dir, recovering)))
	}
	if err != nil && opts.Recover == nil {
		return damage
	}
	if err != nil {
		return fmt.Errorf("%s cannot be recovered: %w", db.dir, err)
	}
	if err := keepRecovery(db.dir); err != nil {
		return err
	}
	db.failed.Store(nil) // what Badger could not open
	if err := db.open(opts); err != nil {
		return err
	}
	if opts.Recover != nil {
		opts.Recover(lost)
	} else {
		opts.Logger.Warn("API key store found its directory damaged, and nothing lost: it has been put in order", "error", lost)
	}
	return nil
}

func (db *DB) options(opts Options) badger.Options {
	return badger.DefaultOptions(db.dir).
		WithSyncWrites(true).
		WithMemTableSize(db.room.memtable).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(level0Stall).
		WithNumCompactors(2).
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

// storedHead returns the head that Badger has.
func (db *DB) storedHead() (head, error) {
	seq := db.durable.Load()
	if seq == 0 {
		return head{}, nil
	}
	txn := db.badger.NewTransactionAt(seq, false)
	defer txn.Discard()
	return headAt(txn)
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
