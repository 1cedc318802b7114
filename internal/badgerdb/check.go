package badgerdb

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/dgraph-io/badger/v4"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

var _ backend.Checker = (*DB)(nil)

// maxDamage is the number of damaged entries that an error names at most.
const maxDamage = 16

// Check implements backend.Checker. Check reads every entry and every table as of one moment. Check
// compares the number of entries and the sum of their checksums with the figures that the commits
// up to this moment have counted. If files of the store are missing from the directory, the error
// wraps ErrFailed, and the DB serves nothing afterwards.
func (db *DB) Check(ctx context.Context) error {
	err := db.read(ctx, db.durable.Load, func(*badger.Txn) error {
		if err := db.allPresent(); err != nil {
			return db.fail("check", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	ts, unpin := db.pin()
	defer unpin()

	var damage []error
	more := 0
	found := layout.Summary{}
	note := func(err error) {
		if len(damage) == maxDamage {
			more++
			return
		}
		damage = append(damage, err)
	}
	if err := db.countPages(ctx, ts, &found, note); err != nil {
		return err
	}
	var want layout.Summary
	err = db.read(ctx, func() uint64 { return ts }, func(txn *badger.Txn) (err error) {
		if ts > 0 {
			want, err = summaryAt(txn)
		}
		if err != nil {
			note(err)
		}
		if err := db.badger.VerifyChecksum(); err != nil {
			note(fmt.Errorf("a table: %w", err))
		}
		return nil
	})
	if err != nil {
		return err
	}
	if more > 0 {
		damage = append(damage, fmt.Errorf("and %d more", more))
	}
	if found.Entries != want.Entries || found.Sum != want.Sum {
		damage = append(damage, fmt.Errorf(
			"%d entries with sum %016x were written, and %d with sum %016x are there",
			want.Entries, want.Sum, found.Entries, found.Sum))
	}
	if len(damage) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s: close the store, and restore it from a backup: %w",
		backend.ErrCorrupt, db.dir, errors.Join(damage...))
}

// countPages adds the entries as of ts to h. countPages reads page by page, so that no lock is held
// for long.
func (db *DB) countPages(
	ctx context.Context, ts uint64, h *layout.Summary, report func(error),
) error {
	from := []byte{layout.KeyPrefix}
	for from != nil {
		err := db.read(ctx, func() uint64 { return ts }, func(txn *badger.Txn) error {
			from = countFrom(txn, from, 16*pageEntries, h, report)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// countFrom reads up to limit entries, beginning at the key from, and adds the entries to h. next
// is the key to continue with; nil means the end.
func countFrom(
	txn *badger.Txn, from []byte, limit int, h *layout.Summary, report func(error),
) (next []byte) {
	o := badger.DefaultIteratorOptions
	// Otherwise Badger starts a goroutine for each entry, which copies the value beforehand.
	o.PrefetchValues = false
	o.Prefix = []byte{layout.KeyPrefix}
	it := txn.NewIterator(o)
	defer it.Close()
	n := 0
	for it.Seek(from); it.Valid(); it.Next() {
		if n++; n > limit {
			return slices.Clone(it.Item().Key())
		}
		_, sum, err := decodeItem(it.Item())
		switch {
		case errors.Is(err, backend.ErrNotFound):
		case err != nil:
			report(err)
		default:
			h.Entries++
			h.Sum += sum
		}
	}
	return nil
}
