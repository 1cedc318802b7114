package badgerdb

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/windows"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A dirLock is the lock of a directory. The lock is the file LOCK. Only one process can have LOCK
// open. Badger takes the same lock. So no other program with Badger can open the directory while
// this process holds the lock. Windows removes LOCK when the process ends.
type dirLock struct{ file windows.Handle }

// lockDir takes the lock. The error wraps ErrLocked, or is an error of the operating system.
func lockDir(dir string) (*dirLock, error) {
	path := filepath.Join(dir, lockName)
	name, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return nil, err
	}
	h, err := windows.CreateFile(name, 0, 0, nil, windows.OPEN_ALWAYS,
		windows.FILE_ATTRIBUTE_TEMPORARY|windows.FILE_FLAG_DELETE_ON_CLOSE, 0)
	if errors.Is(err, windows.ERROR_SHARING_VIOLATION) {
		return nil, backend.ErrLocked
	}
	if err != nil {
		return nil, &os.PathError{Op: "lock", Path: path, Err: err}
	}
	return &dirLock{h}, nil
}

// announce does nothing, because no other process could read the file.
func (*dirLock) announce() error { return nil }

func (l *dirLock) release() error { return windows.CloseHandle(l.file) }
