package badgerdb

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"
)

// A recovery makes a new database of what is left of a damaged one: of every table, whether the manifest names it or not,
// of every log up to where it is damaged, and of the last commits. It keeps the newest version of each entry that there
// is. Where the newest is damaged, the entry is gone: an older version may be that of a key that has been revoked since.
//
// It is made in a directory inside the store's, whose name says how far it has come, so that Open can go on after a crash:
//
//	recovering    it is being written; the next recovery begins anew
//	recovered     it is complete. The damaged files move to damaged-<time>, to be looked into or removed by whoever wants
//	moving        its own files move to their place. It goes when LAST says what they say
const (
	recovering = "recovering"
	recovered  = "recovered"
	moving     = "moving"
)

// recoverable reports whether a recovery is complete, and only has to be moved to its place.
func recoverable(dir string) bool {
	for _, name := range []string{recovered, moving} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return true
		}
	}
	return false
}

// salvage writes a recovery of the directory, and returns what is lost, and whether it is certain that nothing is. It
// changes nothing else; see keepRecovery.
func (db *DB) salvage(s *survey, slots []slot, opts Options, damage error) (whole bool, lost, err error) {
	dir := filepath.Join(db.dir, recovering)
	if err := os.RemoveAll(dir); err != nil {
		return false, nil, err
	}
	if err := db.room.toSalvage(); err != nil {
		return false, nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return false, nil, err
	}
	to := &DB{dir: dir, room: newRoom(dir, usualMemtable, 0)}
	to.compactions = newCompactions(to)
	// It is not compacted: that is watched only where tables are flushed in the order of commits.
	options := to.options(opts).WithSyncWrites(false).WithNumCompactors(0).WithNumLevelZeroTablesStall(math.MaxInt)
	if to.badger, err = badger.OpenManaged(options); err != nil {
		return false, nil, err
	}
	whole, left, err := to.collect(db.dir, s, slots)
	if err = errors.Join(err, to.closeBadger()); err != nil {
		return false, nil, err
	}
	return whole, errors.Join(damage, left), syncDir(dir)
}

// keepRecovery says that the recovery is to be moved to its place, whatever happens from now on.
func keepRecovery(dir string) error {
	if err := os.Rename(filepath.Join(dir, recovering), filepath.Join(dir, recovered)); err != nil {
		return err
	}
	return syncDir(dir)
}

// collect fills a new database, and returns what it has against what there should be, and whether that is all.
func (db *DB) collect(from string, s *survey, slots []slot) (whole bool, left, err error) {
	h := head{}
	_, _ = rand.Read(h.store[:])
	batch := db.badger.NewManagedWriteBatch()
	defer batch.Cancel()
	put := func(version uint64, w write) error {
		h.seq = max(h.seq, version)
		if len(w.key) == 0 || w.key[0] != keyPrefix || version == 0 {
			return nil // the heads, which will be wrong
		}
		value := w.value
		if _, _, err := parseEntry(w.key, value); errors.Is(err, errDamaged) {
			value = nil // see above
		}
		return batch.SetEntryAt(badger.NewEntry(w.key, value), version)
	}
	damaged, err := salvageTables(from, put)
	if err != nil {
		return false, nil, err
	}
	for _, l := range s.logs {
		_, err := readLog(filepath.Join(from, l.name), func(version uint64, writes []write) error {
			for _, w := range writes {
				if err := put(version, w); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return false, nil, err
		}
	}
	for _, slot := range slots {
		if s.head.seq > 0 && slot.store != s.head.store {
			continue // another store's
		}
		h.store = slot.store
		for _, w := range slot.writes {
			if err := put(slot.seq, w); err != nil {
				return false, nil, err
			}
		}
		h.seq = max(h.seq, slot.seq)
	}
	if err := batch.Flush(); err != nil {
		return false, nil, err
	}
	if h.seq == 0 {
		return false, errors.New("nothing is left: the store is empty"), nil
	}
	var bad error // what put lets pass
	if err := db.countPages(context.Background(), h.seq, &h, func(err error) { bad = err }); err != nil || bad != nil {
		return false, nil, errors.Join(err, bad)
	}
	h.seq++
	txn := db.badger.NewTransactionAt(h.seq, true)
	defer txn.Discard()
	if err := txn.SetEntry(badger.NewEntry(headKey, h.append(nil))); err != nil {
		return false, nil, err
	}
	if err := txn.CommitAt(h.seq, nil); err != nil {
		return false, nil, err
	}
	report := fmt.Errorf("%d entries are left", h.entries)
	if len(slots) > 0 {
		want := slots[len(slots)-1].head
		if s.head.store == want.store && s.head.seq == want.seq+1 {
			want = s.head // its copy was not finished
		}
		report = fmt.Errorf("%d of %d entries are left", h.entries, want.entries)
		if whole = want.store == h.store && want.entries == h.entries && want.sum == h.sum; whole {
			report = fmt.Errorf("all %d entries are left, as they were after commit %d", h.entries, want.seq)
		}
	}
	return whole, errors.Join(append(damaged, report)...), nil
}

// salvageTables hands every entry of every whole block to put, and returns what is damaged.
func salvageTables(dir string, put func(version uint64, w write) error) (damaged []error, err error) {
	paths, err := filesOf(dir, ".sst")
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		var failed error
		note := func(damage error) {
			if damage != nil {
				damaged = append(damaged, fmt.Errorf("%s: %w", filepath.Base(path), damage))
			}
		}
		note(withTable(path, func(t tableFile) error {
			t.blocks(func(_ int, block []byte, damage error) {
				if damage == nil {
					damage = entries(block, func(key []byte, version uint64, value []byte) {
						if failed == nil {
							failed = put(version, write{y.Copy(key), y.Copy(value)})
						}
					})
				}
				note(damage)
			})
			return nil
		}))
		if failed != nil {
			return nil, failed
		}
	}
	return damaged, nil
}

// moveRecovery moves a recovery that is complete to its place.
func moveRecovery(dir string) error {
	from := filepath.Join(dir, recovered)
	if _, err := os.Stat(from); err == nil {
		away := filepath.Join(dir, "damaged-"+time.Now().UTC().Format("20060102T150405.000"))
		if err := moveFiles(dir, away); err != nil {
			return err
		}
		if err := os.Rename(from, filepath.Join(dir, moving)); err != nil {
			return err
		}
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	return moveFiles(filepath.Join(dir, moving), dir)
}

// moveFiles moves what Badger keeps data in, the manifest last.
func moveFiles(from, to string) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	files, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	manifest := false
	move := func(name string) error { return os.Rename(filepath.Join(from, name), filepath.Join(to, name)) }
	for _, f := range files {
		_, isTable := table.ParseFileID(f.Name())
		switch {
		case f.Name() == badger.ManifestFilename:
			manifest = true
		case isTable, strings.HasSuffix(f.Name(), ".mem"):
			if err := move(f.Name()); err != nil {
				return err
			}
		}
	}
	if manifest {
		if err := move(badger.ManifestFilename); err != nil {
			return err
		}
	}
	return errors.Join(syncDir(from), syncDir(to))
}

// adopt makes last say what a recovery says that is in its place, and Badger has opened.
func (db *DB) adopt() error {
	db.durable.Store(db.badger.MaxVersion())
	var err error
	if db.head, err = db.storedHead(); err != nil {
		return err
	}
	if db.head == (head{}) { // nothing was left
		_, _ = rand.Read(db.head.store[:])
	}
	if err := db.last.reset(slot{head: db.head}); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(db.dir, moving)); err != nil {
		return err
	}
	return syncDir(db.dir)
}
