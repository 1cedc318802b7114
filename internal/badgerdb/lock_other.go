//go:build !darwin && !dragonfly && !freebsd && !linux && !netbsd && !openbsd && !windows

package badgerdb

import (
	"errors"
	"os"
)

// Without a lock two processes would write one directory.
func lock(*os.File) error {
	return errors.New("a store's directory cannot be locked on this system: use keystore.New with a backend of your own")
}

func unlock(*os.File) {}
