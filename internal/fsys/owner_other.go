//go:build !darwin && !dragonfly && !freebsd && !linux && !netbsd && !openbsd

package fsys

import "io/fs"

// Owner returns false, because files have no owner with a number on this system.
func Owner(fs.FileInfo) (uid int, ok bool) { return 0, false }

// MayMakeFiles returns true: the answer is not known on this system.
func MayMakeFiles(string) bool { return true }

// IsReadOnly returns false: the answer is not known on this system.
func IsReadOnly(error) bool { return false }
