//go:build linux || darwin || freebsd

package fsys

import (
	"math"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"
)

// Disk returns how many bytes may still be written to the file system of dir, and the total size of
// the file system. ok is false if the sizes are unknown.
func Disk(dir string) (free, total int64, ok bool) {
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) != nil {
		return 0, 0, false
	}
	return inBytes(st)
}

func inBytes(st unix.Statfs_t) (free, total int64, ok bool) {
	if st.Blocks == 0 { // a tmpfs without a limit, or a file system without figures
		return 0, 0, false
	}
	size := func(blocks uint64) int64 {
		high, low := bits.Mul64(blocks, blockSize(st))
		if high != 0 || low > math.MaxInt64 {
			return math.MaxInt64
		}
		return int64(low)
	}
	// Bavail is below 0 where only root may use the remaining space.
	available := int64(st.Bavail)
	return size(uint64(max(0, available))), size(st.Blocks), true
}

// MapFile returns the content of a file. data is valid until unmap is called. A disk error is a
// fault when data is read.
func MapFile(path string) (data []byte, unmap func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close() // the mapping remains
	info, err := f.Stat()
	if err != nil || info.Size() == 0 { // an empty file cannot be mapped
		return nil, func() {}, err
	}
	data, err = unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, &os.PathError{Op: "mmap", Path: path, Err: err}
	}
	return data, func() { _ = unix.Munmap(data) }, nil
}
