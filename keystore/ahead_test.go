package keystore

import (
	"errors"
	"fmt"
	"iter"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// readAhead yields what the scan yields, and ends the scan when the loop ends.
func TestReadAhead(t *testing.T) {
	failed := errors.New("failed")
	for _, entries := range []int{0, 1, pageEntries - 1, pageEntries, 3*pageEntries + 5} {
		for _, end := range []error{nil, failed} {
			for _, most := range []int{0, 1, pageEntries, entries, entries + 9} {
				ended := false
				scan := iter.Seq2[backend.Entry, error](func(yield func(backend.Entry, error) bool) {
					defer func() { ended = true }()
					for n := range entries {
						if !yield(backend.Entry{Key: fmt.Append(nil, n)}, nil) {
							return
						}
					}
					if end != nil {
						yield(backend.Entry{}, end)
					}
				})
				n := 0
				var err error
				for e, failure := range readAhead(scan) {
					if n == most {
						break
					}
					if err = failure; err == nil {
						require.Equal(t, fmt.Sprint(n), string(e.Key))
						n++
					}
				}
				require.Equal(t, min(entries, most), n)
				if most > entries {
					require.Equal(t, end, err)
				}
				require.True(t, ended)
			}
		}
	}
}
