package badgerdb

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/windows"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// lockOffset is far behind what is written, because what is locked cannot be read by others, to copy it for example.
const lockOffset = 1 << 30

// lock takes the lock of a file, which goes with it when it is closed, or its process dies.
func lock(f *os.File) error {
	err := windows.LockFileEx(windows.Handle(f.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY,
		0, 1, 0, &windows.Overlapped{Offset: lockOffset})
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return backend.ErrLocked
	}
	if err != nil {
		return fmt.Errorf("cannot lock %s: %w", f.Name(), err)
	}
	return nil
}

func unlock(*os.File) {}
