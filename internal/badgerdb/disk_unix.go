//go:build linux || darwin || freebsd

package badgerdb

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// disk returns how many bytes may still be written to the file system of dir, and how many it has in all. False means
// that nobody knows.
func disk(dir string) (free, total int64, ok bool) {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0, 0, false
	}
	return int64(st.Bavail) * int64(st.Bsize), int64(st.Blocks) * int64(st.Bsize), true
}

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
