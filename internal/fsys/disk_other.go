//go:build !linux && !darwin && !freebsd

package fsys

import "os"

// Disk returns false, because the sizes are unknown on this system.
func Disk(string) (free, total int64, ok bool) { return 0, 0, false }

// MapFile returns the content of a file.
func MapFile(path string) (data []byte, unmap func(), err error) {
	data, err = os.ReadFile(path)
	return data, func() {}, err
}
