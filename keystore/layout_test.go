package keystore

import (
	"math/bits"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
)

// What a hit looks at lies in the first two cache lines of a cachedKey, and a cachedKey begins
// where a line does: Go aligns objects of up to 512 bytes to their size class, and puts a header
// before larger ones.
func TestLayoutOfACachedKey(t *testing.T) {
	var e cachedKey
	require.LessOrEqual(t, unsafe.Sizeof(e), uintptr(512))
	require.LessOrEqual(t, unsafe.Offsetof(e.sum)+unsafe.Sizeof(e.sum), uintptr(64))
	require.LessOrEqual(t, unsafe.Offsetof(e.used)+unsafe.Sizeof(e.used), uintptr(64))
	require.LessOrEqual(t, unsafe.Offsetof(e.digest)+unsafe.Sizeof(e.digest), uintptr(128))
	require.Less(t, unsafe.Offsetof(e.unrestricted), uintptr(128))

	stored := keyRecord{record: &record.Record{DigestScheme: "sha256", Digest: make([]byte, 32)}}
	made := stored.cached()
	require.Same(t, &made.sum[0], &made.digest.Sum[0])
	// elsewhere the cachedKey has a size class that is no multiple of a line
	if bits.UintSize == 64 {
		require.Zero(t, uintptr(unsafe.Pointer(made))%64)
	}
	stored.record.Digest = make([]byte, 33)
	require.Len(t, stored.cached().digest.Sum, 33)
}
