//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package admin

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
)

// lockDir waits for the lock of a directory, and returns a function that releases the lock. Other
// processes that call ListenUnix hold the lock for a moment. A process that has a key store open in
// the directory holds the lock all the time, so lockDir does not wait for long.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for wait := time.Millisecond; ; wait *= 2 {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return func() {
				// A child process may have a copy of the descriptor for a moment.
				_ = syscall.Flock(int(f.Fd()), syscall.LOCK_UN)
				f.Close()
			}, nil
		case err != syscall.EWOULDBLOCK:
			f.Close()
			return nil, fmt.Errorf("cannot lock the directory %s: %w", dir, err)
		case wait > time.Second:
			f.Close()
			return nil, fmt.Errorf("another program has locked the directory %s: the socket cannot "+
				"be in the directory of a key store, so use another directory", dir)
		}
		time.Sleep(wait)
	}
}

// shortPath returns a path of the file bound in the directory fresh that is short enough for a
// socket, for as long as done was not called.
func shortPath(fresh, bound string) (path string, done func(), err error) {
	if len(bound) <= maxSocketPath {
		return bound, func() {}, nil
	}
	if runtime.GOOS != "linux" {
		return "", nil, fmt.Errorf("the path leaves no space for a temporary name of %d bytes: "+
			"a socket can have %d at most, so use a shorter path", len(bound), maxSocketPath)
	}
	f, err := os.Open(fresh)
	if err != nil {
		return "", nil, err
	}
	return fmt.Sprintf("/proc/self/fd/%d/s", f.Fd()), func() { f.Close() }, nil
}
