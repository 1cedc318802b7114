package fence

import (
	"math"
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
	require.Zero(t, uintptr(unsafe.Pointer(&newFence(1 << 16).table.chains[0]))%64)
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

// Without a cache there is no hit.
func TestNoCacheHasNoHit(t *testing.T) { require.False(t, newFence(0).MayHit(1)) }

// No two shards write the same bucket, and the table has at most maxChains chains.
func TestTableSize(t *testing.T) {
	for _, tt := range []struct{ size, shards, chains int }{
		{1, 1, 1}, {1, 64, 64}, {100, 1, 32}, {1 << 16, 64, 1 << 14}, {1 << 22, 64, maxChains},
		{1 << 30, 64, maxChains}, {math.MaxInt, 64, maxChains},
	} {
		require.Len(t, newTable[value](tt.size, tt.shards, nil).chains, tt.chains)
	}
}

// The table distinguishes IDs that differ in one half only, and such IDs mostly have different
// tags.
func TestTableComparesWholeIDs(t *testing.T) {
	f := newFence(8)
	f.table.chains = f.table.chains[:1]
	first := ID{7: 1, 15: 1}
	_, ticket := f.Get(first, nil)
	f.Put(first, &value{Node: Node{ID: first}}, ticket, nil)
	require.NotNil(t, f.Hit(words(first)))
	_, firstTag := f.table.chainFor(lowBits(first))
	tags := make(map[uint64]bool)
	for n := byte(2); n <= 101; n++ {
		for _, other := range []ID{{7: n, 15: 1}, {7: 1, 15: n}} {
			require.Nil(t, f.Hit(words(other)))
		}
		_, tag := f.table.chainFor(lowBits(id(n)))
		tags[tag] = true
		require.Equal(t, tag == firstTag, f.MayHit(lowBits(id(n))))
	}
	require.Len(t, tags, 100)
}

// A full bucket gets a successor. The chain is never longer than its values need, and readers find
// every value without the lock.
func TestChain(t *testing.T) {
	const crowd = 4 * ways
	crowded := func(n int) ID { return ID{14: byte(n), 15: 1} }
	f := newFence(crowd)
	f.table.chains = f.table.chains[:1]
	require.False(t, f.MayHit(1))
	for n := range crowd {
		_, ticket := f.Get(crowded(n), nil)
		f.Put(crowded(n), &value{Node: Node{ID: crowded(n)}, n: int64(n)}, ticket, nil)
		require.Equal(t, n/ways+1, checkTable(t, f))
	}
	require.Zero(t, uintptr(unsafe.Pointer(f.table.chains[0].next.Load()))%64, "not one line")
	for n := range crowd {
		require.True(t, f.MayHit(lowBits(crowded(n))))
		require.EqualValues(t, n, f.Hit(words(crowded(n))).n)
	}
	require.Equal(t, crowd, f.Stats().Cached)
	for left := crowd; left > 0; left-- {
		require.Equal(t, (left+ways-1)/ways, checkTable(t, f))
		n := left * 7 % crowd // some are first in the chain, some in the middle, some are last
		for f.table.get(words(crowded(n))) == nil {
			n = (n + 1) % crowd
		}
		f.Cut(crowded(n), nil)
		require.Nil(t, f.table.get(words(crowded(n))))
	}
	require.Equal(t, 1, checkTable(t, f))
	require.Zero(t, f.Stats().Cached)
}

// A value that moves to another slot keeps its touched bit. A new value in a slot has none.
func TestTouchedBitMoves(t *testing.T) {
	f := newFence(64)
	f.table.chains = f.table.chains[:1]
	touchedBit := func(n byte) bool {
		p, v := f.table.findLocked(id(n))
		require.NotNil(t, v)
		return p.touched()
	}
	for n := byte(1); n <= ways+2; n++ {
		load(f, n, 1)
		require.False(t, touchedBit(n))
	}
	require.NotNil(t, f.Hit(words(id(1))))
	require.NotNil(t, f.Hit(words(id(ways+2))))
	f.Cut(id(1), nil)
	for n := byte(2); n <= ways+2; n++ {
		require.Equal(t, n == ways+2, touchedBit(n), "%d", n)
	}
	f.Cut(id(2), nil)
	load(f, 2, 1)
	require.False(t, touchedBit(2))
	require.True(t, f.table.untouchLocked(id(ways+2)))
	require.False(t, f.table.untouchLocked(id(ways+2)))
	require.False(t, f.table.untouchLocked(id(1)))
}

// A reader that is in a bucket when the bucket leaves its chain finds no value there.
func TestBucketThatLeftItsChainIsEmpty(t *testing.T) {
	f := newFence(64)
	f.table.chains = f.table.chains[:1]
	for n := byte(1); n <= ways+1; n++ {
		load(f, n, 1)
	}
	gone := f.table.chains[0].next.Load()
	require.NotNil(t, gone)
	f.Cut(id(1), nil)
	require.Nil(t, f.table.chains[0].next.Load())
	for i := range gone.slots {
		require.Nil(t, gone.slots[i].Load())
	}
	require.NotNil(t, f.Hit(words(id(ways+1))))
}

// checkTable checks invariant 6 and the rings, and returns the number of buckets.
func checkTable(t *testing.T, f *Fence[value]) (buckets int) {
	t.Helper()
	rings := make(map[*value]bool)
	for i := range f.shards {
		s := &f.shards[i]
		for pos, v := range s.ring {
			require.Same(t, s, f.shard(v.ID))
			require.EqualValues(t, pos, v.pos)
			rings[v] = true
		}
		require.LessOrEqual(t, s.hand, cap(s.ring))
	}
	seen := make(map[ID]bool)
	for i := range f.table.chains {
		first := &f.table.chains[i]
		over := false // an empty slot was seen, so the chain must be over
		for b := first; b != nil; b = b.next.Load() {
			buckets++
			require.True(t, b == first || b.slots[0].Load() != nil, "an empty bucket in a chain")
			for way := range ways {
				tag := b.tags.Load() >> (8 * way) & 0xff
				v := b.slots[way].Load()
				if v == nil {
					require.Zero(t, tag)
					over = true
					continue
				}
				require.False(t, over, "a value after an empty slot")
				in, want := f.table.chainFor(lowBits(v.ID))
				require.Same(t, first, in)
				require.Equal(t, want, tag)
				require.False(t, seen[v.ID], "an ID is in two slots")
				seen[v.ID] = true
				require.True(t, rings[v], "a value in a slot is not in the ring")
			}
		}
	}
	require.Len(t, seen, len(rings))
	require.EqualValues(t, len(rings), f.Stats().Cached)
	require.EqualValues(t, len(rings), f.counts.cached.Load())
	return buckets
}

// Checks invariant 6, the rings and the count of cached values after each of many random steps. The
// table has two chains and the cache is small.
func TestTableMatchesRings(t *testing.T) {
	const ids, size = 48, 32
	f := newFence(size)
	f.table.chains = f.table.chains[:2]
	random := rand.New(rand.NewPCG(1, 2))
	begun := make(map[ID]int)
	most, least := 0, 10
	for range 2_000 {
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
				if random.IntN(4) == 0 { // a reader that missed at the same moment
					f.Put(id(n), val(n, 0), ticket, nil)
				}
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
		buckets := checkTable(t, f)
		most, least = max(most, buckets), min(least, buckets)
		cached := f.Stats().Cached
		require.LessOrEqual(t, cached, size)
		for of := range byte(ids) {
			if begun[id(of)] > 0 {
				require.Nil(t, peek(f, of), "an ID between Begin and End is cached")
			}
		}
	}
	require.Greater(t, most, 4, "long chains happened")
	require.Less(t, least, 4, "chains became shorter")
}

// Readers without a lock see no old value and no value of another ID, while values move in the
// chain and buckets come and go.
func TestReadersBesideMoves(t *testing.T) {
	const ids, rounds = 3 * ways, 20_000
	f := newFence(2 * ids)
	f.table.chains = f.table.chains[:1]
	var committed [ids]atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	var found atomic.Int64
	for range 4 {
		wg.Go(func() {
			for n := byte(0); ; n = (n + 1) % ids {
				select {
				case <-stop:
					return
				default:
				}
				least := committed[n].Load()
				v := f.Hit(words(id(n)))
				if v == nil {
					continue
				}
				found.Add(1)
				if v.ID != id(n) || v.n < least {
					t.Errorf("got %x, %d for %x, %d", v.ID, v.n, id(n), least)
					return
				}
			}
		})
	}
	random := rand.New(rand.NewPCG(1, 2))
	// A busy machine may run no reader during the rounds.
	for round := int64(0); round < rounds || found.Load() == 0 && !t.Failed(); round++ {
		n := byte(random.IntN(ids))
		f.Begin(id(n))
		committed[n].Store(round)
		f.End(id(n), nil)
		if random.IntN(3) > 0 {
			load(f, n, round)
		}
	}
	close(stop)
	wg.Wait()
	checkTable(t, f)
}

// Invariant 7: whatever tags a reader sees, the reader gets the value of its ID or no value.
func TestTagsAreOnlyHints(t *testing.T) {
	f := newFence(64)
	f.table.chains = f.table.chains[:1]
	for n := byte(1); n <= ways; n++ {
		load(f, n, int64(n))
	}
	b := &f.table.chains[0]
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
		if v := f.table.get(words(id(n))); v != nil {
			require.Equal(t, id(n), v.ID)
			found++
		}
	}
	require.NotZero(t, found)
	f.Begin(id(1))
	b.tags.Store(right)
	require.Nil(t, f.table.get(words(id(1))), "Begin finds the slot without the tags")
}
