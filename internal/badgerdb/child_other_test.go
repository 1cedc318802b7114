//go:build !linux

package badgerdb

func prepareChild(child) {}
