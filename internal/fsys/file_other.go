//go:build !linux

package fsys

import "os"

// Datasync makes the data written to f durable.
func Datasync(f *os.File) error { return f.Sync() }

// Allocate returns false, because this system cannot allocate space.
func Allocate(*os.File, int64) bool { return false }

// Probe returns nil, because this system does not report a lack of space.
func Probe(string, int64) error { return nil }

// CopiesOnWrite returns false: the answer is not known on this system.
func CopiesOnWrite(string) bool { return false }

// SyncFileSystem does nothing.
func SyncFileSystem(string) error { return nil }
