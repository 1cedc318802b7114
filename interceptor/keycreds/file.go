package keycreds

import (
	"context"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
)

// FromFile returns credentials that send the key in a file, and are otherwise those of [New]. The
// file holds the key alone; white space around the key is cut off.
//
// The file is read when the first call needs the key, and then by the next call that comes a second
// or more after the last reading. So a new key is sent a second after it is there, however it came
// there: by a rename, by the swap of a symbolic link, as Kubernetes mounts secrets (not with
// subPath, which is never updated), or by a write. If a reading fails, or finds no key, the last
// key is sent for one second more, because a file that is written in place is empty for a moment.
// If the next reading fails too, calls fail: with Unavailable and the name of the file if it cannot
// be read, and as those of New if it holds no key. They fail until a reading succeeds.
//
// A file system that hangs holds up one call at a time, or all calls if no key was read yet.
func FromFile(path string, opts ...Option) credentials.PerRPCCredentials {
	f := &file{path: path}
	return FromSource(f.token, opts...)
}

const (
	readInterval = time.Second
	maxFileSize  = 4096 // bytes; more is no key
)

// A file reads a key from time to time.
type file struct {
	path     string
	readLock sync.Mutex // held by the caller who reads the file
	latest   atomic.Pointer[readResult]
}

// A readResult is what was found in the file at a time.
type readResult struct {
	readAt time.Time
	token  string
	err    error
	stale  bool // token is from before, because the file could not be read
}

// token is a source. The credentials check what it returns.
func (f *file) token(context.Context) (string, error) {
	r := f.latest.Load()
	if !r.fresh() {
		if r == nil {
			f.readLock.Lock()
		} else if !f.readLock.TryLock() {
			return r.token, r.err // somebody else reads
		}
		defer f.readLock.Unlock()
		if r = f.latest.Load(); !r.fresh() {
			r = f.read(r)
			f.latest.Store(r)
		}
	}
	return r.token, r.err
}

func (r *readResult) fresh() bool { return r != nil && time.Since(r.readAt) < readInterval }

// read reads the file. The reading before may be nil.
func (f *file) read(before *readResult) *readResult {
	token, err := readFile(f.path)
	r := &readResult{readAt: time.Now(), token: token, err: err}
	if !r.hasKey() && before != nil && before.hasKey() && !before.stale {
		r.token, r.err, r.stale = before.token, nil, true
	}
	return r
}

// hasKey reports whether the token is a key.
func (r *readResult) hasKey() bool {
	_, err := parseKey(r.token)
	return r.err == nil && err == nil
}

func readFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFileSize))
	return string(b), err
}
