package keystore

import (
	"bytes"
	"math/bits"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// What a hit looks at is in the first 64 bytes of a cachedKey. Both sizes are size classes of Go,
// and a larger size would take the memory of the next class.
func TestLayoutOfACachedKey(t *testing.T) {
	var e cachedKey
	if bits.UintSize == 64 {
		require.EqualValues(t, 416, unsafe.Sizeof(e))
		require.EqualValues(t, 160, unsafe.Sizeof(terms{}))
	}
	require.Zero(t, unsafe.Offsetof(terms{}.grants))
	require.LessOrEqual(t, unsafe.Offsetof(e.key)+unsafe.Sizeof(e.key.grants), uintptr(64))
	for _, before := range []uintptr{
		unsafe.Offsetof(e.ID), unsafe.Offsetof(e.fresh), unsafe.Offsetof(e.sum),
	} {
		require.Less(t, before, unsafe.Offsetof(e.key))
	}
	require.Zero(t, unsafe.Offsetof(e.key.grants))
}

func TestDigestOfACachedKey(t *testing.T) {
	for _, n := range []int{0, 1, 31, 32, 33, maxSum} {
		sum := bytes.Repeat([]byte{7}, n)
		e := (&keyRecord{record: &record.Record{DigestScheme: "own", Digest: sum}}).cached()
		require.Equal(t, "own", e.digest().Scheme)
		require.Equal(t, sum, append([]byte{}, e.digest().Sum...))
		require.Equal(t, n == 32, e.terms().inline)
	}
}

// The texts of a key are the same whether they are in the memory of the cachedKey or not.
func TestTextsOfACachedKey(t *testing.T) {
	id := token.ID{1, 2, 3}
	for _, prefix := range []string{"p", "oil", strings.Repeat("p", 32)} {
		for n := range 100 {
			name := strings.Repeat("n", n)
			e := (&keyRecord{id: id, record: &record.Record{Prefix: prefix, Name: name}}).cached()
			require.Equal(t, name, e.key.Name)
			require.Equal(t, token.HintOf(prefix, id), e.key.Hint)
			require.Equal(t, id.String(), e.key.ID)
		}
	}
}
