//go:build !linux

package badgerdb

import "os"

func datasync(f *os.File) error { return f.Sync() }

func allocate(*os.File, int64) bool { return false }

func probe(string, int64) error { return nil }

func copiesOnWrite(string) bool { return false }

func syncFileSystem(string) error { return nil }
