package fence

import (
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
)

func TestBucketIsACacheLine(t *testing.T) {
	require.EqualValues(t, 64, unsafe.Sizeof(bucket[value]{}))
	require.Zero(t, uintptr(unsafe.Pointer(&newFence(1 << 16).front.buckets[0]))%64)
	if bits.UintSize == 64 { // elsewhere the padding keeps the locks apart, and the size is another
		require.Zero(t, unsafe.Sizeof(shard[value]{})%64)
	}
}

// A hit takes no lock. A Get that took the lock would wait forever here.
func TestHitTakesNoLock(t *testing.T) {
	f := newFence(8)
	load(f, 1, 1)
	s := f.shard(id(1))
	s.mu.Lock()
	defer s.mu.Unlock()
	v, _ := f.Get(id(1), nil)
	require.EqualValues(t, 1, v.n)
}

// No two shards write the same bucket, and the table has at most maxBuckets buckets.
func TestFrontSize(t *testing.T) {
	for _, tt := range []struct{ size, shards, buckets int }{
		{1, 1, 1}, {1, 64, 64}, {100, 1, 32}, {1 << 16, 64, 1 << 14}, {1 << 30, 64, maxBuckets},
	} {
		f := newFront[value](tt.size, tt.shards, nil)
		require.Len(t, f.buckets, tt.buckets)
	}
}

// The front distinguishes IDs that differ in one half only, and such IDs mostly have different
// tags.
func TestFrontComparesWholeIDs(t *testing.T) {
	f := newFence(8)
	f.front.buckets = f.front.buckets[:1]
	first := ID{7: 1, 15: 1}
	_, ticket := f.Get(first, nil)
	f.Put(first, &value{Node: Node{ID: first}}, ticket, nil)
	require.NotNil(t, f.Hit(words(first)))
	tags := make(map[uint64]bool)
	for n := byte(2); n <= 101; n++ {
		for _, other := range []ID{{7: n, 15: 1}, {7: 1, 15: n}} {
			require.Nil(t, f.Hit(words(other)))
		}
		_, tag := f.front.bucketFor(lowBits(id(n)))
		tags[tag] = true
	}
	require.Len(t, tags, 100)
}

// In a full bucket, a new value replaces a value without the touched bit, if there is one.
func TestTouchedValueStaysInItsSlot(t *testing.T) {
	for unused := byte(1); unused <= ways; unused++ {
		f := newFence(64)
		f.front.buckets = f.front.buckets[:1]
		for n := byte(1); n <= ways; n++ {
			load(f, n, 1)
			if n != unused {
				require.NotNil(t, f.Hit(words(id(n))))
			}
		}
		load(f, ways+1, 1)
		for n := byte(1); n <= ways+1; n++ {
			require.Equal(t, n != unused, f.Hit(words(id(n))) != nil, "%d", n)
		}
	}
}

// A value without a slot is found in the LRU, and receives a slot again.
func TestBucketOverflow(t *testing.T) {
	const crowd = 3 * ways
	crowded := func(n int) ID { return ID{14: byte(n), 15: 1} }
	f := newFence(crowd)
	f.front.buckets = f.front.buckets[:1]
	for n := range crowd {
		_, ticket := f.Get(crowded(n), nil)
		f.Put(crowded(n), &value{Node: Node{ID: crowded(n)}, n: int64(n)}, ticket, nil)
	}
	for range 3 {
		for n := range crowd {
			v, _ := f.Get(crowded(n), nil)
			require.EqualValues(t, n, v.n)
			require.Same(t, v, f.front.get(words(crowded(n))))
		}
	}
	require.Equal(t, Stats{Hits: 3 * crowd, Misses: crowd, Cached: crowd}, f.Stats())
}

// Checks invariant 6 and the count of cached values after each of many random steps. The front has
// two buckets and the cache is small.
func TestFrontMatchesLRU(t *testing.T) {
	const ids = 48
	f := newFence(32)
	f.front.buckets = f.front.buckets[:2]
	random := rand.New(rand.NewPCG(1, 2))
	begun := make(map[ID]int)
	overflowed, evicted := false, false
	for range 5_000 {
		n := byte(random.IntN(ids))
		switch random.IntN(8) {
		default:
			v, ticket := f.Get(id(n), nil)
			if v == nil {
				if random.IntN(4) == 0 {
					f.Begin(id(n)) // between step 1 and step 3
					begun[id(n)]++
				}
				f.Put(id(n), val(n, 0), ticket, nil)
			} else if v.ID != id(n) {
				t.Fatalf("got the value of %x for %x", v.ID, id(n))
			}
		case 0:
			f.Begin(id(n))
			begun[id(n)]++
		case 1, 2, 3:
			for other, times := range begun {
				if times > 0 {
					f.End(other, nil)
					begun[other]--
					break
				}
			}
		case 4:
			f.Cut(id(n), nil)
		}
		seen := make(map[ID]bool)
		for i := range f.front.buckets {
			b := &f.front.buckets[i]
			for way := range ways {
				tag := b.tags.Load() >> (8 * way) & 0xff
				v := b.slots[way].Load()
				if v == nil {
					require.Zero(t, tag)
					continue
				}
				in, want := f.front.bucketFor(lowBits(v.ID))
				require.Same(t, b, in)
				require.Equal(t, want, tag)
				require.False(t, seen[v.ID], "an ID is in two slots")
				seen[v.ID] = true
				require.Zero(t, begun[v.ID], "an ID between Begin and End is in the front")
				has, ok := f.shard(v.ID).lru.Peek(v.ID)
				require.True(t, ok)
				require.Same(t, has, v)
			}
		}
		cached := f.Stats().Cached
		require.EqualValues(t, cached, f.counts.cached.Load())
		require.LessOrEqual(t, cached, 32)
		evicted = evicted || cached == 32
		overflowed = overflowed || cached > len(seen)
	}
	require.True(t, evicted && overflowed, "no eviction, or no overflow of the front, happened")
}

// Invariant 7: whatever tags a reader sees, the reader gets the value of its ID or no value.
func TestTagsAreOnlyHints(t *testing.T) {
	f := newFence(64)
	f.front.buckets = f.front.buckets[:1]
	for n := byte(1); n <= ways; n++ {
		load(f, n, int64(n))
	}
	b := &f.front.buckets[0]
	right := b.tags.Load()
	random := rand.New(rand.NewPCG(1, 2))
	found := 0
	for range 100_000 {
		wrong := right
		switch random.IntN(3) {
		case 0:
			wrong = random.Uint64()
		case 1:
			wrong ^= 1 << random.IntN(64)
		case 2: // every slot has the tag of one slot, so that the reader looks at every slot
			wrong = (right >> (8 * random.IntN(ways)) & 0xff) * 0x01_01_01_01_01_01_01_01
		}
		b.tags.Store(wrong)
		n := byte(1 + random.IntN(ways+1))
		if v := f.front.get(words(id(n))); v != nil {
			require.Equal(t, id(n), v.ID)
			found++
		}
	}
	require.NotZero(t, found)
	f.Begin(id(1))
	b.tags.Store(right)
	require.Nil(t, f.front.get(words(id(1))), "Begin finds the slot without the tags")
}

func TestStripedCounter(t *testing.T) {
	const goroutines, each = 100, 1000
	var c stripedCounter
	var wg sync.WaitGroup
	all := make(chan struct{})
	for range goroutines {
		wg.Go(func() {
			<-all // until every goroutine exists, each with its own stack
			for range each {
				c.add()
			}
		})
	}
	close(all)
	wg.Wait()
	require.EqualValues(t, goroutines*each, c.sum())
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
		var c stripedCounter
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				c.add()
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
