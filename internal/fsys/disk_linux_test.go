package fsys

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What file systems say of themselves.
func TestDiskSpace(t *testing.T) {
	for name, c := range map[string]struct {
		st          unix.Statfs_t
		free, total int64
		ok          bool
	}{
		"counts in fragments": {
			unix.Statfs_t{Bsize: 1 << 20, Frsize: 4096, Blocks: 100, Bavail: 10}, 40960, 409600,
			true},
		"has no limit": {unix.Statfs_t{Bsize: 4096}, 0, 0, false},
		"is larger than a number": {unix.Statfs_t{Bsize: 4096, Blocks: 1 << 60, Bavail: 1 << 59},
			math.MaxInt64, math.MaxInt64, true},
		"is used up, but for root": {unix.Statfs_t{Bsize: 4096, Blocks: 100}, 0, 409600, true},
	} {
		free, total, ok := inBytes(c.st)
		require.Equal(t, []any{c.free, c.total, c.ok}, []any{free, total, ok}, name)
	}
}
