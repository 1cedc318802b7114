//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package fsys

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// A Lock is the lock of a directory. Badger takes the same lock. So no other program with Badger
// can open the directory while this process holds the lock. The lock ends with the process.
type Lock struct {
	dir       *os.File
	announced bool
}

// LockDir takes the lock, and changes nothing in the directory. The error wraps ErrLocked, or is an
// error of the operating system.
func LockDir(dir string) (*Lock, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if err == syscall.EWOULDBLOCK {
			return nil, errors.Join(ErrLocked, f.Close())
		}
		return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", dir, err), f.Close())
	}
	return &Lock{dir: f}, nil
}

// Announce writes into the file LOCK which process has the directory open. Announce replaces the
// file of a killed process, even if another user owns the file.
func (l *Lock) Announce() error {
	path := filepath.Join(l.dir.Name(), LockName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l.announced = true
	return os.WriteFile(path, ThisProcess().Encode(), 0o600)
}

// Release releases the lock. The explicit unlock is needed if this process is starting a child: the
// child has a copy of the file descriptor for a moment.
func (l *Lock) Release() error {
	var err error
	if l.announced {
		if err = os.Remove(filepath.Join(l.dir.Name(), LockName)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	_ = syscall.Flock(int(l.dir.Fd()), syscall.LOCK_UN)
	return errors.Join(err, l.dir.Close())
}
