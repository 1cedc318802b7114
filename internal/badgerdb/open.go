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

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/survey"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Options are the settings of a DB.
type Options struct {
	// Logger receives the log messages of Badger; nil means that nothing is logged.
	Logger *slog.Logger

	// Recover allows Open to recover a damaged directory even if data is lost. If Recover is nil,
	// Open refuses a damaged directory, unless Open is certain that nothing is lost. Open calls
	// Recover with an error that wraps ErrCorrupt. The error reports the damage and the data that
	// could be recovered. If Recover panics, Open returns an error. If Recover did not return,
	// because of a panic or a crash, the next Open calls Recover again.
	Recover func(lost error)

	// Forget lists keys of entries that say something about all other entries, such as that an
	// index is complete. A recovery that may have lost an entry removes these entries too. The
	// removal is a part of the recovery, so no crash can separate the two.
	Forget [][]byte

	// Parent returns the key of the entry that the entry of a key leads to, or nil if the entry
	// leads to no other entry.
	// The caller never adds an entry before its parent. So if the parent comes after all keys of
	// its kind, the committer adds the entry without a read. Nil means that no entry has a parent.
	Parent func(key []byte) []byte

	// MustExist makes Open refuse a missing or empty directory, instead of making a store there.
	// The mount point of a volume that is not mounted is an empty directory, for example. The error
	// matches fs.ErrNotExist.
	MustExist bool

	// Failed is called when the DB has stopped for good. The goroutine that finds the failure calls
	// Failed. Even a goroutine of Badger may call Failed, while no request is running. Failed
	// should return quickly. Nil means that the DB calls no function.
	Failed func(error)

	memTableSize int64             // for tests; outside of tests 0: the size depends on the disk
	noCompactors bool              // for tests: Badger compacts nothing
	crash        func(step string) // for tests; called after each step of a recovery; otherwise nil
}

var quiet = slog.New(slog.DiscardHandler)

const (
	// discardEvery is the number of commits between two attempts to let Badger drop old versions.
	discardEvery = 256
	// maxGroup is the maximum number of requests in a group.
	maxGroup = 512
)

// level0Stall is the maximum number of tables in Badger's level 0. The next table waits for a
// compaction.
const level0Stall = 8

// Open opens the directory of a store, and creates the directory if necessary. The result depends
// on the content of the directory:
//
//	missing, or empty    Open makes a new store, or returns fs.ErrNotExist; see Options.MustExist
//	a store              Open opens the store, and does not touch foreign files
//	a damaged store      see Options.Recover
//	anything else        Open refuses the directory, and does not touch it. Tables belong to another
//	                     program if LAST is missing and the tables hold no summary of a store
//
// Open sets the mode of the store's directory to 0700. The error wraps backend.ErrLocked if the
// directory is open elsewhere. The error wraps backend.ErrCorrupt if the store is damaged, and the
// text names the damage. The error wraps backend.ErrFull if there is no space, and also
// syscall.EDQUOT if a quota is the reason. Errors of the operating system match with errors.Is as
// usual. On a 32-bit system the error wraps errors.ErrUnsupported; see errWordSize.
func Open(dir string, opts Options) (*DB, error) {
	if bits.UintSize < 64 {
		return nil, errWordSize
	}
	db, err := openDir(dir, opts)
	return db, asFull(err)
}

// errWordSize is the error of Open on a 32-bit system, where Badger damages its tables. The reason
// is the allocator of Badger's table builder (z.Allocator.Allocate of ristretto, up to v2.4.2 at
// least). The allocator shifts an int by 32 bits. When the first buffer is full, the allocator
// starts at the beginning of that buffer again, and overwrites finished blocks. The table then
// lacks entries. Neither Badger nor the checksum of the table reports the loss.
var errWordSize = fmt.Errorf("a directory cannot hold a store on a 32-bit system, where Badger "+
	"damages its tables: use keystore.New with a backend of your own: %w", errors.ErrUnsupported)

func openDir(dir string, opts Options) (_ *DB, err error) {
	if opts.Logger == nil {
		opts.Logger = quiet
	}
	if dir == "" {
		return nil, errors.New("the path of the directory is empty: name a directory for the store alone")
	}
	dir, err = filepath.Abs(dir) // the process may change its working directory
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
		parent:  opts.Parent,
		queue:   make(chan *request),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	isOpen := false
	defer func() { // runs also if Options.Recover ends the goroutine
		if !isOpen {
			err = errors.Join(err, db.release())
		}
	}()
	r, err := db.open(opts)
	if err == nil && r != nil {
		if err = r.report(opts); err == nil {
			err = r.discard()
		}
	}
	if err != nil {
		return nil, explain(dir, err)
	}
	isOpen = true
	go db.committer()
	db.onFailure.Store(&opts.Failed)
	if err := db.failed.Load(); err != nil {
		db.reportFailure(*err)
	}
	return db, nil
}

// open surveys the directory, recovers the directory if necessary, and opens Badger. If the
// directory is damaged, recoverOrFail decides between recovery and error. open returns the recovery
// that has replaced the files and is not reported yet. The result is nil if there is no such
// recovery.
func (db *DB) open(opts Options) (*recovery, error) {
	c, err := listDir(db.dir)
	if err != nil {
		return nil, err
	}
	if !c.commitFile && len(c.badger) == 0 && len(c.recoveries) == 0 && c.foreign != "" {
		return nil, notAStore(db.dir, c.foreign, othersFile)
	}
	if err := c.mayWrite(db.dir); err != nil {
		return nil, err
	}
	r, err := db.finishRecovery(c, opts)
	if err != nil {
		return nil, err
	}
	if r != nil {
		if c, err = listDir(db.dir); err != nil {
			return nil, err
		}
	}
	records, kind, err := db.readCommitFile(c)
	if err != nil {
		return nil, err
	}
	s, err := survey.Read(db.dir)
	if err != nil {
		return nil, err
	}
	isNew := kind != commitfile.Ours && s.Summary.Seq == 0 // there are no files of a store
	if isNew {
		if err := c.mayMake(db.dir, kind, opts.MustExist); err != nil {
			return nil, err
		}
	}
	if err := db.reserveSpace(c, s, opts); err != nil {
		return nil, err
	}
	if isNew {
		first, err := db.makeStore(opts)
		if err != nil {
			return nil, err
		}
		records = append(records, first)
	}
	absent := c.lacks(db.dir, isNew)
	if absent != nil && opts.Recover == nil {
		return nil, absent
	}
	redo, err := s.Reconcile(records)
	if err = cmp.Or(absent, err); err != nil {
		return db.recoverOrFail(s, records, r, opts, err)
	}
	if err := db.clean(c, s, records); err != nil {
		return nil, err
	}
	if err := db.openBadger(s, opts); err != nil {
		return nil, err
	}
	if err := db.matchCommitFile(s, records, redo); err != nil {
		if closeErr := db.closeBadger(); closeErr != nil {
			return nil, errors.Join(err, closeErr)
		}
		db.badger = nil
		return db.recoverOrFail(s, records, r, opts, err)
	}
	return r, db.space.opened(db.commitFile.Preallocate())
}

// finishRecovery finishes a recovery that has begun to replace the files of the directory, and
// returns the recovery. The result is nil if there is no such recovery.
func (db *DB) finishRecovery(c contents, opts Options) (*recovery, error) {
	r, at, err := begunRecovery(db.dir, c.recoveries)
	if r == nil || err != nil {
		return nil, err
	}
	r.crash = opts.crash
	if err := r.refuse(db.dir, opts); err != nil {
		return nil, err
	}
	if at == begun {
		err = r.replace(db.dir, db.claim)
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// readCommitFile opens LAST, and returns its commits and its kind. If LAST is missing, there is no
// commit, and the kind is Blank.
func (db *DB) readCommitFile(c contents) ([]commitfile.Record, commitfile.Kind, error) {
	if !c.commitFile {
		return nil, commitfile.Blank, nil
	}
	var err error
	if db.commitFile, err = commitfile.Open(db.dir); err != nil {
		return nil, commitfile.Blank, err
	}
	return db.commitFile.Records()
}

// reserveSpace returns an error if the files are those of another program, or if the disk has too
// little space to open Badger.
func (db *DB) reserveSpace(c contents, s *survey.Survey, opts Options) error {
	if s.Foreign != "" {
		return fmt.Errorf("%w: %s: %s: %w", backend.ErrCorrupt, db.dir, s.Foreign, errForeign)
	}
	if c.inTheWay != "" {
		return fmt.Errorf("%s holds %s, which Badger would take for a file of its own: "+
			"move that file elsewhere", db.dir, c.inTheWay)
	}
	var inLogs, largest int64
	for _, l := range s.Logs {
		inLogs += l.End
		largest = max(largest, l.Memory)
	}
	db.space = newSpaceGuard(db.dir, opts.memTableSize, largest)
	return db.space.toOpen(inLogs)
}

// makeStore makes LAST of a new store, and returns the first commit.
func (db *DB) makeStore(opts Options) (first commitfile.Record, err error) {
	if err := db.claim(); err != nil {
		return first, err
	}
	if err := db.commitFile.Close(); err != nil { // closes a blank LAST, if there is one
		return first, err
	}
	if db.commitFile, first, err = commitfile.Create(db.dir); err != nil {
		return first, err
	}
	opts.Logger.Info("made a new API key store", "dir", db.dir)
	return first, nil
}

// clean takes possession of the directory, and removes what earlier processes left unfinished.
func (db *DB) clean(c contents, s *survey.Survey, records []commitfile.Record) error {
	if err := db.claim(); err != nil {
		return err
	}
	if err := discardUnfinished(db.dir, c.recoveries, records[0].Store); err != nil {
		return err
	}
	if err := s.Clean(); err != nil {
		return fmt.Errorf("%s cannot be written to, as a store must, also to be read: %w",
			db.dir, err)
	}
	return nil
}

// openBadger opens Badger, and starts the guard of the space and the watch of the compactions.
func (db *DB) openBadger(s *survey.Survey, opts Options) error {
	db.compactions = newCompactions(db)
	// No compaction runs while Badger opens. Badger would wait for a compaction if level 0 had the
	// maximum number of tables. So the maximum is raised by the tables and logs in the directory.
	options := db.options(opts).WithNumLevelZeroTablesStall(level0Stall + s.Level0 + len(s.Logs))
	var err error
	if db.badger, err = badger.OpenManaged(options); err != nil {
		db.badger = nil
		return openError(db.dir, err)
	}
	if err := db.awaitTables(s.Logs); err != nil {
		return err
	}
	db.compactions.space = db.space
	db.space.idle, db.space.busy = db.compactions.whileIdle, db.compactions.blocked
	close(db.compactions.ready)
	db.writeCommitFile = db.commitFile.Write
	return nil
}

// awaitTables waits until Badger has turned the logs in the directory into tables. No compaction
// may run before that. A log may have a table already, if an earlier process ended before Badger
// removed the log. Badger then makes a second table that holds nothing newer than the first table.
// A compaction would mistake the second table for a table that the compaction has made.
func (db *DB) awaitTables(logs []badgerfile.Log) error {
	for _, l := range logs {
		for l.Last > 0 { // Clean has removed the logs without a commit
			if _, err := os.Stat(filepath.Join(db.dir, l.Name)); errors.Is(err, fs.ErrNotExist) {
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

// recoverOrFail recovers and opens the directory if the recovery loses nothing, or if
// Options.Recover is set. Otherwise recoverOrFail returns the error. recoverOrFail also returns the
// error if the error does not wrap ErrCorrupt, or if this Open has made a recovery already. After
// the recovery recoverOrFail calls open again.
//
// A damaged directory may still hold all entries, although Badger would not find all of them. For
// example, Badger may fail to write the manifest. Badger then continues with another table of the
// same content, and removes the table that the manifest names. LAST holds the number of entries and
// the sum of their checksums. Both figures prove that all entries are there and unchanged.
//
// If an earlier recovery is not reported yet, the new recovery reports the losses of both.
func (db *DB) recoverOrFail(
	s *survey.Survey, records []commitfile.Record, earlier *recovery, opts Options, damage error,
) (*recovery, error) {
	if !errors.Is(damage, backend.ErrCorrupt) || db.salvaged {
		return nil, damage
	}
	if opts.Recover != nil {
		if err := db.claim(); err != nil {
			return nil, err
		}
	}
	if earlier != nil {
		damage = errors.Join(&messageError{earlier.Lost, backend.ErrCorrupt}, damage)
	}
	r, err := db.salvage(s, records, opts, damage)
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
	err = db.commitFile.Close()
	db.commitFile = nil
	if err := errors.Join(err, r.replace(db.dir, db.claim)); err != nil {
		return nil, err
	}
	if earlier != nil { // from here on the new recovery reports the losses of both
		if err := earlier.discard(); err != nil {
			return nil, err
		}
	}
	db.salvaged = true
	db.failed.Store(nil) // clears the failure of Badger to open the damaged files
	return db.open(opts)
}

func (db *DB) options(opts Options) badger.Options {
	compactors := 2
	if opts.noCompactors {
		compactors = 0
	}
	return badger.DefaultOptions(db.dir).
		WithSyncWrites(true).
		WithMemTableSize(db.space.memtable).
		// The sizes keep Badger's usual proportions to the memtable. So a compaction with small
		// memtables needs no more space than spaceGuard calculates.
		WithBaseTableSize(db.space.memtable / 4).
		WithBaseLevelSize(db.space.memtable * 5 / 4).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(level0Stall).
		WithNumCompactors(compactors).
		WithValueLogFileSize(1 << 20).
		WithValueThreshold(64 << 10).
		// Digests do not compress. Badger reads uncompressed tables in place, without a cache.
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		// The survey has checked the tables. The package comment describes how Badger treats a
		// damaged block.
		WithChecksumVerificationMode(options.NoVerification).
		WithMetricsEnabled(false).
		WithDetectConflicts(false). // there is one writer
		WithNumVersionsToKeep(1).
		WithBypassLockGuard(true). // this package holds Badger's lock
		WithLogger(logger{opts.Logger, db, db.compactions})
}

// matchCommitFile makes Badger and LAST agree: matchCommitFile repeats the commits that Badger
// lacks, and writes the newest commit to LAST if LAST lacks that commit.
func (db *DB) matchCommitFile(s *survey.Survey, records, redo []commitfile.Record) error {
	// The directory entries of files that Badger has just made may not be durable yet.
	if err := fsys.SyncDir(db.dir); err != nil {
		return err
	}
	if got := db.badger.MaxVersion(); got != s.Summary.Seq {
		return s.CorruptError(fmt.Errorf("the newest commit that Badger has opened is %d instead of %d",
			got, s.Summary.Seq))
	}
	db.durable.Store(s.Summary.Seq)
	if db.summary = s.Summary; s.Summary.Seq == 0 {
		db.summary = layout.Summary{Store: records[0].Store}
	}
	for _, commit := range redo {
		if err := db.redo(commit); err != nil {
			return err
		}
	}
	isNewest := func(r commitfile.Record) bool { return r.Seq == db.summary.Seq }
	if slices.ContainsFunc(records, isNewest) {
		return nil
	}
	// The copy of the newest commit in LAST was not finished. The next commit would overwrite the
	// only slot that is whole. So the copy is written first.
	return db.commitFile.Write(commitfile.Record{Summary: db.summary, Writes: s.Writes})
}

// redo repeats a commit that Badger has lost.
func (db *DB) redo(commit commitfile.Record) error {
	txn := db.badger.NewTransactionAt(db.durable.Load(), true)
	defer txn.Discard()
	for _, w := range commit.Writes {
		if err := txn.SetEntry(badger.NewEntry(w.Key, w.Value)); err != nil {
			return fmt.Errorf("badgerdb: make commit %d again: %w", commit.Seq, err)
		}
	}
	if err := db.writeCommit(txn, commit); err != nil {
		return err
	}
	db.space.count(commit.Writes)
	return nil
}

// summaryAt returns the summary of the commit at the read timestamp of txn.
func summaryAt(txn *badger.Txn) (layout.Summary, error) {
	item, err := txn.Get(layout.SummaryKey)
	if err != nil {
		return layout.Summary{}, fmt.Errorf("the summary: %w", err)
	}
	value, err := item.ValueCopy(nil)
	if err != nil {
		return layout.Summary{}, fmt.Errorf("the summary: %w", err)
	}
	h, ok := layout.ParseSummary(value)
	if !ok || h.Seq != txn.ReadTs() {
		return layout.Summary{}, fmt.Errorf("the summary is not that of commit %d", txn.ReadTs())
	}
	return h, nil
}
