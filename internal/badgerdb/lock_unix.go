//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package badgerdb

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A dirLock is the lock of a directory. The lock is the one that Badger takes, so that no program
// that uses Badger opens the directory meanwhile. The lock ends with the process.
type dirLock struct {
	dir       *os.File
	announced bool
}

// lockDir takes the lock, and changes nothing in the directory. The error wraps ErrLocked, or is
// the operating system's.
func lockDir(dir string) (*dirLock, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if err == syscall.EWOULDBLOCK {
			return nil, errors.Join(backend.ErrLocked, f.Close())
		}
		return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", dir, err), f.Close())
	}
	return &dirLock{dir: f}, nil
}

// announce writes into the file LOCK which process has the directory open. The file of a process
// that was killed is replaced, whoever owns the file.
func (l *dirLock) announce() error {
	path := filepath.Join(l.dir.Name(), lockName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l.announced = true
	return os.WriteFile(path, thisProcess().encode(), 0o600)
}

// release gives the lock back. The explicit unlock is needed where this process is just starting a
// child, which has a copy of the file descriptor for a moment.
func (l *dirLock) release() error {
	var err error
	if l.announced {
		if err = os.Remove(filepath.Join(l.dir.Name(), lockName)); errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	_ = syscall.Flock(int(l.dir.Fd()), syscall.LOCK_UN)
	return errors.Join(err, l.dir.Close())
}
