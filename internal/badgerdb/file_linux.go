package badgerdb

import (
	"os"
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

// allocate gives f the first size bytes of space on the disk, whatever its length, so that no write there can find the
// disk full. False means that the file system cannot, or has no room.
func allocate(f *os.File, size int64) bool {
	const keepSize = 1 // FALLOC_FL_KEEP_SIZE
	return syscall.Fallocate(int(f.Fd()), keepSize, 0, size) == nil
}

// blockSize is what the file system counts in, which is not always the size that it likes to transfer.
func blockSize(st unix.Statfs_t) uint64 {
	if st.Frsize > 0 {
		return uint64(st.Frsize)
	}
	return uint64(st.Bsize)
}
