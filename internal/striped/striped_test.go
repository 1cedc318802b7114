package striped

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCounter(t *testing.T) {
	const goroutines, each = 100, 1000
	var c Counter
	var wg sync.WaitGroup
	all := make(chan struct{})
	for range goroutines {
		wg.Go(func() {
			<-all // until every goroutine exists, each with its own stack
			for range each {
				c.Add()
			}
		})
	}
	close(all)
	wg.Wait()
	require.EqualValues(t, goroutines*each, c.Sum())
	used := 0
	for i := range c.stripes {
		if c.stripes[i].n.Load() > 0 {
			used++
		}
	}
	require.Greater(t, used, 8, "too few stripes are used")
}

// BenchmarkCounter shows what the stripes are for: compare -cpu 1,2.
func BenchmarkCounter(b *testing.B) {
	b.Run("striped", func(b *testing.B) {
		var c Counter
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				c.Add()
			}
		})
	})
	b.Run("one word", func(b *testing.B) {
		var c atomic.Uint64
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				c.Add(1)
			}
		})
	})
}
