//go:build !darwin && !dragonfly && !freebsd && !linux && !netbsd && !openbsd && !windows

package badgerdb

import "errors"

type dirLock struct{}

// lockDir returns an error: without a lock two processes could write to the same directory.
func lockDir(string) (*dirLock, error) {
	return nil, errors.New("a store's directory cannot be locked on this system: " +
		"use keystore.New with a backend of your own")
}

func (*dirLock) announce() error { return nil }

func (*dirLock) release() error { return nil }
