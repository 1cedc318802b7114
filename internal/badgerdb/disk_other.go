//go:build !linux && !darwin && !freebsd

package badgerdb

import "os"

func disk(string) (free, total int64, ok bool) { return 0, 0, false }

func mapFile(path string) (data []byte, unmap func(), err error) {
	data, err = os.ReadFile(path)
	return data, func() {}, err
}
