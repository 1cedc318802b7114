//go:build unix

package work

import (
	"io/fs"
	"syscall"
)

// blocks returns how many bytes are allocated for a file.
func blocks(info fs.FileInfo) int64 {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int64(st.Blocks) * 512
	}
	return info.Size()
}
