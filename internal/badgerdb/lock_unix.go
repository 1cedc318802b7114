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

// A dirLock is the lock of a directory. Badger takes the same lock. So no other program with Badger
// can open the directory while this process holds the lock. The lock ends with the process.
type dirLock struct {
	dir       *os.File
	announced bool
}

// lockDir takes the lock, and changes nothing in the directory. The error wraps ErrLocked, or is an
// error of the operating system.
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

// announce writes into the file LOCK which process has the directory open. announce replaces the
// file of a killed process, even if another user owns the file.
func (l *dirLock) announce() error {
	path := filepath.Join(l.dir.Name(), lockName)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	l.announced = true
	return os.WriteFile(path, thisProcess().encode(), 0o600)
}

// release releases the lock. The explicit unlock is needed if this process is starting a child: the
// child has a copy of the file descriptor for a moment.
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
