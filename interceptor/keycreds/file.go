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

// FromFile returns credentials that send the key in a file. Otherwise the credentials are those of
// [New]. The file contains the key alone; white space around the key is removed.
//
// The first call reads the file. Later, a call reads the file again if the last read was a second
// or more ago. So calls use a new key at most a second after the file has changed. The file may
// change by a rename, by a write, or by the swap of a symbolic link, as in secrets that Kubernetes
// mounts. (Kubernetes never updates a secret that is mounted with subPath.)
//
// If a read fails or finds no key, calls use the previous key for one more second, because a file
// that is written in place is empty for a moment. If the next read fails too, calls fail until a
// read succeeds. If the file cannot be read, the code is Unavailable and the error names the file.
// If the file contains no key, the error is the one that New would give.
//
// A file system that hangs delays one call at a time, or all calls if no key was read before.
func FromFile(path string, opts ...Option) credentials.PerRPCCredentials {
	f := &file{path: path}
	return FromSource(f.token, opts...)
}

const (
	readInterval = time.Second
	maxFileSize  = 4096 // bytes; a longer file contains no key
)

// A file caches the key in a file.
type file struct {
	path     string
	readLock sync.Mutex // held by the call that reads the file
	latest   atomic.Pointer[readResult]
}

// A readResult is the result of one read of the file.
type readResult struct {
	readAt time.Time
	token  string
	err    error
	stale  bool // token is the previous key, because this read gave no key
}

// token is the source for FromSource, which checks the key.
func (f *file) token(context.Context) (string, error) {
	r := f.latest.Load()
	if !r.fresh() {
		if r == nil {
			f.readLock.Lock()
		} else if !f.readLock.TryLock() {
			return r.token, r.err // another call reads the file
		}
		defer f.readLock.Unlock()
		if r = f.latest.Load(); !r.fresh() {
			r = f.read(r)
			f.latest.Store(r)
		}
	}
	return r.token, r.err
}

// fresh reports whether r exists and is less than a second old.
func (r *readResult) fresh() bool { return r != nil && time.Since(r.readAt) < readInterval }

// read reads the file. If the file has no key, read returns the previous key, once. The argument
// previous may be nil.
func (f *file) read(previous *readResult) *readResult {
	token, err := readFile(f.path)
	r := &readResult{readAt: time.Now(), token: token, err: err}
	if !r.hasKey() && previous != nil && previous.hasKey() && !previous.stale {
		r.token, r.err, r.stale = previous.token, nil, true
	}
	return r
}

// hasKey reports whether the read succeeded and gave a key.
func (r *readResult) hasKey() bool {
	_, err := parseKey(r.token)
	return r.err == nil && err == nil
}

// readFile returns at most maxFileSize bytes of a file.
func readFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFileSize))
	return string(b), err
}
