//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package badgerdb

import (
	"errors"
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// owner returns the user that owns a file.
func owner(info fs.FileInfo) (uid int, ok bool) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return int(st.Uid), true
}

// mayMakeFiles reports whether the user of this process may make files in a directory.
func mayMakeFiles(dir string) bool { return unix.Access(dir, unix.W_OK|unix.X_OK) == nil }

func isReadOnly(err error) bool { return errors.Is(err, syscall.EROFS) }
