package badgerdb

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A recovery makes a new database from a damaged database. The sources are:
//
//   - every table, even a table that the manifest does not name
//   - every log, up to the damage in the log
//   - the last commits, from the file LAST
//
// The recovery keeps the newest version of each entry. If the newest version is damaged, the
// recovery drops the entry, because an older version may show a key as valid that was revoked
// later.
//
// The recovery makes the new database in the directory recovering-<time> inside the store's
// directory. The file RECOVERY in recovering-<time> describes the recovery. Only a store writes
// RECOVERY, and RECOVERY has a checksum. Each step is durable before the next step begins:
//
//  1. RECOVERY names the store, and no files: the recovery is being written. A later recovery
//     removes an earlier recovery in this state.
//  2. The new database is written and surveyed. RECOVERY names the new files with their checksums,
//     and the summary in LAST before and after the recovery. The store's files have not changed.
//  3. The directory damaged-<time> is made. From here on Open finishes the recovery. Open first
//     compares every file with its checksum. The damaged files move to damaged-<time>. The store's
//     owner may examine or remove the damaged files.
//  4. The new files move to their place, and LAST moves at the end. From here on the store is like
//     any other store.
//  5. Options.Recover has returned. The files of recovering-<time> are removed by their names, and
//     RECOVERY is removed at the end.
//
// Open trusts RECOVERY only if LAST has one of the two summaries. Anything else with such a name
// does not belong to the store. The store does not read, move or remove foreign files.
//
// After a recovery Open starts again: open calls recoverOrFail, recoverOrFail calls salvage and
// replace, and then recoverOrFail calls open.
type recovery struct {
	work  string            // the directory recovering-<time>
	away  string            // the directory damaged-<time>, for the damaged files
	crash func(step string) // for tests; otherwise nil

	recoveryFile
}

// A recoveryFile is the content of RECOVERY, encoded as JSON after a magic and a SHA-256.
type recoveryFile struct {
	Store []byte // the store's identity, as in a summary; zeros if the identity is unknown
	Was   []byte // the newest summary in LAST before the recovery; zero if LAST had none
	Must  []byte // the summary in LAST after the recovery
	Whole bool   // the recovery certainly loses nothing
	Lost  string // text about the damage, and about the recovered data
	Files []recovered
}

// A recovered is a file of the new database.
type recovered struct {
	Name string
	Sum  []byte // SHA-256
}

const (
	recoveryName    = "RECOVERY"
	recoveryNewName = "RECOVERY.new" // will be renamed to RECOVERY
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

// newRecovery makes the directory of a recovery, and writes RECOVERY into the directory.
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
	if err := errors.Join(r.write(), fsys.SyncDir(dir)); err != nil {
		return nil, errors.Join(err, r.discard())
	}
	return r, nil
}

// readRecovery returns the recovery with the given name in dir. The result is nil if no store wrote
// a recovery with this name.
func readRecovery(dir, name string) (*recovery, error) {
	work := filepath.Join(dir, name)
	if info, err := os.Lstat(work); err != nil || !info.IsDir() {
		return nil, nil
	}
	data, err := os.ReadFile(filepath.Join(work, recoveryName))
	if errors.Is(err, fs.ErrNotExist) {
		data, err = os.ReadFile(filepath.Join(work, recoveryNewName)) // a crash before the rename
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
		if f.Name != commitfile.Name && badgerfile.Kind(f.Name) == "" {
			return nil, nil
		}
	}
	return r, nil
}

// write writes RECOVERY, and makes RECOVERY durable.
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
	return fsys.SyncDir(r.work)
}

func (r *recovery) step(name string) {
	if r.crash != nil {
		r.crash(name)
	}
}

// The stages of a recovery.
type stage int

const (
	unbelieved stage = iota // RECOVERY does not belong to the present LAST
	unfinished              // no file has been replaced: the recovery can be removed
	begun                   // the replacement of the damaged files has begun
	replaced                // all damaged files have been replaced
)

func (r *recovery) stage(dir string) (stage, error) {
	_, err := os.Lstat(r.away)
	away := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	in := dir
	_, err = os.Lstat(filepath.Join(dir, commitfile.Name))
	if away && errors.Is(err, fs.ErrNotExist) {
		in = r.away // LAST may have moved to r.away already
	}
	newest, err := commitfile.Newest(in)
	if err != nil {
		return 0, err
	}
	switch now := newest.Append(nil); {
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

// begunRecovery returns the recovery that has begun to replace the files of a directory, and its
// stage. The result is nil if there is no such recovery.
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

// discardUnfinished removes the recoveries of a store that have not replaced any file.
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

// discard removes the files of a recovery, and no other files.
func (r *recovery) discard() error {
	files, err := os.ReadDir(r.work)
	if err != nil {
		return err
	}
	for _, f := range files {
		if name := f.Name(); name == commitfile.Name || badgerfile.Kind(name) != "" {
			if err := os.Remove(filepath.Join(r.work, name)); err != nil {
				return err
			}
			r.step("removed " + name)
		}
	}
	if err := fsys.SyncDir(r.work); err != nil {
		return err
	}
	for _, name := range []string{recoveryNewName, recoveryName} {
		err := os.Remove(filepath.Join(r.work, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	r.step("removed " + recoveryName)
	_ = os.Remove(r.work) // fails, as intended, if the directory holds a foreign file
	return fsys.SyncDir(filepath.Dir(r.work))
}

// replace moves the damaged files away, and moves the files of the recovery to their place. If a
// crash has interrupted an earlier replace, replace continues the work. If a file of the recovery
// does not match its checksum, replace returns an error and changes nothing.
func (r *recovery) replace(dir string, claim func() error) error {
	waiting := make(map[string]bool) // true for the new files that have not moved yet
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
		return fmt.Errorf("%w: %s: a recovery was interrupted, and cannot continue: restore the "+
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
	if err := fsys.SyncDir(dir); err != nil {
		return err
	}
	r.step("made the directory of the damaged files")
	c, err := listDir(dir)
	if err != nil {
		return err
	}
	names := c.badger
	if c.commitFile {
		names = append(names, commitfile.Name)
	}
	for _, name := range names {
		if isWaiting, isNew := waiting[name]; isNew && !isWaiting {
			continue // the new file has moved to its place already
		}
		if err := fsys.MoveFile(name, dir, r.away); err != nil {
			return err
		}
		r.step("moved the damaged " + name)
	}
	if err := errors.Join(fsys.SyncDir(r.away), fsys.SyncDir(dir)); err != nil {
		return err
	}
	for _, f := range r.Files { // LAST is the final file in r.Files
		if !waiting[f.Name] {
			continue
		}
		if f.Name == commitfile.Name {
			if err := errors.Join(fsys.SyncDir(dir), fsys.SyncDir(r.work)); err != nil {
				return err
			}
		}
		if err := fsys.MoveFile(f.Name, r.work, dir); err != nil {
			return err
		}
		r.step("moved the new " + f.Name)
	}
	return errors.Join(fsys.SyncDir(dir), fsys.SyncDir(r.work))
}

// report reports the recovery to Options.Recover. If Options.Recover is nil, the recovery loses
// nothing, and report writes to the log instead.
func (r *recovery) report(opts Options) (err error) {
	lost := &messageError{r.Lost, backend.ErrCorrupt}
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

// refuse returns an error if the recovery loses data and Options.Recover is nil. The loss is not
// reported yet, and without Options.Recover Open could not report the loss now.
func (r *recovery) refuse(dir string, opts Options) error {
	if r.Whole || opts.Recover != nil {
		return nil
	}
	return fmt.Errorf("%w: %s: a recovery with Options.Recover was interrupted: "+
		"open the directory with Options.Recover, which reports what is lost",
		backend.ErrCorrupt, dir)
}

// sumFile returns the SHA-256 of a file. If isNew is set, sumFile also makes the file durable.
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
