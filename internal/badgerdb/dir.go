package badgerdb

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/dgraph-io/badger/v4/table"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// enter takes the lock of a directory. If the directory is missing, enter makes the directory with
// mode 0700; if mustExist is set, enter returns an error instead. enter changes nothing in an
// existing directory.
func enter(dir string, mustExist bool) (*fsys.Lock, error) {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && mustExist:
		return nil, noStore(dir, "there is no such directory")
	case errors.Is(err, fs.ErrNotExist):
		if err := fsys.MakeAll(dir); err != nil {
			return nil, fmt.Errorf("cannot make the directory: %w", err)
		}
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, fmt.Errorf(
			"%s is a file: name a directory, which will be made if it does not exist", dir)
	}
	lock, err := fsys.LockDir(dir)
	if errors.Is(err, fsys.ErrNoLocks) {
		return nil, errors.New("a store's directory cannot be locked on this system: " +
			"use keystore.New with a backend of your own")
	}
	if errors.Is(err, fsys.ErrLocked) {
		if c, err := listDir(dir); err == nil && !c.commitFile && len(c.badger) > 0 {
			return nil, notAStore(dir, c.badger[0], othersDatabase)
		}
		return nil, lockedError(dir)
	}
	return lock, err
}

// lockedError returns an error that names the process that has the directory open.
func lockedError(dir string) error {
	who := "another process"
	if text, err := os.ReadFile(filepath.Join(dir, fsys.LockName)); err == nil {
		if h, ok := fsys.ParseHolder(string(text)); ok {
			who = h.String()
		}
	}
	return fmt.Errorf("%w: %s has %s open, and only one process at a time can: "+
		"stop that process, or manage the keys through it", backend.ErrLocked, who, dir)
}

// The contents of a directory are the names in the directory, grouped by the program that made the
// files.
type contents struct {
	commitFile bool     // LAST exists
	badger     []string // files with names that Badger makes
	data       string   // the name of a manifest, a table or a log; empty without such a file
	manifest   bool     // the manifest exists
	recoveries []string // names that look like the directory of a recovery; see recovery
	inTheWay   string   // a foreign file that Badger would try to read as a Badger file, and fail
	foreign    string   // a file of another program or user
}

func listDir(dir string) (c contents, err error) {
	files, err := os.ReadDir(dir)
	for _, f := range files {
		name := f.Name()
		const noFile = fs.ModeDir | fs.ModeNamedPipe | fs.ModeSocket | fs.ModeDevice
		kind := badgerfile.Kind(name)
		known := kind != "" || name == commitfile.Name || name == fsys.LockName
		switch {
		case known && f.Type()&noFile != 0:
			c.foreign, c.inTheWay = name, name
		case kind != "":
			c.badger = append(c.badger, name)
			switch kind {
			case badgerfile.ManifestFile, badgerfile.TableFiles, badgerfile.LogFiles:
				c.data = name
			}
			c.manifest = c.manifest || kind == badgerfile.ManifestFile
		case name == commitfile.Name:
			c.commitFile = true
		case name == "lost+found": // belongs to the root of a file system
		case name == fsys.LockName: // left by an Open that ended early
			if text, err := os.ReadFile(filepath.Join(dir, name)); err == nil && len(text) > 0 {
				if _, ok := fsys.ParseHolder(string(text)); !ok {
					c.foreign = name
				}
			}
		default:
			c.foreign = name
			_, isTable := table.ParseFileID(name) // such as 7.sst
			isLog := strings.HasSuffix(name, badgerfile.LogFiles)
			if isTable || isLog || strings.HasSuffix(name, badgerfile.ValueLogs) {
				c.inTheWay = name
			}
			if isRecoveryName(name) {
				c.recoveries = append(c.recoveries, name)
			}
		}
	}
	return c, err
}

// mayWrite returns an error if this process cannot write a file of the store. Without this check
// Badger would fail in the middle of its work. The error of Badger would not name the owner of the
// file.
func (c contents) mayWrite(dir string) error {
	names := c.badger
	if c.commitFile {
		names = append([]string{commitfile.Name}, names...)
	}
	for _, name := range names {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_ = f.Close() // nothing was written
	}
	return nil
}

// mayMake returns an error unless the directory, which has no files of a store, may become a new
// store. kind is that of LAST.
func (c contents) mayMake(dir string, kind commitfile.Kind, mustExist bool) error {
	switch {
	case kind == commitfile.Unknown:
		return notAStore(dir, commitfile.Name, othersFile)
	case len(c.badger) > 0:
		return notAStore(dir, c.badger[0], othersDatabase)
	case c.foreign != "":
		return notAStore(dir, c.foreign, othersFile)
	case mustExist:
		return noStore(dir, "the directory is empty")
	}
	return nil
}

// lacks returns an error if the directory of a store has no LAST or no manifest.
func (c contents) lacks(dir string, isNew bool) error {
	switch {
	case c.data != "" && !c.commitFile && !isNew:
		return missing(dir, c.data, commitfile.Name)
	case c.data != "" && !c.manifest:
		return missing(dir, c.data, badgerfile.ManifestFile)
	}
	return nil
}

// A messageError wraps an error, and replaces the text of the error.
type messageError struct {
	text string
	err  error
}

func (e *messageError) Error() string { return e.text }
func (e *messageError) Unwrap() error { return e.err }

// The reasons why a directory does not belong to a store.
const (
	othersFile     = "no store has made that"
	othersDatabase = "another program has its Badger database there"
)

func noStore(dir, why string) error {
	return &messageError{
		fmt.Sprintf("no key store exists in %s: %s: is the path right, and the volume mounted?",
			dir, why),
		fs.ErrNotExist,
	}
}

func notAStore(dir, has, why string) error {
	return fmt.Errorf("%s is not a key store: it holds %s: %s: name a directory that is the "+
		"store's own, which will be made if it does not exist", dir, has, why)
}

func missing(dir, has, lacks string) error {
	return fmt.Errorf("%w: %s holds %s and no %s: restore the missing file, or the directory, "+
		"from a backup, or open what is left with Options.Recover",
		backend.ErrCorrupt, dir, has, lacks)
}

// claim restricts the directory to its owner, because Badger makes some files readable for all
// users. claim also writes into the file LOCK which process has the directory open. open calls
// claim before the first change of the directory.
func (db *DB) claim() error {
	info, err := os.Stat(db.dir)
	if err != nil {
		return err
	}
	if runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		if err := os.Chmod(db.dir, 0o700); err != nil {
			return chmodError(db.dir, info, err)
		}
	}
	return db.lock.Announce()
}

// chmodError explains what to do about a directory that other users may enter, if this process
// cannot change the mode.
func chmodError(dir string, info fs.FileInfo, err error) error {
	if fsys.IsReadOnly(err) {
		return err
	}
	text := fmt.Sprintf("others than its owner may enter %s (mode %v), and this process cannot "+
		"change that", dir, info.Mode())
	c, listErr := listDir(dir)
	switch holdsStore := c.commitFile || len(c.badger) > 0; {
	case listErr == nil && !holdsStore && fsys.MayMakeFiles(dir):
		text += ": name a directory inside it, which will be made"
	case holdsStore: // a directory inside would be a new store without keys
		text = cmp.Or(whose(dir, dir), text)
	default:
		text = cmp.Or(whose(dir, dir), text+": run chmod 700 on it as its owner")
	}
	return &messageError{fmt.Sprintf("%s: %v", text, err), err}
}

// explain adds advice to an error of the operating system: what is wrong with the directory, and
// what to do.
func explain(dir string, err error) error {
	if errors.As(err, new(*messageError)) { // the text already contains the advice
		return err
	}
	path := dir
	if e := new(fs.PathError); errors.As(err, &e) {
		path = e.Path
	}
	switch {
	case fsys.IsReadOnly(err):
		return fmt.Errorf("%s is on a read-only file system, and a store has to write, also to be "+
			"read: mount the file system for writing, or name a directory elsewhere: %w", dir, err)
	case errors.Is(err, fs.ErrPermission):
		if text := whose(dir, path); text != "" {
			return fmt.Errorf("%s: %w", text, err)
		}
	}
	return err
}

// whose names the owner of a file that this process may not access, and explains how to get access.
// The result is empty if the owner is unknown.
func whose(dir, path string) string {
	info, err := os.Stat(path)
	for err != nil && path != filepath.Dir(path) {
		path = filepath.Dir(path) // path is missing or not accessible: look at its parent
		info, err = os.Stat(path)
	}
	if err != nil {
		return ""
	}
	uid, ok := fsys.Owner(info)
	me := os.Geteuid()
	if !ok || me < 0 {
		return ""
	}
	text := fmt.Sprintf("%s (mode %v) belongs to %s, and this process runs as %s",
		path, info.Mode(), userName(uid), userName(me))
	_, err = os.Lstat(filepath.Join(dir, commitfile.Name))
	switch inside := path == dir || strings.HasPrefix(path, dir+string(filepath.Separator)); {
	case uid == me:
		return text + ": its mode, an attribute or a security module denies the access"
	case inside && err == nil:
		return fmt.Sprintf("%s: stop any process of that user's that uses the store, and run "+
			"chown -R %d %q as root", text, me, dir)
	case inside:
		return text + ": name a directory of the process's own user, or give that user this one"
	default:
		return text + ": name a directory where the process's user may make files"
	}
}

func userName(uid int) string {
	if uid == 0 {
		return "root (uid 0)"
	}
	return fmt.Sprintf("uid %d", uid)
}

// openError explains an error of Badger.
func openError(dir string, err error) error {
	if errors.Is(err, y.ErrChecksumMismatch) {
		return fmt.Errorf("%w: %s: restore it from a backup: %w", backend.ErrCorrupt, dir, err)
	}
	return fmt.Errorf("%s: %w", dir, err)
}
