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
//   - No deletes, no TTL, no DropPrefix: deleted keys have come back (issues 2143, 2278, 2286), and the version that
//     comes back may be that of an active key. An entry is deleted by a write, of an empty value, which stays for
//     good unless the key is written again: 31 to 36 bytes on disk for a key of 17, by how much neighbours have in
//     common (100,000 deleted, after compaction), and what it takes a Scan to pass over it.
package badgerdb

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
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
//  3. Badger may drop the versions below its discard timestamp, so that must not pass a read which is under way: the
//     version that the read needs might be gone, and an older one, of a revoked key say, show in its place. Readers
//     hold use for reading, before they load durable; the discard timestamp moves to durable only while nobody does.
//     A snapshot goes on reading at its timestamp after it has let go of use: it counts itself in pins before it does
//     that, and the discard timestamp does not move while it is counted there.
//  4. After a commit that failed, nothing is served any more: its writes may be on disk or not, and Linux does not
//     report a failed writeback twice, so that no later sync can be believed.
type DB struct {
	badger  *badger.DB
	durable atomic.Uint64         // timestamp of the last commit that is on disk
	failed  atomic.Pointer[error] // set once; see invariant 4

	queue   chan *request // to the committer; unbuffered, so that a request is either taken or not
	closing chan struct{} // closed by the first Close
	stopped chan struct{} // closed by the committer when it is through

	use    sync.RWMutex // held for reading by everyone who reads Badger; see invariant 3
	closed bool         // guarded by use: Badger is closed, or about to be
	pins   atomic.Int64 // snapshots that go on; raised only while use is held for reading; see invariant 3

	closeOnce sync.Once
	closeErr  error

	commitFault func() error // for tests; nil outside
}

var _ backend.Backend = (*DB)(nil)

// Options are the settings of a DB.
type Options struct {
	Logger *slog.Logger // told what Badger has to say; nil means silence

	memTableSize int64 // for tests; 0 outside, which means memTableSize
}

const (
	memTableSize = 8 << 20

	// A group is bounded well below what Badger takes in one transaction, 15 % of a memtable.
	maxGroup      = 512
	maxGroupBytes = 512 << 10

	// How many commits go by between two attempts to let Badger drop old versions.
	discardEvery = 256
)

// Open opens the directory, and creates it if need be; see prepare for what it must be like. The error wraps
// backend.ErrLocked if it is open elsewhere, or backend.ErrCorrupt.
func Open(dir string, opts Options) (*DB, error) {
	if err := prepare(dir); err != nil {
		return nil, err
	}
	o := badger.DefaultOptions(dir).
		WithSyncWrites(true).
		WithMemTableSize(cmp.Or(opts.memTableSize, memTableSize)).
		WithNumMemtables(2).
		WithNumLevelZeroTables(2).
		WithNumLevelZeroTablesStall(8).
		WithNumCompactors(2).
		WithValueLogFileSize(1 << 20).
		WithValueThreshold(64 << 10).
		// Digests do not compress. Uncompressed tables are read in place, and need no cache.
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithIndexCacheSize(0).
		WithChecksumVerificationMode(options.OnTableAndBlockRead).
		WithVerifyValueChecksum(true).
		WithMetricsEnabled(false).
		WithDetectConflicts(false). // there is one writer
		WithNumVersionsToKeep(1).
		WithLogger(nil)
	if opts.Logger != nil {
		o = o.WithLogger(logger{opts.Logger})
	}
	b, err := badger.OpenManaged(o)
	if err != nil {
		return nil, openError(dir, err)
	}
	// The entries of files that Badger has just made may not be durable yet.
	if err := syncDir(dir); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	db := &DB{
		badger:  b,
		queue:   make(chan *request),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
	}
	db.durable.Store(b.MaxVersion())
	go db.committer()
	return db, nil
}

// Close fails the calls that wait for the committer with ErrClosed, lets those that it has taken finish, and closes
// Badger.
func (db *DB) Close() error {
	db.closeOnce.Do(func() {
		close(db.closing)
		<-db.stopped
		db.use.Lock()
		defer db.use.Unlock()
		db.closed = true
		if err := db.badger.Close(); err != nil {
			db.closeErr = fmt.Errorf("badger: %w", err)
		}
	})
	return db.closeErr
}

// The layout of Badger's entries:
//
//	key    'e' key                       Badger keeps names in "!badger!" for itself
//	value  revision[8, big-endian] value, or nothing: the entry has been deleted
const keyPrefix = 'e'

func storedKey(key []byte) []byte {
	return append(append(make([]byte, 0, 1+backend.MaxKeySize), keyPrefix), key...)
}

func storedValue(c backend.Change) []byte {
	if c.Delete {
		return nil
	}
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, 8+len(c.Value)), revision(c)), c.Value...)
}

// entry reads an item into memory of its own. ErrNotFound means that the item is a deletion.
func entry(item *badger.Item) (backend.Entry, error) {
	key := item.KeyCopy(nil)[1:]
	value, err := item.ValueCopy(nil)
	if err != nil {
		return backend.Entry{}, readError(key, err)
	}
	if len(value) == 0 {
		return backend.Entry{}, backend.ErrNotFound
	}
	if len(value) < 8 {
		return backend.Entry{}, readError(key, errShort)
	}
	return backend.Entry{Key: key, Value: value[8:], Revision: binary.BigEndian.Uint64(value)}, nil
}

var errShort = errors.New("the value is shorter than its revision")

func readError(key []byte, err error) error {
	if errors.Is(err, y.ErrChecksumMismatch) || errors.Is(err, errShort) {
		return fmt.Errorf("%w: entry %x: %w", backend.ErrCorrupt, key, err)
	}
	return fmt.Errorf("entry %x: %w", key, err)
}

// get returns the entry of key as txn sees it, or ErrNotFound.
func get(txn *badger.Txn, key []byte) (backend.Entry, error) {
	item, err := txn.Get(storedKey(key))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return backend.Entry{}, backend.ErrNotFound
	}
	if err != nil {
		return backend.Entry{}, readError(key, err)
	}
	return entry(item)
}

// read calls f with a read transaction at a timestamp: db.durable.Load, or that of a snapshot which is counted in pins.
func (db *DB) read(ctx context.Context, at func() uint64, f func(*badger.Txn) error) error {
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
	txn := db.badger.NewTransactionAt(at(), false)
	defer txn.Discard()
	return f(txn)
}

// Get implements backend.Backend. A read of a mapped file cannot be interrupted: ctx is looked at before.
func (db *DB) Get(ctx context.Context, key []byte) (e backend.Entry, err error) {
	err = db.read(ctx, db.durable.Load, func(txn *badger.Txn) error {
		e, err = get(txn, key)
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

// Snapshot implements backend.Backend. While one goes on, Badger drops no version of anything: it costs the space of
// what is written meanwhile.
func (db *DB) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		var ts uint64
		err := db.read(ctx, db.durable.Load, func(txn *badger.Txn) error {
			db.pins.Add(1) // before use is let go of
			ts = txn.ReadTs()
			return nil
		})
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		defer db.pins.Add(-1) // also if the loop body panics
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
			switch e, err := entry(it.Item()); {
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

// A logger passes on what Badger says: its chatter as detail.
type logger struct{ to *slog.Logger }

func (l logger) Errorf(format string, args ...any)   { l.to.Error(badgerText(format, args)) }
func (l logger) Warningf(format string, args ...any) { l.to.Warn(badgerText(format, args)) }
func (l logger) Infof(format string, args ...any)    { l.to.Debug(badgerText(format, args)) }
func (l logger) Debugf(format string, args ...any)   { l.to.Debug(badgerText(format, args)) }
