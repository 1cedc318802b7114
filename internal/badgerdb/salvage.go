package badgerdb

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"path/filepath"
	"slices"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/survey"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// storeOf returns the identity of the store in a directory. The result is zeros if the identity is
// unknown.
func storeOf(s *survey.Survey, records []commitfile.Record) [16]byte {
	if s.Summary.Seq == 0 && len(records) > 0 {
		return records[len(records)-1].Store
	}
	return s.Summary.Store
}

// salvage writes a recovery of the directory. salvage does not change the store's files; replace
// does.
func (db *DB) salvage(
	s *survey.Survey, records []commitfile.Record, opts Options, damage error,
) (*recovery, error) {
	c, err := listDir(db.dir)
	if err != nil {
		return nil, err
	}
	store := storeOf(s, records)
	// Without Options.Recover, Open may refuse the directory, and must then leave the directory as
	// before.
	if opts.Recover != nil {
		if err := discardUnfinished(db.dir, c.recoveries, store); err != nil {
			return nil, err
		}
	}
	if err := db.space.toSalvage(); err != nil {
		return nil, err
	}
	var was layout.Summary
	if len(records) > 0 {
		was = records[len(records)-1].Summary
	}
	r, err := newRecovery(db.dir, opts.crash, recoveryFile{Store: store[:], Was: was.Append(nil)})
	if err != nil {
		return nil, err
	}
	if err := r.fill(db.dir, s, records, opts, damage); err != nil {
		return nil, errors.Join(err, r.discard())
	}
	return r, nil
}

// fill makes the new database, and describes the new database in RECOVERY.
func (r *recovery) fill(
	from string, s *survey.Survey, records []commitfile.Record, opts Options, damage error,
) error {
	to := &DB{dir: r.work, space: newSpaceGuard(r.work, usualMemtable, 0)}
	to.compactions = newCompactions(to)
	// The new database has no compactors. compactions can check a compaction only if Badger flushes
	// tables in the order of commits.
	options := to.options(opts).WithSyncWrites(false).WithNumCompactors(0).
		WithNumLevelZeroTablesStall(math.MaxInt)
	made, err := badger.OpenManaged(options)
	if err != nil {
		return err
	}
	to.badger = made
	must, whole, left, err := to.collect(from, s, records, opts.Forget)
	if err = errors.Join(err, to.closeBadger()); err != nil {
		return err
	}
	r.step("filled the database")
	if err := commitfile.CreateWith(r.work, commitfile.Record{Summary: must}); err != nil {
		return err
	}
	recoveredFiles, err := survey.Read(r.work)
	if err != nil {
		return err
	}
	if _, err := recoveredFiles.Reconcile([]commitfile.Record{{Summary: must}}); err != nil {
		return err
	}
	c, err := listDir(r.work)
	if err != nil {
		return err
	}
	r.Must, r.Whole, r.Lost = must.Append(nil), whole, errors.Join(damage, left).Error()
	names := slices.DeleteFunc(c.badger, func(name string) bool {
		kind := badgerfile.Kind(name)
		return kind != badgerfile.TableFiles && kind != badgerfile.LogFiles
	})
	if c.manifest {
		names = append(names, badgerfile.ManifestFile)
	}
	for _, name := range append(names, commitfile.Name) {
		sum, err := sumFile(filepath.Join(r.work, name), true)
		if err != nil {
			return err
		}
		r.Files = append(r.Files, recovered{name, sum})
	}
	return errors.Join(fsys.SyncDir(r.work), r.write())
}

// errForeign means that the directory holds data of another program.
var errForeign = errors.New("it is not the key store's: another program with Badger uses the " +
	"same directory: give each a directory of its own")

// collect fills the new database from the files in the directory from. collect returns the summary
// of the new database. left reports how many of the expected entries were recovered, and any
// damage. whole means that all entries were recovered and are unchanged. Otherwise collect removes
// the entries with the keys in forget: see Options.Forget.
func (db *DB) collect(
	from string, s *survey.Survey, records []commitfile.Record, forget [][]byte,
) (h layout.Summary, whole bool, left, err error) {
	h, damage, err := db.copyEntries(from, s, records)
	if err != nil {
		return layout.Summary{}, false, nil, err
	}
	if h.Seq == 0 {
		// A new identity, so that the new LAST differs from the old LAST.
		_, _ = rand.Read(h.Store[:])
		return h, false, errors.New("nothing is left: the store is empty"), nil
	}
	var bad error // damage that copyEntries has not found
	err = db.countPages(context.Background(), h.Seq, &h, func(err error) { bad = err })
	if err != nil || bad != nil {
		return layout.Summary{}, false, nil, errors.Join(err, bad)
	}
	whole, report := compareSummary(h, s, records)
	h.Seq++
	if whole {
		forget = nil
	}
	if err := db.commitSummary(&h, forget); err != nil {
		return layout.Summary{}, false, nil, err
	}
	return h, whole, errors.Join(append(damage, report)...), nil
}

// copyEntries writes every entry of the tables, the logs and LAST into the new database. The
// summary has the identity of the store, or a new identity if no record is of the store. The
// summary also has the number of the last commit; 0 means that the directory has no commit. damage
// lists the damage in the tables.
func (db *DB) copyEntries(
	from string, s *survey.Survey, records []commitfile.Record,
) (h layout.Summary, damage []error, err error) {
	_, _ = rand.Read(h.Store[:])
	batch := db.badger.NewManagedWriteBatch()
	defer batch.Cancel()
	put := func(version uint64, w layout.Write) error {
		if !isOurs(w.Key) {
			return fmt.Errorf("the entry %.32x: %w", w.Key, errForeign)
		}
		h.Seq = max(h.Seq, version)
		if w.Key[0] != layout.KeyPrefix || version == 0 {
			return nil // skips the old summaries: the new database has another summary
		}
		value := w.Value
		if _, _, err := layout.ParseEntry(w.Key, value); errors.Is(err, layout.ErrDamaged) {
			value = nil // drops the damaged entry; see recovery
		}
		return batch.SetEntryAt(badger.NewEntry(w.Key, value), version)
	}
	putAll := func(version uint64, writes []layout.Write) error {
		for _, w := range writes {
			if err := put(version, w); err != nil {
				return err
			}
		}
		return nil
	}
	if damage, err = salvageTables(from, put); err != nil {
		return layout.Summary{}, nil, err
	}
	for _, l := range s.Logs {
		if _, err := badgerfile.ReadLog(filepath.Join(from, l.Name), putAll); err != nil {
			return layout.Summary{}, nil, err
		}
	}
	for _, record := range records {
		if s.Summary.Seq > 0 && record.Store != s.Summary.Store {
			continue // the record belongs to another store
		}
		h.Store = record.Store
		if err := putAll(record.Seq, record.Writes); err != nil {
			return layout.Summary{}, nil, err
		}
		h.Seq = max(h.Seq, record.Seq)
	}
	return h, damage, batch.Flush()
}

// compareSummary compares the summary of the new database with the summary of the last commit, and
// reports how many entries are left.
func compareSummary(
	h layout.Summary, s *survey.Survey, records []commitfile.Record,
) (whole bool, report error) {
	if len(records) == 0 {
		return false, fmt.Errorf("%d entries are left", h.Entries)
	}
	want := records[len(records)-1].Summary
	if s.Summary.Store == want.Store && s.Summary.Seq == want.Seq+1 {
		want = s.Summary // the copy of this commit in LAST was not finished
	}
	if want.Store == h.Store && want.Entries == h.Entries && want.Sum == h.Sum {
		return true, fmt.Errorf("all %d entries are left, as they were after commit %d", h.Entries,
			want.Seq)
	}
	return false, fmt.Errorf("%d of %d entries are left", h.Entries, want.Entries)
}

// commitSummary removes the entries with the keys in forget, and writes the summary.
func (db *DB) commitSummary(h *layout.Summary, forget [][]byte) error {
	txn := db.badger.NewTransactionAt(h.Seq, true)
	defer txn.Discard()
	if err := forgetEntries(txn, forget, h); err != nil {
		return err
	}
	if err := txn.SetEntry(badger.NewEntry(layout.SummaryKey, h.Append(nil))); err != nil {
		return err
	}
	return txn.CommitAt(h.Seq, nil)
}

// forgetEntries deletes entries in txn, and subtracts the entries from h.
func forgetEntries(txn *badger.Txn, keys [][]byte, h *layout.Summary) error {
	for _, key := range keys {
		stored := layout.StoredKey(key)
		item, err := txn.Get(stored)
		if errors.Is(err, badger.ErrKeyNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		_, sum, err := decodeItem(item)
		if errors.Is(err, backend.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if err := txn.SetEntry(badger.NewEntry(stored, nil)); err != nil {
			return err
		}
		h.Entries--
		h.Sum -= sum
	}
	return nil
}

// isOurs reports whether a store, or Badger for a store, writes entries under key.
func isOurs(key []byte) bool {
	return len(key) > 0 && key[0] == layout.KeyPrefix || bytes.Equal(key, layout.SummaryKey) ||
		bytes.HasPrefix(key, []byte("!badger!"))
}

// salvageTables calls put for every entry of every undamaged block of every table in dir. damage
// lists the damage in the tables. If put fails, salvageTables returns the first error of put.
func salvageTables(
	dir string, put func(version uint64, w layout.Write) error,
) (damage []error, err error) {
	paths, err := badgerfile.FilesOf(dir, badgerfile.TableFiles)
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		var failed error
		putEntry := func(key []byte, version uint64, value []byte) {
			if failed == nil {
				failed = put(version, layout.Write{Key: y.Copy(key), Value: y.Copy(value)})
			}
		}
		note := func(err error) {
			if err != nil {
				damage = append(damage, fmt.Errorf("%s: %w", filepath.Base(path), err))
			}
		}
		note(badgerfile.WithTable(path, func(t badgerfile.Table) error {
			t.Blocks(func(_ int, block []byte, damage error) {
				if damage == nil {
					damage = badgerfile.Entries(block, putEntry)
				}
				note(damage)
			})
			return nil
		}))
		if failed != nil {
			return nil, failed
		}
	}
	return damage, nil
}
