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

// mapFile returns what a file holds, until unmap is called. An error of the disk is a fault when it is read.
func mapFile(path string) (data []byte, unmap func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close() // the mapping stays
	info, err := f.Stat()
	if err != nil || info.Size() == 0 { // which cannot be mapped
		return nil, func() {}, err
	}
	data, err = unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, &os.PathError{Op: "mmap", Path: path, Err: err}
	}
	return data, func() { _ = unix.Munmap(data) }, nil
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
