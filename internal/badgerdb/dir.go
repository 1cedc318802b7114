package badgerdb

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// prepare makes dir ready for Badger: a directory of the store's own, which only its owner may enter, since Badger
// makes some of its files readable for all.
//
//	missing                   it is made, with mode 0700, and its parents
//	empty, or a store's       its mode is made 0700
//	anything else             it is refused and not touched: /tmp must not lose its mode, and tables without a manifest, or
//	                          without a LAST, are what is left of a damaged store, which Badger would delete
func prepare(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeAll(dir); err != nil {
			return fmt.Errorf("cannot make the directory: %w", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is a file: name a directory, which will be made if it does not exist", dir)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if err := checkContents(dir, files); err != nil {
		return err
	}
	if runtime.GOOS == "windows" || info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("others than its owner may enter %s (mode %v), and that cannot be changed: "+
			"run chmod 700 on it as its owner, or name a directory inside it: %w", dir, info.Mode().Perm(), err)
	}
	return nil
}

// makeAll is os.MkdirAll for a directory that is missing, and makes what it makes durable.
func makeAll(dir string) error {
	parent := filepath.Dir(dir)
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := makeAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(parent)
}

func checkContents(dir string, files []fs.DirEntry) error {
	has := make(map[string]bool)
	data, foreign := "", ""
	for _, f := range files {
		name := f.Name()
		has[name] = true
		switch {
		case name == badger.ManifestFilename, strings.HasSuffix(name, ".sst"), strings.HasSuffix(name, ".mem"):
			data = name
		case strings.HasSuffix(name, ".vlog"), name == "KEYREGISTRY", name == "DISCARD", name == "MANIFEST-REWRITE": // Badger's
		case name == lastName, name == "LOCK", name == "lost+found": // ours; of an opener that got no further; of a file system's root
		default:
			foreign = name
		}
	}
	switch {
	case has[recovered], has[moving]:
		return nil
	case has[lastName] && (has[badger.ManifestFilename] || data == ""):
		return nil
	case has[lastName]:
		return missing(dir, data, badger.ManifestFilename)
	case data != "":
		return missing(dir, data, lastName)
	case foreign != "":
		return fmt.Errorf("%s is not a key store: it holds %s: name a directory that is the store's own", dir, foreign)
	}
	return nil
}

func missing(dir, has, lacks string) error {
	return fmt.Errorf("%w: %s holds %s and no %s: restore the missing file, or the directory, from a backup, or open what "+
		"is left with Options.Recover", backend.ErrCorrupt, dir, has, lacks)
}

// openError explains an error of Badger's.
func openError(dir string, err error) error {
	switch {
	// Badger has no error value for it.
	case strings.Contains(err.Error(), "Cannot acquire directory lock"):
		return locked(dir)
	case errors.Is(err, y.ErrChecksumMismatch):
		return fmt.Errorf("%w: %s: restore it from a backup: %w", backend.ErrCorrupt, dir, err)
	default:
		return fmt.Errorf("%s: %w", dir, err)
	}
}

func locked(dir string) error {
	return fmt.Errorf("%w: %s has %s open, and only one process at a time can: stop it, or manage the keys through it",
		backend.ErrLocked, holder(dir), dir)
}

// holder names the process that has the directory locked, from the file in which Badger writes its number.
func holder(dir string) string {
	text, err := os.ReadFile(filepath.Join(dir, "LOCK"))
	pid, convErr := strconv.Atoi(strings.TrimSpace(string(text)))
	switch {
	case err != nil || convErr != nil:
		return "another process"
	case pid == os.Getpid():
		return fmt.Sprintf("this process (pid %d)", pid)
	default:
		return fmt.Sprintf("the process with pid %d", pid)
	}
}

// filesOf returns the paths of the files in dir whose names end so, in the order of their names. It is not filepath.Glob,
// to which dir would be a part of the pattern.
func filesOf(dir, suffix string) ([]string, error) {
	files, err := os.ReadDir(dir)
	var paths []string
	for _, f := range files {
		if strings.HasSuffix(f.Name(), suffix) {
			paths = append(paths, filepath.Join(dir, f.Name()))
		}
	}
	return paths, err
}

func syncDir(dir string) error {
	if runtime.GOOS == "windows" { // it cannot, and need not
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
