package badgerdb

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A recovery makes a new database of what is left of a damaged one: of every table, whether the
// manifest names it or not, of every log up to where it is damaged, and of the last commits. It
// keeps the newest version of each entry that there is. Where the newest is damaged, the entry is
// gone: an older version may be that of a key that has been revoked since.
//
// The new database is made in a directory inside the store's, recovering-<time>. The file RECOVERY
// in that directory says what the recovery is. Only a store writes this file, and the file has a
// checksum. The steps, each durable before the next:
//
//  1. RECOVERY names the store, and no files: the recovery is being written. A later recovery
//     removes this one.
//  2. The new database is written, and surveyed. RECOVERY names its files with their checksums, and
//     the heads that the file LAST has before and after. Nothing of the store has changed.
//  3. The directory damaged-<time> is made. From here on Open finishes the recovery, after it has
//     compared every file with its checksum. The damaged files move to damaged-<time>, to be
//     examined or removed by the store's owner.
//  4. The new files move to their place, LAST at the end. From here on the store is as any other.
//  5. Options.Recover has returned. The files of recovering-<time> are removed, by their names,
//     RECOVERY at the end.
//
// RECOVERY is believed only if LAST has one of the two heads. Whatever else has such a name is not
// the store's: nobody reads it, moves it or removes it.
type recovery struct {
	work  string            // its directory
	away  string            // the directory of the damaged files
	crash func(step string) // for tests; nil outside

	recoveryFile
}

// A recoveryFile is what RECOVERY holds, after a magic and a SHA-256, as JSON.
type recoveryFile struct {
	Store []byte // the store's identity, as in a head; zeros if it is not known any more
	Was   []byte // the newest head in LAST before the recovery; the zero head if LAST had none
	Must  []byte // the head after it
	Whole bool   // it is certain that nothing is lost
	Lost  string // what was damaged, and what is left
	Files []recovered
}

// A recovered is a file of the new database.
type recovered struct {
	Name string
	Sum  []byte // SHA-256
}

const (
	recoveryName    = "RECOVERY"
	recoveryNewName = "RECOVERY.new" // it becomes RECOVERY
	recoveryMagic   = "apikeysR"
	recoveryTime    = "20060102T150405.000000"
	recoveringTo    = "recovering-"
	damagedTo       = "damaged-"
)

func isRecoveryName(name string) bool {
	at, ok := strings.CutPrefix(name, recoveringTo)
	_, err := time.Parse(recoveryTime, at)
	return ok && err == nil
}

// newRecovery makes the directory of a recovery.
func newRecovery(dir string, crash func(string), file recoveryFile) (*recovery, error) {
	at := time.Now().UTC().Format(recoveryTime)
	r := &recovery{
		work:         filepath.Join(dir, recoveringTo+at),
		away:         filepath.Join(dir, damagedTo+at),
		crash:        crash,
		recoveryFile: file,
	}
	if err := os.Mkdir(r.work, 0o700); err != nil {
		return nil, err
	}
	r.step("made its directory")
	if err := errors.Join(r.write(), syncDir(dir)); err != nil {
		return nil, errors.Join(err, r.discard())
	}
	return r, nil
}

// readRecovery returns the recovery of a name in a directory, or nil if there is none that a store
// wrote.
func readRecovery(dir, name string) (*recovery, error) {
	work := filepath.Join(dir, name)
	if info, err := os.Lstat(work); err != nil || !info.IsDir() {
		return nil, nil
	}
	data, err := os.ReadFile(filepath.Join(work, recoveryName))
	if errors.Is(err, fs.ErrNotExist) {
		data, err = os.ReadFile(filepath.Join(work, recoveryNewName)) // it got no further
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	at := strings.TrimPrefix(name, recoveringTo)
	r := &recovery{work: work, away: filepath.Join(dir, damagedTo+at)}
	body, ok := bytes.CutPrefix(data, []byte(recoveryMagic))
	if !ok || len(body) < sha256.Size {
		return nil, nil
	}
	if sum := sha256.Sum256(body[sha256.Size:]); !bytes.Equal(sum[:], body[:sha256.Size]) {
		return nil, nil
	}
	if json.Unmarshal(body[sha256.Size:], &r.recoveryFile) != nil {
		return nil, nil
	}
	for _, f := range r.Files {
		if f.Name != lastName && badgerKind(f.Name) == "" {
			return nil, nil
		}
	}
	return r, nil
}

// write makes RECOVERY durable.
func (r *recovery) write() error {
	body, err := json.Marshal(r.recoveryFile)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(body)
	path := filepath.Join(r.work, recoveryNewName)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(slices.Concat([]byte(recoveryMagic), sum[:], body))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	r.step("wrote " + recoveryNewName)
	if err := os.Rename(path, filepath.Join(r.work, recoveryName)); err != nil {
		return err
	}
	r.step("wrote " + recoveryName)
	return syncDir(r.work)
}

func (r *recovery) step(name string) {
	if r.crash != nil {
		r.crash(name)
	}
}

// The stages of a recovery.
type stage int

const (
	unbelieved stage = iota // it is not that of what LAST is of
	unfinished              // it has replaced nothing: it can be removed
	begun                   // it has begun to replace the damaged files
	replaced                // it has replaced them
)

func (r *recovery) stage(dir string) (stage, error) {
	_, err := os.Lstat(r.away)
	away := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	in := dir
	if _, err := os.Lstat(filepath.Join(dir, lastName)); away && errors.Is(err, fs.ErrNotExist) {
		in = r.away // it may have moved there already
	}
	newest, err := newestIn(in)
	if err != nil {
		return 0, err
	}
	switch now := newest.append(nil); {
	case !away:
		return unfinished, nil
	case len(r.Files) == 0:
		return unbelieved, nil
	case in == dir && bytes.Equal(now, r.Must):
		return replaced, nil
	case bytes.Equal(now, r.Was):
		return begun, nil
	}
	return unbelieved, nil
}

// begunRecovery returns the recovery that has begun to replace the files of a directory, if there
// is one.
func begunRecovery(dir string, names []string) (*recovery, stage, error) {
	for _, name := range names {
		r, err := readRecovery(dir, name)
		if err != nil {
			return nil, 0, err
		}
		if r == nil {
			continue
		}
		switch at, err := r.stage(dir); {
		case err != nil:
			return nil, 0, err
		case at == begun, at == replaced:
			return r, at, nil
		}
	}
	return nil, 0, nil
}

// discardUnfinished removes the recoveries of a store that have replaced nothing.
func discardUnfinished(dir string, names []string, store [16]byte) error {
	for _, name := range names {
		r, err := readRecovery(dir, name)
		if err != nil {
			return err
		}
		if r == nil || !bytes.Equal(r.Store, store[:]) {
			continue
		}
		at, err := r.stage(dir)
		if err == nil && at == unfinished {
			err = r.discard()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// discard removes the files of a recovery, and no others.
func (r *recovery) discard() error {
	files, err := os.ReadDir(r.work)
	if err != nil {
		return err
	}
	for _, f := range files {
		if name := f.Name(); name == lastName || badgerKind(name) != "" {
			if err := os.Remove(filepath.Join(r.work, name)); err != nil {
				return err
			}
			r.step("removed " + name)
		}
	}
	if err := syncDir(r.work); err != nil {
		return err
	}
	for _, name := range []string{recoveryNewName, recoveryName} {
		err := os.Remove(filepath.Join(r.work, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	r.step("removed " + recoveryName)
	_ = os.Remove(r.work) // which fails, and is to fail, if somebody else's file is in it
	return syncDir(filepath.Dir(r.work))
}

// storeOf returns the identity of the store that a directory has files of; zeros if it is not
// known.
func storeOf(s *survey, slots []slot) [16]byte {
	if s.head.seq == 0 && len(slots) > 0 {
		return slots[len(slots)-1].store
	}
	return s.head.store
}

// salvage writes a recovery of the directory, and changes nothing else; see replace.
func (db *DB) salvage(s *survey, slots []slot, opts Options, damage error) (*recovery, error) {
	c, err := listDir(db.dir)
	if err != nil {
		return nil, err
	}
	store := storeOf(s, slots)
	if opts.Recover != nil { // otherwise the directory may be refused, and is to be as it was
		if err := discardUnfinished(db.dir, c.recoveries, store); err != nil {
			return nil, err
		}
	}
	if err := db.room.toSalvage(); err != nil {
		return nil, err
	}
	var was head
	if len(slots) > 0 {
		was = slots[len(slots)-1].head
	}
	r, err := newRecovery(db.dir, opts.crash, recoveryFile{Store: store[:], Was: was.append(nil)})
	if err != nil {
		return nil, err
	}
	if err := r.fill(db.dir, s, slots, opts, damage); err != nil {
		return nil, errors.Join(err, r.discard())
	}
	return r, nil
}

// fill makes the new database, and writes down what it is.
func (r *recovery) fill(from string, s *survey, slots []slot, opts Options, damage error) error {
	to := &DB{dir: r.work, room: newRoom(r.work, usualMemtable, 0)}
	to.compactions = newCompactions(to)
	// It is not compacted: that is watched only where tables are flushed in the order of commits.
	options := to.options(opts).WithSyncWrites(false).WithNumCompactors(0).WithNumLevelZeroTablesStall(math.MaxInt)
	made, err := badger.OpenManaged(options)
	if err != nil {
		return err
	}
	to.badger = made
	must, whole, left, err := to.collect(from, s, slots)
	if err = errors.Join(err, to.closeBadger()); err != nil {
		return err
	}
	r.step("filled the database")
	f, err := os.OpenFile(filepath.Join(r.work, lastName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join((&last{f}).write(slot{head: must}), f.Close()); err != nil {
		return err
	}
	survey, err := surveyDir(r.work)
	if err != nil {
		return err
	}
	if _, err := survey.reconcile([]slot{{head: must}}); err != nil {
		return err
	}
	c, err := listDir(r.work)
	if err != nil {
		return err
	}
	r.Must, r.Whole, r.Lost = must.append(nil), whole, errors.Join(damage, left).Error()
	names := slices.DeleteFunc(c.badger, func(name string) bool {
		kind := badgerKind(name)
		return kind != tableFiles && kind != logFiles
	})
	if c.manifest {
		names = append(names, badger.ManifestFilename)
	}
	for _, name := range append(names, lastName) {
		sum, err := sumFile(filepath.Join(r.work, name), true)
		if err != nil {
			return err
		}
		r.Files = append(r.Files, recovered{name, sum})
	}
	return errors.Join(syncDir(r.work), r.write())
}

// sumFile returns the SHA-256 of a file, which is made durable if it is new.
func sumFile(path string, isNew bool) ([]byte, error) {
	flag := os.O_RDONLY
	if isNew {
		flag = os.O_RDWR
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return nil, err
	}
	if isNew {
		err = f.Sync()
	}
	return h.Sum(nil), err
}

// errForeign means that something in the directory is another program's.
var errForeign = errors.New("it is not the key store's: another program with Badger uses the " +
	"same directory: give each a directory of its own")

// collect fills a new database, and returns its head, what it has against what there should be, and
// whether that is all.
func (db *DB) collect(from string, s *survey, slots []slot) (h head, whole bool, left, err error) {
	_, _ = rand.Read(h.store[:])
	batch := db.badger.NewManagedWriteBatch()
	defer batch.Cancel()
	put := func(version uint64, w write) error {
		if !isOurs(w.key) {
			return fmt.Errorf("the entry %.32x: %w", w.key, errForeign)
		}
		h.seq = max(h.seq, version)
		if w.key[0] != keyPrefix || version == 0 {
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
		return head{}, false, nil, err
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
			return head{}, false, nil, err
		}
	}
	for _, slot := range slots {
		if s.head.seq > 0 && slot.store != s.head.store {
			continue // another store's
		}
		h.store = slot.store
		for _, w := range slot.writes {
			if err := put(slot.seq, w); err != nil {
				return head{}, false, nil, err
			}
		}
		h.seq = max(h.seq, slot.seq)
	}
	if err := batch.Flush(); err != nil {
		return head{}, false, nil, err
	}
	if h.seq == 0 {
		_, _ = rand.Read(h.store[:]) // another store, so that its LAST is another
		return h, false, errors.New("nothing is left: the store is empty"), nil
	}
	var bad error // what put lets pass
	if err := db.countPages(context.Background(), h.seq, &h, func(err error) { bad = err }); err != nil || bad != nil {
		return head{}, false, nil, errors.Join(err, bad)
	}
	h.seq++
	txn := db.badger.NewTransactionAt(h.seq, true)
	defer txn.Discard()
	if err := txn.SetEntry(badger.NewEntry(headKey, h.append(nil))); err != nil {
		return head{}, false, nil, err
	}
	if err := txn.CommitAt(h.seq, nil); err != nil {
		return head{}, false, nil, err
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
	return h, whole, errors.Join(append(damaged, report)...), nil
}

// isOurs reports whether a store, or Badger for it, writes entries under such a key.
func isOurs(key []byte) bool {
	return len(key) > 0 && key[0] == keyPrefix || bytes.Equal(key, headKey) ||
		bytes.HasPrefix(key, []byte("!badger!"))
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

// replace puts a recovery in the place of the damaged files, or goes on where a crash has
// interrupted that. Nothing has changed if a file of the recovery is not what it was.
func (r *recovery) replace(dir string, claim func() error) error {
	waiting := make(map[string]bool) // files that have not moved yet
	var errs []error
	for _, f := range r.Files {
		in := r.work
		_, err := os.Lstat(filepath.Join(r.work, f.Name))
		waiting[f.Name] = err == nil
		if errors.Is(err, fs.ErrNotExist) {
			in, err = dir, nil
		}
		var sum []byte
		if err == nil {
			sum, err = sumFile(filepath.Join(in, f.Name), false)
		}
		if err == nil && !bytes.Equal(sum, f.Sum) {
			err = errors.New("it is not what was written")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s of %s: %w", f.Name, filepath.Base(r.work), err))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w: %s: a recovery was interrupted, and cannot go on: restore the "+
			"directory from a backup, or move %s elsewhere and the files of %s, if there are any, "+
			"back to their place: %w", backend.ErrCorrupt, dir, filepath.Base(r.work),
			filepath.Base(r.away), errors.Join(errs...))
	}
	if err := claim(); err != nil {
		return err
	}
	if err := os.Mkdir(r.away, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncDir(dir); err != nil {
		return err
	}
	r.step("made the directory of the damaged files")
	c, err := listDir(dir)
	if err != nil {
		return err
	}
	names := c.badger
	if c.last {
		names = append(names, lastName)
	}
	for _, name := range names {
		if isWaiting, isNew := waiting[name]; isNew && !isWaiting {
			continue // it has moved to its place
		}
		if err := moveFile(name, dir, r.away); err != nil {
			return err
		}
		r.step("moved the damaged " + name)
	}
	if err := errors.Join(syncDir(r.away), syncDir(dir)); err != nil {
		return err
	}
	for _, f := range r.Files { // LAST is the last one
		if !waiting[f.Name] {
			continue
		}
		if f.Name == lastName {
			if err := errors.Join(syncDir(dir), syncDir(r.work)); err != nil {
				return err
			}
		}
		if err := moveFile(f.Name, r.work, dir); err != nil {
			return err
		}
		r.step("moved the new " + f.Name)
	}
	return errors.Join(syncDir(dir), syncDir(r.work))
}

// moveFile moves a file to another directory, and never over another file.
func moveFile(name, from, to string) error {
	target := filepath.Join(to, name)
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is in the way: %w", target, fs.ErrExist)
	}
	return os.Rename(filepath.Join(from, name), target)
}

// tell calls Options.Recover, or the logger if nothing is lost and there is no such function.
func (r *recovery) tell(opts Options) (err error) {
	lost := &plainError{r.Lost, backend.ErrCorrupt}
	if opts.Recover == nil {
		opts.Logger.Warn("API key store found its directory damaged, and nothing lost: "+
			"it has been put in order", "error", lost)
		return nil
	}
	defer func() {
		if p := recover(); p != nil {
			stack := string(debug.Stack())
			opts.Logger.Error("Options.Recover panicked", "panic", p, "stack", stack)
			err = fmt.Errorf("Options.Recover panicked: %v", p)
		}
	}()
	opts.Recover(lost)
	return nil
}

// refuse returns an error if the recovery loses something that nobody was told, and that nobody
// would be told now.
func (r *recovery) refuse(dir string, opts Options) error {
	if r.Whole || opts.Recover != nil {
		return nil
	}
	return fmt.Errorf("%w: %s: a recovery with Options.Recover was interrupted: "+
		"open the directory with Options.Recover, to be told what is lost", backend.ErrCorrupt, dir)
}
