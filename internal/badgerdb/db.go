// Package badgerdb keeps a store's entries in a directory, with Badger. It is the only package that knows Badger.
//
// What Badger is asked for here, and what not, comes from measurements:
//
//   - SyncWrites, because without it a power cut loses acknowledged writes by the thousand, and Open does not say so.
//   - Its managed mode, with reads at the last durable timestamp, because an ordinary read waits for every commit
//     that is under way: 1.7 ms instead of 5 µs at the median, beside eight writers.
//   - One committer that puts many changes into one transaction, because Badger syncs once for each: 18 times the
//     throughput at 64 writers.
//   - Values below the threshold of the value log, whose sync errors Badger swallows.
//   - Each commit is kept a second time, in the file LAST, and the directory is surveyed before Badger opens it, because
//     Badger drops acknowledged writes without a word where a bit of its log has flipped or a file is gone: see last.
//   - A checksum in each entry, and none read by Badger, which takes a damaged block for one without the key, and then
//     finds an older version in another table.
//   - Compactions that are watched, because Badger goes on without a table that it could not make, and deletes those that
//     it was made of: see compactions.
//   - Space on the disk that is checked before each commit, because Badger writes to mapped files, where a full disk
//     ends the process: see room.
//   - No deletes, no TTL, no DropPrefix: deleted keys have come back (issues 2143, 2278, 2286), and the version that
//     comes back may be that of an active key. An entry is deleted by a write, of an empty value, which stays for
//     good unless the key is written again: 31 to 36 bytes on disk for a key of 17, by how much neighbours have in
//     common (100,000 deleted, after compaction), and what it takes a Scan to pass over it.
package badgerdb

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
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

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A DB is a backend.Backend in a directory.
//
// The invariants:
//
//  1. The committer goroutine is the only writer. It commits at durable+1, and moves durable there when Badger has
//     synced the commit.
//  2. Every read is at a timestamp of durable, so that it sees no write that could still be lost, and waits for none.
//  3. Badger may drop the versions below its discard timestamp. So the discard timestamp must not pass a read which is
//     under way: the version that the read needs might be gone, and an older one, of a revoked key say, show in its
//     place. Each read, and each snapshot from its beginning to its end, is counted in readers before it loads durable;
//     the discard timestamp moves only to where readers says that no reader reads below.
//  4. After a commit that failed, or anything else that Badger could not write, nothing is served any more: its writes
//     may be on disk or not, and Linux does not report a failed writeback twice, so that no later sync can be believed.
//  5. A commit is acknowledged when it is durable both in Badger and in last, which has it before the next one begins,
//     and when the files that it was written to are found in the directory afterwards; see presence.
type DB struct {
	dir     string
	lock    *dirLock // of dir; nil once the directory was given back
	badger  *badger.DB
	last    *last
	durable atomic.Uint64               // timestamp of the last commit that is on disk
	failed  atomic.Pointer[error]       // set once; see invariant 4
	tell    atomic.Pointer[func(error)] // Options.Failed; nil until Open is through

	compactions *compactions // those of badger

	head     head     // after the last commit; the committer's
	room     room     // the committer's
	presence presence // of the files

	queue   chan *request // to the committer; unbuffered, so that a request is either taken or not
	closing chan struct{} // closed by the first Close
	stopped chan struct{} // closed by the committer when it is through

	readers readers      // see invariant 3
	use     sync.RWMutex // held for reading by each reader of Badger, so that Close waits for the reads
	closed  bool         // guarded by use: Badger is closed, or about to be

	closeOnce  sync.Once
	badgerDone <-chan error // receives when Badger is closed; nil while nobody closes it
	salvaged   bool         // Open has made a recovery

	keep        func(slot) error // writes a commit to last; a benchmark leaves that out
	commitFault func() error     // for tests; nil outside
}

var _ backend.Backend = (*DB)(nil)

// Close fails the calls that wait for the committer with ErrClosed, lets those that it has taken
// finish, and closes Badger. ErrFull means that there is no room for what Badger writes then, and
// that the directory is still open: nothing is lost, and Close may be called again. Close may also
// be called again after an error which says that the directory could not be closed: Close then
// waits for Badger again. Once the directory is given back, Close does nothing and returns nil.
func (db *DB) Close() error {
	db.closeOnce.Do(func() { close(db.closing) })
	<-db.stopped
	db.use.Lock()
	defer db.use.Unlock()
	if !db.closed {
		if err := db.room.toClose(); err != nil {
			return err
		}
	}
	if err := db.compactions.waiting.Load(); err != nil {
		return *err
	}
	db.closed = true
	return db.release()
}

// release closes Badger, if it is open, and gives the directory back. After errNotClosed the
// directory is still held, and release may be called again. Once the directory was given back,
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
	err = errors.Join(err, db.last.close(), db.lock.release())
	db.lock = nil
	return err
}

// errNotClosed means that Badger goes on trying to write, and that the directory is still held.
var errNotClosed = errors.New("could not be closed, because it could not be written: " +
	"start the process again")

// closeBadger waits for Badger, but not for ever: one that cannot write tries again and again.
// After errNotClosed, closeBadger may be called again.
func (db *DB) closeBadger() error {
	db.compactions.closing.Store(true)
	if db.badgerDone == nil {
		done := make(chan error, 1)
		db.badgerDone = done
		b, release := db.badger, db.hold() // of what is compacted while Badger is being closed
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

// fail stops the DB for good; see invariant 4. It returns the reason that came first.
func (db *DB) fail(doing string, err error) error {
	err = fmt.Errorf("badgerdb: %w: %s: %w", backend.ErrFailed, doing, err)
	if db.failed.CompareAndSwap(nil, &err) {
		db.tellFailure(err)
	}
	return *db.failed.Load()
}

// tellFailure tells whom Open was given, once it is through. They are told twice if that is at the same time.
func (db *DB) tellFailure(err error) {
	if tell := db.tell.Load(); tell != nil && *tell != nil {
		(*tell)(err)
	}
}

// The layout of Badger's entries:
//
//	key    'e' key                       Badger keeps names in "!badger!" for itself
//	value  revision[8] checksum[8] value, or nothing: the entry has been deleted
//	key    headKey
//	value  the head: see head.append
//
// The checksum is the beginning of the SHA-256 of the revision, the length of the key, the key, and the value, so that an
// entry which was damaged on the disk, or stands under another's key, is noticed.
const (
	keyPrefix   = 'e'
	entryHeader = 16
)

var headKey = []byte("h")

func storedKey(key []byte) []byte {
	return append(append(make([]byte, 0, 1+backend.MaxKeySize), keyPrefix), key...)
}

// storedValue returns the value of an entry as it is stored, and its checksum; nothing and 0 for a deletion.
func storedValue(c backend.Change) ([]byte, uint64) {
	if c.Delete {
		return nil, 0
	}
	sum := checksum(c.Key, revision(c), c.Value)
	b := binary.BigEndian.AppendUint64(make([]byte, 0, entryHeader+len(c.Value)), revision(c))
	return append(binary.BigEndian.AppendUint64(b, sum), c.Value...), sum
}

func checksum(key []byte, revision uint64, value []byte) uint64 {
	var buf [512]byte // enough for most, on the stack
	b := binary.BigEndian.AppendUint64(buf[:0], revision)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(key))), key...)
	hash := sha256.Sum256(append(b, value...))
	return binary.BigEndian.Uint64(hash[:])
}

var errDamaged = errors.New("it is not what was written")

// parseEntry takes an entry, which may keep what it is given, from Badger's key and value, and returns its checksum too.
// ErrNotFound means that it is a deletion.
func parseEntry(key, value []byte) (e backend.Entry, sum uint64, err error) {
	key = key[1:]
	if len(value) == 0 {
		return backend.Entry{}, 0, backend.ErrNotFound
	}
	if len(value) < entryHeader {
		return backend.Entry{}, 0, readError(key, errDamaged)
	}
	e = backend.Entry{Key: key, Value: value[entryHeader:], Revision: binary.BigEndian.Uint64(value)}
	sum = binary.BigEndian.Uint64(value[8:])
	if sum != checksum(e.Key, e.Revision, e.Value) {
		return backend.Entry{}, 0, readError(key, errDamaged)
	}
	return e, sum, nil
}

// entry reads an item into memory of its own.
func entry(item *badger.Item) (backend.Entry, uint64, error) {
	key := item.KeyCopy(nil)
	value, err := item.ValueCopy(nil)
	if err != nil {
		return backend.Entry{}, 0, readError(key[1:], err)
	}
	return parseEntry(key, value)
}

func readError(key []byte, err error) error {
	if errors.Is(err, y.ErrChecksumMismatch) || errors.Is(err, errDamaged) {
		return fmt.Errorf("%w: entry %x: %w", backend.ErrCorrupt, key, err)
	}
	return fmt.Errorf("entry %x: %w", key, err)
}

// get returns the entry of key as txn sees it, and its checksum, or ErrNotFound.
func get(txn *badger.Txn, key []byte) (backend.Entry, uint64, error) {
	item, err := txn.Get(storedKey(key))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return backend.Entry{}, 0, backend.ErrNotFound
	}
	if err != nil {
		return backend.Entry{}, 0, readError(key, err)
	}
	return entry(item)
}

// read calls f with a read transaction at a timestamp: db.durable.Load, or the timestamp of a snapshot that is pinned.
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
	if doubt := db.compactions.vouch(); doubt != nil {
		return doubt
	}
	return err
}

// guard calls f, which reads tables. Badger does that in mapped files, and without care: a disk that cannot be read, and
// a table that was damaged since it was checked, are panics there.
func (db *DB) guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch recover().(type) {
		case nil:
		case interface{ Addr() uintptr }:
			err = db.fail("read", errors.New("a file could not be read"))
		default: // an index out of range, or a text that Badger makes of that
			err = fmt.Errorf("%w: a table is damaged, and could not be read", backend.ErrCorrupt)
		}
	}()
	return f()
}

// Get implements backend.Backend. A read of a mapped file cannot be interrupted: ctx is looked at before.
func (db *DB) Get(ctx context.Context, key []byte) (e backend.Entry, err error) {
	err = db.read(ctx, db.durable.Load, func(txn *badger.Txn) error {
		e, _, err = get(txn, key)
		return err
	})
	return e, err
}

// A page is what Scan and Snapshot read at once: so many entries, those that have been deleted among them, or so many
// bytes, whichever comes first.
const (
	pageEntries = 256
	pageBytes   = 256 << 10
)

// Scan implements backend.Backend.
func (db *DB) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		db.pages(ctx, db.durable.Load, from, to, yield)
	}
}

// pin returns the timestamp of a snapshot. Badger drops no version that the snapshot shows until unpin is called.
func (db *DB) pin() (ts uint64, unpin func()) {
	epoch := db.readers.enter()
	return db.durable.Load(), func() { db.readers.leave(epoch) }
}

// Snapshot implements backend.Backend. While a snapshot lasts, Badger drops no version that is newer: the snapshot costs
// the space of what is written until its end.
func (db *DB) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		ts, unpin := db.pin()
		defer unpin() // also if the loop body panics
		db.pages(ctx, func() uint64 { return ts }, from, to, yield)
	}
}

// pages reads page by page, so that no lock is held and no transaction open while the loop body runs. It looks at ctx
// between pages.
func (db *DB) pages(ctx context.Context, at func() uint64, from, to []byte, yield func(backend.Entry, error) bool) {
	for {
		page, next, err := db.page(ctx, at, from, to)
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
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
		if next == nil {
			return
		}
		from = next
	}
}

// page returns the first entries with from <= key < to, and where the next page begins: nil if there is none.
func (db *DB) page(ctx context.Context, at func() uint64, from, to []byte) (page []backend.Entry, next []byte, err error) {
	err = db.read(ctx, at, func(txn *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.Prefix = []byte{keyPrefix}
		it := txn.NewIterator(o)
		defer it.Close()
		seen, size := 0, 0
		for it.Seek(storedKey(from)); it.Valid(); it.Next() {
			key := it.Item().Key()[1:] // until Next
			if to != nil && string(key) >= string(to) {
				return nil
			}
			switch e, _, err := entry(it.Item()); {
			case err == nil:
				page = append(page, e)
				size += len(e.Key) + len(e.Value)
			case !errors.Is(err, backend.ErrNotFound):
				return err
			}
			if seen++; seen == pageEntries || size >= pageBytes {
				next = append(slices.Clone(key), 0) // the least key behind it
				return nil
			}
		}
		return nil
	})
	return page, next, err
}

// A logger passes on what Badger says: its chatter as detail. What it calls an error is something that it could not
// write, and stops the DB.
type logger struct {
	to          *slog.Logger
	db          *DB
	compactions *compactions
}

func (l logger) Errorf(format string, args ...any) {
	text := badgerText(format, args)
	l.to.Error(text)
	l.db.fail("in the background", errors.New(text))
	l.compactions.hear(format, args)
}

func (l logger) Warningf(format string, args ...any) {
	l.to.Warn(badgerText(format, args))
	l.compactions.hear(format, args)
}

func (l logger) Infof(format string, args ...any) { l.to.Debug(badgerText(format, args)) }

func (l logger) Debugf(format string, args ...any) {
	l.to.Debug(badgerText(format, args))
	l.compactions.hear(format, args)
}
