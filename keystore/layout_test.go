package keystore

import (
	"math/bits"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
)

// What a hit looks at lies in the first two cache lines of an entry, and an entry begins where a line does: Go aligns
// objects of up to 512 bytes to their size class, and puts a header before larger ones.
func TestLayoutOfAnEntry(t *testing.T) {
	var e entry
	require.LessOrEqual(t, unsafe.Sizeof(e), uintptr(512))
	require.LessOrEqual(t, unsafe.Offsetof(e.sum)+unsafe.Sizeof(e.sum), uintptr(64))
	require.LessOrEqual(t, unsafe.Offsetof(e.used)+unsafe.Sizeof(e.used), uintptr(64))
	require.LessOrEqual(t, unsafe.Offsetof(e.digest)+unsafe.Sizeof(e.digest), uintptr(128))
	require.Less(t, unsafe.Offsetof(e.plain), uintptr(128))

	stored := stored{record: &record.Record{DigestScheme: "sha256", Digest: make([]byte, 32)}}
	made := stored.entry()
	require.Same(t, &made.sum[0], &made.digest.Sum[0])
	if bits.UintSize == 64 { // elsewhere the entry has a size class that is no multiple of a line
		require.Zero(t, uintptr(unsafe.Pointer(made))%64)
	}
	stored.record.Digest = make([]byte, 33)
	require.Len(t, stored.entry().digest.Sum, 33)
}
