package fsys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
)

// MakeAll makes a missing directory and its missing parents, like os.MkdirAll, and makes the new
// directories durable.
func MakeAll(dir string) error {
	parent := filepath.Dir(dir)
	if _, err := os.Stat(parent); errors.Is(err, fs.ErrNotExist) {
		if err := MakeAll(parent); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return SyncDir(parent)
}

// SyncDir makes the names in a directory durable.
func SyncDir(dir string) error {
	if runtime.GOOS == "windows" { // cannot sync a directory, and does not need to
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// MoveFile moves a file to another directory, and never overwrites another file.
func MoveFile(name, from, to string) error {
	target := filepath.Join(to, name)
	if _, err := os.Lstat(target); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is in the way: %w", target, fs.ErrExist)
	}
	return os.Rename(filepath.Join(from, name), target)
}
