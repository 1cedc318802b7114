package promkeys_test

import (
	"flag"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

// Verify of a store that is collected against Verify of a store that is not, in turns. Prometheus
// scrapes every 15 s; here, every round begins with a scrape, whose time does not count. x-without
// is the ratio of the medians.
func BenchmarkVerify(b *testing.B) {
	const batch = 2000
	ctx := b.Context()
	var stores [2]*keystore.Store
	var texts [2]string
	for i := range stores {
		stores[i] = keystoretest.New(b, nil)
		texts[i] = keystoretest.MustCreate(b, stores[i], keystore.Spec{}).Secret.Reveal()
	}
	registry := register(b, stores[1], nil)
	verify := func(i int) time.Duration {
		began := time.Now()
		for range batch {
			_, _ = stores[i].Verify(ctx, texts[i])
		}
		return time.Since(began)
	}
	var took [2][]time.Duration
	round := 0
	for b.Loop() {
		_, err := registry.Gather()
		require.NoError(b, err)
		for range 2 { // each store is first in every other round
			i := round % 2
			took[i] = append(took[i], verify(i))
			round++
		}
		round++
	}
	without, with := median(took[0]), median(took[1])
	b.ReportMetric(float64(without.Nanoseconds())/batch, "ns/without")
	b.ReportMetric(float64(with.Nanoseconds())/batch, "ns/with")
	b.ReportMetric(float64(with)/float64(without), "x-without")
	b.ReportMetric(testing.AllocsPerRun(1000, func() { _, _ = stores[1].Verify(ctx, texts[1]) }),
		"allocs/verify")
}

var keys = flag.Int("keys", 10_000, "the number of keys of BenchmarkScrape")

// A scrape without an inventory, of a store in a directory, whose cache is full.
func BenchmarkScrape(b *testing.B) {
	ctx := b.Context()
	store, err := keystore.Open(b.TempDir(), nil)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, store.Close()) })
	work := make(chan int)
	done := make(chan error)
	const workers = 64 // the store commits their keys together
	for range workers {
		go func() {
			for i := range work {
				issued, err := store.Create(ctx, keystore.Spec{Name: "k" + strconv.Itoa(i)})
				if err == nil && i < 1<<16 {
					_, err = store.Verify(ctx, issued.Secret.Reveal())
				}
				if err != nil {
					done <- fmt.Errorf("key %d: %w", i, err)
					for range work {
					}
					return
				}
			}
			done <- nil
		}()
	}
	for i := range *keys {
		work <- i
	}
	close(work)
	for range workers {
		require.NoError(b, <-done)
	}
	registry := register(b, store, nil)
	b.ReportAllocs()
	for b.Loop() {
		_, err := registry.Gather()
		require.NoError(b, err)
	}
	b.ReportMetric(float64(*keys), "keys")
}
