package keystore_test

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A hit against the SHA-256 of the same token, round by round, so that both have the same noise:
// x-sha256 is the ratio of the medians.
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

// The freshness gate of a store of several processes: hits with the gate against hits of a store of
// one process, in turns. x-gate is the ratio of the medians.
func BenchmarkVerifyHitGate(b *testing.B) {
	const batch = 2000
	var texts [2]string
	var stores [2]*keystore.Store
	for i, engine := range []backend.Backend{
		backendtest.NewMemory(), backendtest.NewShared().Open(),
	} {
		s, err := keystore.New(engine, nil)
		require.NoError(b, err)
		b.Cleanup(func() { require.NoError(b, s.Close()) })
		stores[i], texts[i] = s, create(b, s, keystore.Spec{}).Secret.Reveal()
		for s.Stats().Cached == 0 { // the feed may deliver the new key after the first Verify
			_, err = s.Verify(b.Context(), texts[i])
			require.NoError(b, err)
		}
	}
	ctx := b.Context()
	var hits [2][]time.Duration
	b.ReportAllocs()
	for b.Loop() {
		for i, s := range stores {
			begin := time.Now()
			for range batch {
				_, _ = s.Verify(ctx, texts[i])
			}
			hits[i] = append(hits[i], time.Since(begin))
		}
	}
	without, with := median(hits[0]), median(hits[1])
	b.ReportMetric(float64(without.Nanoseconds())/batch, "ns/one-process")
	b.ReportMetric(float64(with.Nanoseconds())/batch, "ns/gate")
	b.ReportMetric(float64(with)/float64(without), "x-gate")
}

// Hits on one hot key, and on 65,536 keys at random, by one goroutine and by two, against the
// SHA-256 of the same tokens in the same order, in turns: x-sha256 is the ratio of the medians for
// one goroutine, and x-two how many times as much two get done in the same time. With a core each
// for two goroutines, and nothing else running, that is 2 at best.
func BenchmarkVerifyParallel(b *testing.B) {
	const batch = 1 << 13
	for _, bm := range []struct {
		name string
		keys int
	}{{"hot", 1}, {"random", 1 << 16}} {
		b.Run(bm.name, func(b *testing.B) {
			s, err := keystore.New(backendtest.NewMemory(), nil)
			require.NoError(b, err)
			b.Cleanup(func() { require.NoError(b, s.Close()) })
			ctx := b.Context()
			texts := make([]string, bm.keys)
			for i := range texts {
				texts[i] = create(b, s, keystore.Spec{Name: "n"}).Secret.Reveal()
				_, err := s.Verify(ctx, texts[i])
				require.NoError(b, err)
			}
			before := s.Stats()
			plain := make([][]byte, len(texts))
			for i, text := range texts {
				plain[i] = []byte(text)
			}
			verify := func(i int) {
				if _, err := s.Verify(ctx, texts[i]); err != nil {
					b.Error(err)
				}
			}
			hash := func(i int) { sha256.Sum256(plain[i]) }
			// The tokens are drawn before the clock starts, each goroutine its own.
			round := func(goroutines int, f func(int)) time.Duration {
				drawn := make([][batch]int32, goroutines)
				for g := range drawn {
					for i := range drawn[g] {
						drawn[g][i] = rand.Int32N(int32(len(texts)))
					}
				}
				var wg sync.WaitGroup
				begin := time.Now()
				for g := 1; g < goroutines; g++ {
					wg.Go(func() {
						for _, i := range drawn[g] {
							f(int(i))
						}
					})
				}
				for _, i := range drawn[0] {
					f(int(i))
				}
				wg.Wait()
				return time.Since(begin)
			}
			var one, two, hashes, hashesTwo []time.Duration
			for b.Loop() {
				one = append(one, round(1, verify))
				hashes = append(hashes, round(1, hash))
				two = append(two, round(2, verify))
				hashesTwo = append(hashesTwo, round(2, hash))
			}
			require.Equal(b, before.Misses, s.Stats().Misses, "all are hits")
			b.ReportMetric(float64(median(one).Nanoseconds())/batch, "ns/verify")
			b.ReportMetric(float64(median(hashes).Nanoseconds())/batch, "ns/sha256")
			b.ReportMetric(float64(median(one))/float64(median(hashes)), "x-sha256")
			b.ReportMetric(2*float64(median(one))/float64(median(two)), "x-two")
			b.ReportMetric(2*float64(slices.Min(one))/float64(slices.Min(two)), "x-two-best")
			b.ReportMetric(2*float64(median(hashes))/float64(median(hashesTwo)), "x-two-sha256")
		})
	}
}

// Hits among 65,536 keys at random, against the least that a server without a store would do: the
// SHA-256 of the same tokens in the same order, and a look-up of each sum in a Go map. The two run
// in turns: x-map is the ratio of the medians. In a minute that has just begun, the first use of
// each key is recorded, which takes longer.
//
// B/key is the memory that the store keeps for each cached key: what a collection frees when the
// store goes. B/use is the part of B/key that is freed when a key is not used for two minutes: a
// map of the last uses.
func BenchmarkVerifyHitAtRandom(b *testing.B) {
	const keys, batch = 1 << 16, 1 << 9
	storage := backendtest.NewMemory()
	s, err := keystore.New(storage, nil)
	require.NoError(b, err)
	ctx := b.Context()
	texts, plain := make([]string, keys), make([][]byte, keys)
	issued := make(map[[sha256.Size]byte]*keystore.Key, keys)
	for i := range texts {
		texts[i] = create(b, s, keystore.Spec{
			Name:   fmt.Sprintf("web shop no. %d", i),
			Owner:  fmt.Sprintf("team-%d", i%100),
			Scopes: []string{"orders:read", "orders:write"},
		}).Secret.Reveal()
		plain[i] = []byte(texts[i])
		key, err := s.Verify(ctx, texts[i])
		require.NoError(b, err)
		issued[sha256.Sum256(plain[i])] = key
	}
	before := s.Stats()
	require.Equal(b, keys, before.Cached)

	var drawn [batch]int32
	var hits, maps, hashes []time.Duration
	timed := func(f func(i int32)) time.Duration {
		for i := range drawn { // before the clock starts
			drawn[i] = rand.Int32N(keys)
		}
		begin := time.Now()
		for _, i := range drawn {
			f(i)
		}
		return time.Since(begin)
	}
	b.ReportAllocs()
	for b.Loop() {
		hits = append(hits, timed(func(i int32) {
			if _, err := s.Verify(ctx, texts[i]); err != nil {
				b.Error(err)
			}
		}))
		maps = append(maps, timed(func(i int32) {
			if issued[sha256.Sum256(plain[i])] == nil {
				b.Error("not in the map")
			}
		}))
		hashes = append(hashes, timed(func(i int32) { sha256.Sum256(plain[i]) }))
	}
	require.Equal(b, before.Misses, s.Stats().Misses, "all are hits")
	hit, reference := median(hits), median(maps)
	b.ReportMetric(float64(hit.Nanoseconds())/batch, "ns/verify")
	b.ReportMetric(float64(reference.Nanoseconds())/batch, "ns/map")
	b.ReportMetric(float64(median(hashes).Nanoseconds())/batch, "ns/sha256")
	b.ReportMetric(float64(hit)/float64(reference), "x-map")

	issued = nil
	require.NoError(b, s.Close()) // what was noted of uses goes to the storage
	full := heap()
	runtime.KeepAlive(s)
	s = nil
	b.ReportMetric(float64(full-heap())/keys, "B/key")
	without := heap()
	used := make(map[token.ID]int64)
	for _, text := range texts {
		id, _ := token.Parse(text)
		used[id] = 1
	}
	b.ReportMetric(float64(heap()-without)/keys, "B/use")
	runtime.KeepAlive(used)
	runtime.KeepAlive(storage)
	runtime.KeepAlive(texts)
	runtime.KeepAlive(plain)
}

// A hit with everything on that happens at a hit, against one with nothing on, round by round:
// x-plain is the ratio of the medians.
func BenchmarkVerifyHitFeatures(b *testing.B) {
	plain, full := open(b, nil), featured(b)
	plainText := create(b, plain, keystore.Spec{}).Secret.Reveal()
	fullText := create(b, full, limited).Secret.Reveal()
	const batch = 2000
	ctx := b.Context()
	round := func(s *keystore.Store, text string) time.Duration {
		begin := time.Now()
		for range batch {
			if _, err := s.Verify(ctx, text); err != nil {
				b.Fatal(err)
			}
		}
		return time.Since(begin)
	}
	var without, with []time.Duration
	b.ReportAllocs()
	for b.Loop() {
		without = append(without, round(plain, plainText))
		with = append(with, round(full, fullText))
	}
	b.ReportMetric(float64(median(without).Nanoseconds())/batch, "ns/plain")
	b.ReportMetric(float64(median(with).Nanoseconds())/batch, "ns/features")
	b.ReportMetric(float64(median(with))/float64(median(without)), "x-plain")
}

// limited is a rate limit that is looked at and never reached.
var limited = keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1e9, Burst: 1e9}}

type counter struct{ verified, refused, changed, ended atomic.Uint64 }

func (c *counter) Verified(keystore.Verification) { c.verified.Add(1) }
func (c *counter) Refused(keystore.Refusal)       { c.refused.Add(1) }
func (c *counter) Changed(keystore.Event)         { c.changed.Add(1) }
func (c *counter) Ended(keystore.BindEnd)         { c.ended.Add(1) }

func featured(t testing.TB) *keystore.Store {
	return open(t, &keystore.Options{Observer: new(counter), EventRetention: time.Hour})
}

// A Bind and its release, of a key that is cached, against its SHA-256, in turns.
func BenchmarkBind(b *testing.B) {
	s := open(b, nil)
	text := create(b, s, keystore.Spec{}).Secret.Reveal()
	plain := []byte(text)
	_, err := s.Verify(b.Context(), text)
	require.NoError(b, err)
	const batch = 500
	var binds, hashes []time.Duration
	for b.Loop() {
		begin := time.Now()
		for range batch {
			session, err := s.Bind(b.Context(), text)
			if err != nil {
				b.Fatal(err)
			}
			session.Close()
		}
		binds = append(binds, time.Since(begin))
		begin = time.Now()
		for range batch {
			sha256.Sum256(plain)
		}
		hashes = append(hashes, time.Since(begin))
	}
	b.ReportMetric(float64(median(binds).Nanoseconds())/batch, "ns/bind")
	b.ReportMetric(float64(median(binds))/float64(median(hashes)), "x-sha256")
}

// A miss, and the refusal of a key that nobody issued, against the store's read of the same
// records, in turns, in a store of 20,000 keys that was opened anew: x-read and x-unknown are the
// ratios of the medians.
func BenchmarkVerifyMiss(b *testing.B) {
	const keys, batch = 20_000, 500
	dir := b.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(b, err)
	texts := make([]string, keys)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < keys; i = next.Add(1) - 1 {
				issued, err := s.Create(b.Context(), keystore.Spec{Name: "n"})
				if err != nil {
					b.Error(err)
					return
				}
				texts[i] = issued.Secret.Reveal()
			}
		})
	}
	wg.Wait()
	require.NoError(b, s.Close())

	db, err := badgerdb.Open(dir, badgerdb.Options{})
	require.NoError(b, err)
	// as Open has it, which needs no limit of time
	s, err = keystore.New(db, &keystore.Options{CacheSize: -1, Timeout: -1})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, s.Close()) })
	format, err := token.NewFormat("oil", 64, keystore.ASCII62)
	require.NoError(b, err)
	unknown := make([]string, keys)
	for i := range unknown {
		_, unknown[i] = format.New()
	}
	var ids [batch][]byte
	var drawn [batch]string
	ctx := b.Context()
	// round returns the time of reading the records of some of the texts, and that of verifying
	// them.
	round := func(texts []string) (read, verify time.Duration) {
		for i := range drawn {
			drawn[i] = texts[rand.IntN(len(texts))]
			id, ok := token.Parse(drawn[i])
			require.True(b, ok)
			ids[i] = append([]byte{'k'}, id[:]...)
		}
		begin := time.Now()
		for i := range ids {
			_, _ = db.Get(ctx, ids[i])
		}
		read = time.Since(begin)
		begin = time.Now()
		for i := range drawn {
			_, _ = s.Verify(ctx, drawn[i])
		}
		return read, time.Since(begin)
	}
	_, err = s.Verify(ctx, texts[0])
	require.NoError(b, err)
	var reads, misses, noReads, refusals []time.Duration
	for b.Loop() {
		read, miss := round(texts)
		reads, misses = append(reads, read), append(misses, miss)
		read, miss = round(unknown)
		noReads, refusals = append(noReads, read), append(refusals, miss)
	}
	for unit, d := range map[string][]time.Duration{
		"ns/read": reads, "ns/miss": misses, "ns/no-read": noReads, "ns/unknown": refusals,
	} {
		b.ReportMetric(float64(median(d).Nanoseconds())/batch, unit)
	}
	b.ReportMetric(float64(median(misses))/float64(median(reads)), "x-read")
	b.ReportMetric(float64(median(refusals))/float64(median(noReads)), "x-unknown")
}

// What refusing costs above parsing, for what is no token and for one whose checksum is wrong.
func BenchmarkVerifyMalformed(b *testing.B) {
	s := open(b, nil)
	text := create(b, s, keystore.Spec{}).Secret.Reveal()
	for _, bm := range []struct{ name, text string }{
		{"garbage", "garbage"},
		{"shape", text[:len(text)-1] + "-"},
		{"checksum", "x" + text},
	} {
		b.Run(bm.name, func(b *testing.B) {
			const batch = 2000
			var parsed, refused []time.Duration
			b.ReportAllocs()
			for b.Loop() {
				begin := time.Now()
				for range batch {
					token.Parse(bm.text)
				}
				parsed = append(parsed, time.Since(begin))
				begin = time.Now()
				for range batch {
					_, _ = s.Verify(b.Context(), bm.text)
				}
				refused = append(refused, time.Since(begin))
			}
			b.ReportMetric(float64((median(refused)-median(parsed)).Nanoseconds())/batch,
				"ns/above-parsing")
		})
	}
}

// The refusal of a wrong secret for a cached key, against the SHA-256 of the token, in turns: the
// store hashes the token once. x-sha256 is the ratio of the medians.
func BenchmarkVerifyWrongSecret(b *testing.B) {
	s := open(b, nil)
	text := create(b, s, keystore.Spec{}).Secret.Reveal()
	_, err := s.Verify(b.Context(), text)
	require.NoError(b, err)
	format, err := token.NewFormat("oil", 64, keystore.ASCII62)
	require.NoError(b, err)
	id, ok := token.Parse(text)
	require.True(b, ok)
	wrong := format.Renew(id)
	plain := []byte(wrong)
	const batch = 2000
	ctx := b.Context()
	var refusals, hashes []time.Duration
	b.ReportAllocs()
	for b.Loop() {
		begin := time.Now()
		for range batch {
			_, _ = s.Verify(ctx, wrong)
		}
		refusals = append(refusals, time.Since(begin))
		begin = time.Now()
		for range batch {
			sha256.Sum256(plain)
		}
		hashes = append(hashes, time.Since(begin))
	}
	b.ReportMetric(float64(median(refusals).Nanoseconds())/batch, "ns/refusal")
	b.ReportMetric(float64(median(refusals))/float64(median(hashes)), "x-sha256")
}

// Durable creates by one writer and by 64, in turns of a fixed time: x-one is how many times as
// many the 64 make.
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
	for name, s := range map[string]*keystore.Store{"plain": open(t, nil),
		"with everything on": featured(t)} {
		spec := limited
		spec.ExpiresAt = time.Now().Add(time.Hour)
		text := create(t, s, spec).Secret.Reveal()
		ctx := t.Context()
		_, err := s.Verify(ctx, text)
		require.NoError(t, err)
		require.Zero(t, testing.AllocsPerRun(1000, func() { _, err = s.Verify(ctx, text) }), name)
		require.NoError(t, err)
	}
}

// A flood of well-formed keys that nobody issued costs a read each, and nothing else: it evicts
// nothing and is not remembered.
func TestUnknownKeysDoNotEvictOrFill(t *testing.T) {
	floods := 1_000_000
	if testing.Short() || keystore.RaceEnabled {
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

// Reads of keys that are not cached while eight writers commit, against the same while none does:
// p99-x-idle is the 99th percentile of the one over the median of the other.
func BenchmarkVerifyMissBesideWriters(b *testing.B) {
	s := open(b, &keystore.Options{CacheSize: -1})
	var tokens []string
	for range 1000 {
		tokens = append(tokens, create(b, s, keystore.Spec{}).Secret.Reveal())
	}
	n := 0
	read := func() time.Duration {
		// a caller now and then, as a miss is, and not one that takes a core
		time.Sleep(100 * time.Microsecond)
		n++
		begin := time.Now()
		if _, err := s.Verify(b.Context(), tokens[n%len(tokens)]); err != nil {
			b.Fatal(err)
		}
		return time.Since(begin)
	}
	var idle, busy []time.Duration
	for range 10_000 {
		idle = append(idle, read())
	}
	var stop atomic.Bool
	var writers sync.WaitGroup
	for range 8 {
		writers.Go(func() {
			for !stop.Load() {
				if _, err := s.Create(b.Context(), keystore.Spec{Name: "n"}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	for b.Loop() {
		busy = append(busy, read())
	}
	stop.Store(true)
	writers.Wait()
	slices.Sort(busy)
	p99 := busy[len(busy)*99/100]
	b.ReportMetric(float64(median(idle).Nanoseconds()), "ns-idle-p50")
	b.ReportMetric(float64(median(busy).Nanoseconds()), "ns-busy-p50")
	b.ReportMetric(float64(p99.Nanoseconds()), "ns-busy-p99")
	b.ReportMetric(float64(p99)/float64(median(idle)), "p99-x-idle")
}
