//go:build unix

package work

import (
	"io/fs"
	"syscall"
)

// blocks returns the number of bytes that the file system has allocated for a file.
func blocks(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int64(st.Blocks) * 512
	}
	return info.Size()
}
