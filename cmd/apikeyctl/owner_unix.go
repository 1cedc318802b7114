//go:build unix

package main

import (
	"io/fs"
	"syscall"
)

// ownerOf returns the name of the user that a file belongs to.
func ownerOf(info fs.FileInfo) string {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return userName(int(stat.Uid))
	}
	return "another user"
}
