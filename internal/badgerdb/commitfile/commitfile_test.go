package commitfile

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
)

// A record that can be decoded has one encoding.
func FuzzSlot(f *testing.F) {
	r := Record{
		Summary: layout.Summary{Seq: 7, Entries: 3, Sum: 9},
		Writes: []layout.Write{
			{Key: []byte("ek"), Value: []byte("value")},
			{Key: layout.SummaryKey},
		},
	}
	f.Add(r.encode())
	f.Add([]byte(Magic))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, ok := decodeRecord(data); ok {
			require.Equal(t, data[:len(r.encode())], r.encode())
		}
	})
}
