// Package badgerdb keeps the entries of a store in a directory, with Badger. No other package knows
// Badger.
//
// Measurements decided how this package uses Badger:
//
//   - SyncWrites is on. Without SyncWrites, a power cut loses thousands of acknowledged writes, and
//     Open does not report the loss.
//   - Badger runs in managed mode, and reads are at the last durable timestamp. An ordinary read
//     waits for every commit that is under way: 1.7 ms instead of 5 µs at the median, beside eight
//     writers.
//   - One committer puts many changes into one transaction, because Badger syncs once for each
//     transaction. The throughput at 64 writers is 18 times higher.
//   - Values are below the threshold of the value log, because Badger swallows the sync errors of
//     the value log.
//   - Each commit is stored a second time, in the file LAST, and the directory is surveyed before
//     Badger opens the directory. Badger silently drops acknowledged writes if a bit of Badger's
//     log has flipped or a file is missing: see commitfile.File.
//   - Each entry has a checksum, and Badger verifies no checksum when Badger reads. Badger treats a
//     damaged block as a block without the key. Then Badger finds an older version in another
//     table.
//   - Compactions are watched. Badger continues without a table that could not be created, and
//     deletes the tables which the new table was made from: see compactions.
//   - The space on the disk is checked before each commit. Badger writes to mapped files, and there
//     a full disk ends the process: see spaceGuard.
//   - There are no deletes, no TTL and no DropPrefix. Deleted keys have come back (issues 2143,
//     2278, 2286), and the version that comes back may be the version of an active key. An entry is
//     deleted by a write of an empty value. The empty value stays for good unless the key is
//     written again. The empty value takes 31 to 36 bytes on disk for a key of 17 bytes. The size
//     depends on how much neighbouring keys have in common (100,000 deleted, after compaction). A
//     Scan also takes time to pass over the empty value.
package badgerdb

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A DB is a backend.Backend in a directory.
//
// The invariants:
//
//  1. The committer goroutine is the only writer. The committer commits at durable+1, and moves
//     durable there when Badger has synced the commit.
//  2. Every read is at a timestamp of durable. So a read sees no write that could still be lost,
//     and waits for no write.
//  3. Badger may drop the versions below its discard timestamp. So the discard timestamp must not
//     pass a read which is under way. Otherwise the version that the read needs might be gone, and
//     an older version, of a revoked key for example, might appear instead. Each read is counted in
//     readers before the read loads durable. Each snapshot is counted from before it loads durable
//     until its end. The discard timestamp moves only to a timestamp below which, according to
//     readers, no reader reads.
//  4. After a failed commit, the DB serves nothing any more. The same applies after any other
//     failed write of Badger. The writes of a failed commit may be on disk or not. Linux does not
//     report a failed writeback twice, so that no later sync can be trusted.
//  5. A commit is acknowledged when the commit is durable both in Badger and in LAST, and when the
//     files of the commit are found in the directory afterwards; see presence. LAST has the commit
//     before the next commit begins.
type DB struct {
	dir        string
	lock       *fsys.Lock // of dir; nil after the directory was released
	badger     *badger.DB
	commitFile *commitfile.File
	durable    atomic.Uint64               // timestamp of the last commit that is on disk
	failed     atomic.Pointer[error]       // set once; see invariant 4
	onFailure  atomic.Pointer[func(error)] // Options.Failed; nil until Open is done

	compactions *compactions // watches the compactions of badger

	summary  layout.Summary // after the last commit; owned by the committer
	space    spaceGuard     // owned by the committer
	ends     ends           // owned by the committer
	presence presence       // of the files

	parent func(key []byte) []byte // Options.Parent

	// queue leads to the committer. queue is unbuffered, so that a request is either taken or not.
	queue   chan *request
	closing chan struct{} // closed by the first Close
	stopped chan struct{} // closed by the committer when the committer ends

	readers readers // see invariant 3
	// use is held for reading by each reader of Badger, so that Close waits for the reads.
	use    sync.RWMutex
	closed bool // guarded by use: Badger is closed, or about to be

	closeOnce  sync.Once
	badgerDone <-chan error // receives when Badger is closed; nil while no call closes Badger
	salvaged   bool         // Open has recovered the directory

	// writeCommitFile writes a commit to LAST. A benchmark skips the write.
	writeCommitFile func(commitfile.Record) error
	commitFault     func() error // for tests; nil outside of tests
}

var (
	_ backend.Backend     = (*DB)(nil)
	_ backend.DownScanner = (*DB)(nil)
	_ backend.AllGetter   = (*DB)(nil)
)

// Close closes the store. The calls that wait for the committer fail with ErrClosed. The calls that
// the committer has taken finish. Then Close closes Badger.
//
// ErrFull means that the disk lacks the space for Badger's writes during Close. The directory is
// still open then, nothing is lost, and Close may be called again. Close may also be called again
// after an error which reports that the directory could not be closed: Close then waits for Badger
// again. After the directory was released, Close does nothing and returns nil.
func (db *DB) Close() error {
	db.closeOnce.Do(func() { close(db.closing) })
	<-db.stopped
	db.use.Lock()
	defer db.use.Unlock()
	if !db.closed {
		if err := db.space.toClose(); err != nil {
			return err
		}
	}
	if err := db.compactions.waiting.Load(); err != nil {
		return *err
	}
	db.closed = true
	return db.release()
}

// release closes Badger, if Badger is open, and releases the directory. After errNotClosed the
// directory is still held, and release may be called again. After the directory was released,
// release does nothing.
func (db *DB) release() error {
	if db.lock == nil {
		return nil
	}
	var err error
	if db.badger != nil {
		if err = db.closeBadger(); errors.Is(err, errNotClosed) {
			return err
		}
	}
	err = errors.Join(err, db.commitFile.Close(), db.lock.Release())
	db.lock = nil
	return err
}

// errNotClosed means that Badger is still trying to write, and that the directory is still held.
var errNotClosed = errors.New("could not be closed, because it could not be written: " +
	"start the process again")

// closeBadger closes Badger, and waits for a limited time only, because Badger retries a failing
// write without end. After errNotClosed, closeBadger may be called again.
func (db *DB) closeBadger() error {
	db.compactions.closing.Store(true)
	if db.badgerDone == nil {
		done := make(chan error, 1)
		db.badgerDone = done
		// pinFiles keeps the files that are compacted while Badger is being closed.
		b, release := db.badger, db.pinFiles()
		go func() {
			err := b.Close()
			if err == nil && db.failed.Load() == nil && release != nil {
				release()
			}
			done <- err
		}()
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for failing := 0; failing < 5; {
		select {
		case err := <-db.badgerDone:
			db.badgerDone = nil
			if err != nil {
				return fmt.Errorf("badger: %w", err)
			}
			return nil
		case <-tick.C:
			if db.failed.Load() != nil {
				failing++
			}
		}
	}
	return fmt.Errorf("badgerdb: %s %w", db.dir, errNotClosed)
}

// fail stops the DB for good; see invariant 4. fail returns the first reason for which the DB
// stopped.
func (db *DB) fail(op string, err error) error {
	err = fmt.Errorf("badgerdb: %w: %s: %w", backend.ErrFailed, op, err)
	if db.failed.CompareAndSwap(nil, &err) {
		db.reportFailure(err)
	}
	return *db.failed.Load()
}

// reportFailure calls Options.Failed, if set, once Open is done. Options.Failed is called twice if
// the DB fails while Open finishes.
func (db *DB) reportFailure(err error) {
	if report := db.onFailure.Load(); report != nil && *report != nil {
		(*report)(err)
	}
}

// decodeItem decodes a copy of an item.
func decodeItem(item *badger.Item) (backend.Entry, uint64, error) {
	return decodeValue(item.KeyCopy(nil), item)
}

// decodeValue decodes a copy of the value of an item. The entry keeps key, the stored key.
func decodeValue(key []byte, item *badger.Item) (backend.Entry, uint64, error) {
	value, err := item.ValueCopy(nil)
	if err != nil {
		return backend.Entry{}, 0, readError(key[1:], err)
	}
	return layout.ParseEntry(key, value)
}

func readError(key []byte, err error) error {
	if errors.Is(err, y.ErrChecksumMismatch) {
		return fmt.Errorf("%w: entry %x: %w", backend.ErrCorrupt, key, err)
	}
	return fmt.Errorf("entry %x: %w", key, err)
}

// get returns the entry of key as txn sees the entry, and the checksum, or ErrNotFound.
func get(txn *badger.Txn, key []byte) (backend.Entry, uint64, error) {
	stored := layout.StoredKey(key)
	item, err := txn.Get(stored)
	if errors.Is(err, badger.ErrKeyNotFound) {
		return backend.Entry{}, 0, backend.ErrNotFound
	}
	if err != nil {
		return backend.Entry{}, 0, readError(key, err)
	}
	return decodeValue(stored, item)
}

// read calls f with a read transaction. The timestamp is db.durable.Load, or the timestamp of a
// pinned snapshot.
func (db *DB) read(ctx context.Context, at func() uint64, f func(*badger.Txn) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	db.use.RLock()
	defer db.use.RUnlock()
	if db.closed {
		return backend.ErrClosed
	}
	if err := db.failed.Load(); err != nil {
		return *err
	}
	epoch := db.readers.enter()
	defer db.readers.leave(epoch)
	txn := db.badger.NewTransactionAt(at(), false)
	defer txn.Discard()
	err = db.guard(func() error { return f(txn) })
	if watchErr := db.compactions.waitVerified(); watchErr != nil {
		return watchErr
	}
	return err
}

// guard calls f, which reads tables, and returns panics as errors. Badger reads tables through
// mapped files, without precautions. A disk that cannot be read causes a panic there. So does a
// table that was damaged after the table was checked.
func (db *DB) guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch recover().(type) {
		case nil:
		case interface{ Addr() uintptr }:
			err = db.fail("read", errors.New("a file could not be read"))
		default: // an index out of range, or a text that Badger makes of the panic
			err = fmt.Errorf("%w: a table is damaged, and could not be read", backend.ErrCorrupt)
		}
	}()
	return f()
}

// Get implements backend.Backend. Get checks ctx before the read, because a read of a mapped file
// cannot be interrupted.
func (db *DB) Get(ctx context.Context, key []byte) (e backend.Entry, err error) {
	err = db.read(ctx, db.durable.Load, func(txn *badger.Txn) error {
		e, _, err = get(txn, key)
		return err
	})
	return e, err
}

// GetAll implements backend.AllGetter. The entries are all as of one point in time.
func (db *DB) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	all := make([]backend.Entry, len(keys))
	err := db.read(ctx, db.durable.Load, func(txn *badger.Txn) (err error) {
		for i, key := range keys {
			if all[i], _, err = get(txn, key); err != nil && !errors.Is(err, backend.ErrNotFound) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// A page is what Scan and Snapshot read in one step. A page ends after pageEntries entries, deleted
// entries included, or after pageBytes bytes, whichever comes first.
const (
	pageEntries = 256
	pageBytes   = 256 << 10
)

// Scan implements backend.Backend.
func (db *DB) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		db.pages(ctx, db.durable.Load, from, to, false, yield)
	}
}

// ScanDown implements backend.DownScanner.
func (db *DB) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		db.pages(ctx, db.durable.Load, from, to, true, yield)
	}
}

// pin returns the timestamp of a snapshot. Badger drops no version that the snapshot shows until
// unpin is called.
func (db *DB) pin() (ts uint64, unpin func()) {
	epoch := db.readers.enter()
	return db.durable.Load(), func() { db.readers.leave(epoch) }
}

// Snapshot implements backend.Backend. During a snapshot, Badger drops no version that is newer
// than the snapshot. So the snapshot costs the space of everything that is written until the
// snapshot ends.
func (db *DB) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		ts, unpin := db.pin()
		defer unpin() // also if the loop body panics
		db.pages(ctx, func() uint64 { return ts }, from, to, false, yield)
	}
}

// pages reads page by page, so that no lock is held and no transaction is open while the loop body
// runs. pages checks ctx between pages. down means descending order.
func (db *DB) pages(
	ctx context.Context, at func() uint64, from, to []byte, down bool,
	yield func(backend.Entry, error) bool,
) {
	var page []backend.Entry // the memory of each page: yield gets copies of the entries
	for {
		var next []byte
		var err error
		page, next, err = db.page(ctx, at, from, to, down, page[:0])
		for _, e := range page {
			if !yield(e, nil) {
				return
			}
			select {
			case <-db.closing:
				yield(backend.Entry{}, backend.ErrClosed)
				return
			default:
			}
		}
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		if next == nil {
			return
		}
		if down {
			to = next
		} else {
			from = next
		}
	}
}

// page appends the first entries with from <= key < to to the argument page, and returns the
// result. If down is true, page appends the last entries in descending order. The next page begins
// at the key next, or ends before next if down is true. next is nil if there is no next page. If an
// entry is damaged, page returns the entries before the damage, and the error.
func (db *DB) page(
	ctx context.Context, at func() uint64, from, to []byte, down bool, page []backend.Entry,
) (_ []backend.Entry, next []byte, err error) {
	var damaged error
	err = db.read(ctx, at, func(txn *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		// Otherwise Badger starts a goroutine for each entry, which copies the value beforehand.
		o.PrefetchValues = false
		o.Prefix = commonPrefix(from, to) // Badger leaves out the tables without the prefix
		o.Reverse = down
		begin := layout.StoredKey(from)
		if down && to != nil {
			begin = layout.StoredKey(to)
		} else if down {
			// after every stored key, and itself no key of Badger
			begin = []byte{layout.KeyPrefix + 1}
		}
		it := txn.NewIterator(o)
		defer it.Close()
		seen, size := 0, 0
		for it.Seek(begin); it.Valid(); it.Next() {
			key := it.Item().Key()[1:] // valid until Next
			switch {
			case down && string(key) < string(from),
				!down && to != nil && string(key) >= string(to):
				return nil
			case down && to != nil && string(key) >= string(to):
				continue // Seek begins at the key to itself, if there is an entry
			}
			switch e, _, err := decodeItem(it.Item()); {
			case err == nil:
				page = append(page, e)
				size += len(e.Key) + len(e.Value)
			case !errors.Is(err, backend.ErrNotFound):
				damaged = err
				return nil
			}
			if seen++; seen == pageEntries || size >= pageBytes {
				next = slices.Clone(key)
				if !down {
					next = append(next, 0) // the least key after key
				}
				return nil
			}
		}
		return nil
	})
	if err != nil { // the entries may be wrong: see compactions.waitVerified
		return nil, nil, err
	}
	return page, next, damaged
}

// commonPrefix returns the stored form of what all keys with from <= key < to begin with.
func commonPrefix(from, to []byte) []byte {
	n := 0
	for n < min(len(from), len(to)) && from[n] == to[n] {
		n++
	}
	return layout.StoredKey(from[:n])
}

// A logger forwards Badger's log messages. Info messages of Badger become debug messages. An error
// message of Badger means that Badger could not write something, and stops the DB.
type logger struct {
	to          *slog.Logger
	db          *DB
	compactions *compactions
}

func (l logger) Errorf(format string, args ...any) {
	text := badgerText(format, args)
	l.to.Error(text)
	l.db.fail("in the background", errors.New(text))
	l.compactions.onLog(format, args)
}

func (l logger) Warningf(format string, args ...any) {
	l.to.Warn(badgerText(format, args))
	l.compactions.onLog(format, args)
}

func (l logger) Infof(format string, args ...any) { l.to.Debug(badgerText(format, args)) }

func (l logger) Debugf(format string, args ...any) {
	l.to.Debug(badgerText(format, args))
	l.compactions.onLog(format, args)
}
