package fsys

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Datasync makes the data written to f durable, but not the times of the file.
func Datasync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); err != syscall.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

const keepSize = 1 // FALLOC_FL_KEEP_SIZE

// Allocate gives f the first size bytes of space on the disk, whatever the length of f. So no write
// within these bytes can find the disk full. False means that the file system cannot allocate
// space, or has too little space.
func Allocate(f *os.File, size int64) bool {
	return !CopiesOnWrite(filepath.Dir(f.Name())) && fallocate(int(f.Fd()), size) == nil
}

func fallocate(fd int, size int64) error {
	for {
		if err := syscall.Fallocate(fd, keepSize, 0, size); err != syscall.EINTR {
			return err
		}
	}
}

// CopiesOnWrite reports whether the file system of dir writes each block to a new place, even if
// the space is allocated.
func CopiesOnWrite(dir string) bool {
	const bcachefs = 0xca451a4e
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil &&
		(uint32(st.Type) == unix.BTRFS_SUPER_MAGIC || uint32(st.Type) == bcachefs)
}

// Probe returns ENOSPC or EDQUOT if a file in dir cannot get size bytes of space now. Nil means
// that a file can get the space, or that the file system does not report a lack. On a tmpfs Probe
// tries nothing: the size of a tmpfs is its only limit, and allocated space is memory.
func Probe(dir string, size int64) error {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && uint32(st.Type) == unix.TMPFS_MAGIC {
		return nil
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		err = fallocate(fd, size)
		_ = unix.Close(fd) // gives the space back
		// A copy-on-write file system gives the space back only with a sync. Without the sync the
		// space counts as used for a while, and other writers find no space.
		if CopiesOnWrite(dir) {
			err = errors.Join(err, SyncFileSystem(dir))
		}
	}
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		if errors.Is(err, full) {
			return full
		}
	}
	return nil
}

// SyncFileSystem makes written data durable, and gives back the blocks of removed files.
func SyncFileSystem(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// blockSize is the unit in which the file system counts. The unit is not always the preferred size
// of a transfer.
func blockSize(st unix.Statfs_t) uint64 {
	if st.Frsize > 0 {
		return uint64(st.Frsize)
	}
	return uint64(st.Bsize)
}
