package hashing

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

// equal notices every bit, in the words of 8 bytes and in the bytes after the words.
func TestEqual(t *testing.T) {
	for n := range 40 {
		a := bytes.Repeat([]byte{0xa5}, n)
		b := bytes.Clone(a)
		require.True(t, equal(a, b))
		require.False(t, equal(a, append(bytes.Clone(b), 0)))
		require.False(t, equal(append(bytes.Clone(a), 0), b))
		for bit := range 8 * n {
			b[bit/8] ^= 1 << (bit % 8)
			require.False(t, equal(a, b), "bit %d of %d bytes", bit, n)
			require.False(t, equal(b, a), "bit %d of %d bytes", bit, n)
			b[bit/8] ^= 1 << (bit % 8)
		}
	}
}
