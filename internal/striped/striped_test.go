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

func TestCounters(t *testing.T) {
	var c Counters
	var wg sync.WaitGroup
	for kind := range Kinds {
		wg.Go(func() {
			for range 10 * kind {
				c.Add(kind)
			}
		})
	}
	wg.Wait()
	for kind, n := range c.Sums() {
		require.EqualValues(t, 10*kind, n)
	}
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
	b.Run("several kinds", func(b *testing.B) {
		var c Counters
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				c.Add(3)
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
