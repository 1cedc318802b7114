package keystore_test

import (
	"cmp"
	"crypto/sha256"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A hit against the SHA-256 of the same token, round by round, so that both have the same noise: x-sha256 is the
// ratio of the medians.
func BenchmarkVerifyHit(b *testing.B) {
	s := open(b, nil)
	text := create(b, s, keystore.Spec{}).Secret.Reveal()
	plain := []byte(text)
	ctx := b.Context()
	_, err := s.Verify(ctx, text)
	require.NoError(b, err)

	const batch = 2000
	var hits, hashes []time.Duration
	b.ReportAllocs()
	for b.Loop() {
		begin := time.Now()
		for range batch {
			_, _ = s.Verify(ctx, text)
		}
		hits = append(hits, time.Since(begin))
		begin = time.Now()
		for range batch {
			sha256.Sum256(plain)
		}
		hashes = append(hashes, time.Since(begin))
	}
	hit, hash := median(hits), median(hashes)
	b.ReportMetric(float64(hit.Nanoseconds())/batch, "ns/verify")
	b.ReportMetric(float64(hash.Nanoseconds())/batch, "ns/sha256")
	b.ReportMetric(float64(hit)/float64(hash), "x-sha256")
}

func BenchmarkVerifyMiss(b *testing.B) {
	s := open(b, &keystore.Options{CacheSize: -1})
	text := create(b, s, keystore.Spec{}).Secret.Reveal()
	b.ReportAllocs()
	for b.Loop() {
		_, _ = s.Verify(b.Context(), text)
	}
}

func BenchmarkVerifyUnknown(b *testing.B) {
	s := open(b, nil)
	text := create(b, open(b, nil), keystore.Spec{}).Secret.Reveal()
	b.ReportAllocs()
	for b.Loop() {
		_, _ = s.Verify(b.Context(), text)
	}
}

// Durable creates by one writer and by 64, in turns of a fixed time: x-one is how many times as many the 64 make.
func BenchmarkCreate(b *testing.B) {
	s := open(b, nil)
	perSecond := func(writers int) float64 {
		var n atomic.Int64
		var wg sync.WaitGroup
		begin := time.Now()
		for range writers {
			wg.Go(func() {
				for time.Since(begin) < 500*time.Millisecond {
					if _, err := s.Create(b.Context(), keystore.Spec{Name: "n"}); err != nil {
						b.Error(err)
						return
					}
					n.Add(1)
				}
			})
		}
		wg.Wait()
		return float64(n.Load()) / time.Since(begin).Seconds()
	}
	var one, many []float64
	for b.Loop() {
		one = append(one, perSecond(1))
		many = append(many, perSecond(64))
	}
	b.ReportMetric(median(one), "creates/s-1")
	b.ReportMetric(median(many), "creates/s-64")
	b.ReportMetric(median(many)/median(one), "x-one")
}

func median[T cmp.Ordered](values []T) T {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}

// heap returns the bytes that are in use after a collection.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

func TestVerifyHitDoesNotAllocate(t *testing.T) {
	s := open(t, nil)
	text := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)}).Secret.Reveal()
	ctx := t.Context()
	_, err := s.Verify(ctx, text)
	require.NoError(t, err)
	require.Zero(t, testing.AllocsPerRun(1000, func() { _, err = s.Verify(ctx, text) }))
	require.NoError(t, err)
}

// A flood of well-formed keys that nobody issued costs a read each, and nothing else: it evicts nothing and is not
// remembered.
func TestUnknownKeysDoNotEvictOrFill(t *testing.T) {
	floods := 1_000_000
	if testing.Short() || raceEnabled {
		floods = 50_000
	}
	const hot = 100
	s := open(t, &keystore.Options{CacheSize: hot})
	var tokens []string
	for range hot {
		text := create(t, s, keystore.Spec{}).Secret.Reveal()
		_, err := s.Verify(t.Context(), text)
		require.NoError(t, err)
		tokens = append(tokens, text)
	}
	before := heap()
	format, err := token.NewFormat("oil", 22, keystore.ASCII62)
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range floods / 2 {
				_, text := format.New()
				if _, err := s.Verify(t.Context(), text); err != keystore.ErrUnknown {
					t.Errorf("an unknown key: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	st := s.Stats()
	require.Equal(t, hot, st.Cached)
	for _, text := range tokens {
		_, err := s.Verify(t.Context(), text)
		require.NoError(t, err)
	}
	require.Equal(t, st.Misses, s.Stats().Misses, "every hot key was still cached")
	require.Less(t, heap(), before+(16<<20), "memory is bounded")
}
