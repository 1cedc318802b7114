package keystore

import (
	"context"
	"flag"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
)

var importRows = flag.Int("import-rows", 20_000, "the number of rows of BenchmarkImport")

// An import of keys against the creation of as many keys by 64 callers at once, each in a directory
// of its own: x-create is the ratio of the times.
func BenchmarkImport(b *testing.B) {
	n := *importRows
	spec := Spec{Name: "a key of the benchmark", Owner: "acme", Scopes: []string{"orders:read"}}
	open := func() *Store {
		s, err := Open(b.TempDir(), &Options{Legacy: []LegacyFormat{sumFormat}})
		require.NoError(b, err)
		return s
	}
	var creates, imports time.Duration
	for b.Loop() {
		s := open()
		begin := time.Now()
		var running sync.WaitGroup
		for w := range 64 {
			running.Go(func() {
				for i := w; i < n; i += 64 {
					if _, err := s.Create(context.Background(), spec); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		running.Wait()
		creates += time.Since(begin)
		require.NoError(b, s.Close())

		s = open()
		rows := func(yield func(Imported, error) bool) {
			for i := range n {
				d := hashing.SHA256().Digest(fmt.Sprint("a token ", i))
				row := Imported{Format: "sum", Digest: d, Spec: spec, Lookup: fmt.Sprintf("%x", d.Sum)}
				if !yield(row, nil) {
					return
				}
			}
		}
		begin = time.Now()
		result, err := s.Import(context.Background(), rows, nil)
		imports += time.Since(begin)
		require.NoError(b, err)
		require.Equal(b, n, result.Imported)
		require.NoError(b, s.Close())
	}
	b.ReportMetric(float64(creates.Microseconds())/float64(b.N*n), "us/create")
	b.ReportMetric(float64(imports.Microseconds())/float64(b.N*n), "us/import")
	b.ReportMetric(float64(imports)/float64(creates), "x-create")
}
