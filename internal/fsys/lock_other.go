//go:build !darwin && !dragonfly && !freebsd && !linux && !netbsd && !openbsd && !windows

package fsys

// A Lock is the lock of a directory.
type Lock struct{}

// LockDir returns ErrNoLocks: without a lock two processes could write to the same directory.
func LockDir(string) (*Lock, error) { return nil, ErrNoLocks }

// Announce does nothing.
func (*Lock) Announce() error { return nil }

// Release does nothing.
func (*Lock) Release() error { return nil }
