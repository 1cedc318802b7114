//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package badgerdb

import (
	"fmt"
	"os"
	"syscall"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// lock takes the lock of a file, which goes with it when it is closed, or its process dies.
func lock(f *os.File) error {
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		if err == syscall.EWOULDBLOCK {
			return backend.ErrLocked
		}
		return fmt.Errorf("cannot lock %s: %w", f.Name(), err)
	}
	return nil
}

// unlock gives the lock back at once, and not only when the last child that this process is starting has closed its copy of f.
func unlock(f *os.File) { _ = syscall.Flock(int(f.Fd()), syscall.LOCK_UN) }
