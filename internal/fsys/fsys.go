// Package fsys asks the operating system for what Go's package os does not offer: the lock of a
// directory and the process that holds the lock, durable directories and files, the space on a
// disk, mapped files, and the owner of a file. Each file of this package ends with the systems for
// which the file is built.
//
// Package fsys knows nothing of the store, and nothing of the names or the formats of the store's
// files. The only exception is the file LOCK, which belongs to the lock. So package fsys imports no
// package of this module.
package fsys

import "errors"

var (
	// ErrLocked means that another process, or another caller in this process, holds the lock of a
	// directory.
	ErrLocked = errors.New("the directory is locked")

	// ErrNoLocks means that this system cannot lock a directory.
	ErrNoLocks = errors.New("this system cannot lock a directory")
)
