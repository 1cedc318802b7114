package badgerdb

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// datasync makes what was written to f durable. Times of the file are left out.
func datasync(f *os.File) error {
	for {
		if err := syscall.Fdatasync(int(f.Fd())); err != syscall.EINTR {
			return os.NewSyscallError("fdatasync", err)
		}
	}
}

const keepSize = 1 // FALLOC_FL_KEEP_SIZE

// allocate gives f the first size bytes of space on the disk, whatever its length, so that no write there can find the
// disk full. False means that the file system cannot, or has no room.
func allocate(f *os.File, size int64) bool {
	return !copiesOnWrite(filepath.Dir(f.Name())) && fallocate(int(f.Fd()), size) == nil
}

func fallocate(fd int, size int64) error {
	for {
		if err := syscall.Fallocate(fd, keepSize, 0, size); err != syscall.EINTR {
			return err
		}
	}
}

// copiesOnWrite reports whether the file system of dir writes each block to a new place, be it to allocated space.
func copiesOnWrite(dir string) bool {
	const bcachefs = 0xca451a4e
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && (uint32(st.Type) == unix.BTRFS_SUPER_MAGIC || uint32(st.Type) == bcachefs)
}

// probe returns ENOSPC or EDQUOT if a file in dir cannot have so many bytes of space, now. Nil means that it can, or that
// the file system does not tell. On a tmpfs nothing is tried: its size is its only limit, and allocated space is memory.
func probe(dir string, size int64) error {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && uint32(st.Type) == unix.TMPFS_MAGIC {
		return nil
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		err = fallocate(fd, size)
		_ = unix.Close(fd)      // which gives the space back
		if copiesOnWrite(dir) { // and only this does it there: else it is counted for a while, and others find none
			err = errors.Join(err, syncFileSystem(dir))
		}
	}
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		if errors.Is(err, full) {
			return full
		}
	}
	return nil
}

// syncFileSystem makes what was written durable, and gives back the blocks of what was removed.
func syncFileSystem(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Syncfs(fd)
}

// blockSize is what the file system counts in, which is not always the size that it likes to transfer.
func blockSize(st unix.Statfs_t) uint64 {
	if st.Frsize > 0 {
		return uint64(st.Frsize)
	}
	return uint64(st.Bsize)
}
