//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package fsys

import (
	"errors"
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// Owner returns the user that owns a file.
func Owner(info fs.FileInfo) (uid int, ok bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(st.Uid), true
}

// MayMakeFiles reports whether the user of this process may make files in a directory.
func MayMakeFiles(dir string) bool { return unix.Access(dir, unix.W_OK|unix.X_OK) == nil }

// IsReadOnly reports whether an error means that a file system is read-only.
func IsReadOnly(err error) bool { return errors.Is(err, syscall.EROFS) }
