package fsys

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/windows"
)

// A Lock is the lock of a directory. The lock is the file LOCK. Only one process can have LOCK
// open. Badger takes the same lock. So no other program with Badger can open the directory while
// this process holds the lock. Windows removes LOCK when the process ends.
type Lock struct{ file windows.Handle }

// LockDir takes the lock. The error wraps ErrLocked, or is an error of the operating system.
func LockDir(dir string) (*Lock, error) {
	path := filepath.Join(dir, LockName)
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return nil, err
	}
	h, err := windows.CreateFile(name, 0, 0, nil, windows.OPEN_ALWAYS,
		windows.FILE_ATTRIBUTE_TEMPORARY|windows.FILE_FLAG_DELETE_ON_CLOSE, 0)
	if errors.Is(err, windows.ERROR_SHARING_VIOLATION) {
		return nil, ErrLocked
	}
	if err != nil {
		return nil, &os.PathError{Op: "lock", Path: path, Err: err}
	}
	return &Lock{h}, nil
}

// Announce does nothing, because no other process could read the file.
func (*Lock) Announce() error { return nil }

// Release releases the lock.
func (l *Lock) Release() error { return windows.CloseHandle(l.file) }
