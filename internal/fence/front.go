package fence

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

// A front finds cached values without a lock; see the invariants below. It is a table of buckets of one cache line
// each. An ID has one bucket, and its value may be in any of the slots, or in none: what does not fit in is found
// in the LRU.
//
// A lock would cost a hit as much as finding the value, and a hot key's would be fetched from core to core. So a front
// stands before the LRU, which step 1 looks at first, with no lock, unless it is to bind:
//
//  5. A value is current at the moment at which it is loaded from its slot: that load is step 1 of such a hit. For
//     nothing was committed over it, since a Begin, which is through before its commit, would have emptied the slot (6).
//  6. A slot holds nothing, or the very value that the LRU has for the ID, so that 1 and 2 are true of it too. It is
//     written under the lock only: filled in the critical section that installs the value in the LRU or finds it
//     there, and emptied in the one that takes it out of there.
//  7. A front that lacks a value, or seems to, decides nothing: the reader goes on under the lock. So it does not
//     matter that tags may be seen late, that a bucket has not room for all, or what a reader does between a load of
//     the one and of the other. The ID that is compared is part of the value, and never changes.
type front[V any] struct {
	buckets []bucket[V] // a power of two; none without a cache
	node    func(*V) *Node
}

// ways is how many slots fill a cache line, beside their tags.
const ways = 7

// A bucket is read by everyone, and written under the lock of the one shard that its IDs have.
type bucket[V any] struct {
	// Byte i is the tag of the ID in slot i, 0 for none. It saves looking at values of other IDs, and decides nothing: it
	// is written after the slot, and a reader may see it late.
	tags  atomic.Uint64
	_     [ways * (64 - bits.UintSize) / 8]byte // fills the cache line where a pointer has 32 bits
	slots [ways]atomic.Pointer[V]
}

const (
	perBucket  = 4       // keys of the capacity: chance gives 2 in 100 of them no slot
	maxBuckets = 1 << 16 // 4 MiB
)

// newFront returns a front for up to size values in so many shards, which are a power of two.
func newFront[V any](size, shards int, node func(*V) *Node) front[V] {
	n := shards // or two shards would write one bucket
	for n*perBucket < size && n < maxBuckets {
		n *= 2
	}
	return front[V]{make([]bucket[V], n), node}
}

// words returns an ID as two numbers. The bits of the second are taken as evenly spread.
func words(id ID) (hi, lo uint64) {
	return binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:])
}

func lowBits(id ID) uint64 { return binary.BigEndian.Uint64(id[8:]) }

// bucketFor returns the bucket of IDs with these bits, and their tag, which is not 0. The shard is selected by the last bits of
// those that select the bucket.
func (f *front[V]) bucketFor(bits uint64) (*bucket[V], uint64) {
	return &f.buckets[bits&uint64(len(f.buckets)-1)], bits>>40&0x7f | 0x80
}

// get returns the value of the ID of two words, or nil. It is called with no lock.
func (f *front[V]) get(hi, lo uint64) *V {
	if len(f.buckets) == 0 {
		return nil
	}
	b, tag := f.bucketFor(lo)
	const each = 0x01_01_01_01_01_01_01_01
	// The lowest byte that is zero now, if one is, has its high bit set then, and so may some above it that are not.
	differ := b.tags.Load() ^ tag*each
	for found := (differ - each) &^ differ & (0x80 * each); found != 0; found &= found - 1 {
		i := bits.TrailingZeros64(found) / 8
		if i >= ways {
			break
		}
		if v := b.slots[i].Load(); v != nil {
			n := f.node(v)
			if h, l := words(n.ID); l == lo && h == hi {
				n.touch()
				return v
			}
		}
	}
	return nil
}

// putLocked makes v the value of id, in place of another one if need be: of one that was not used of late, if there is
// one. An ID is never in two slots.
func (f *front[V]) putLocked(id ID, v *V) {
	b, tag := f.bucketFor(lowBits(id))
	way := int(lowBits(id) >> 48 % ways)
	rank := 0 // of the way: why to take it
	for i := range b.slots {
		r := 0
		switch had := b.slots[i].Load(); {
		case had == nil:
			r = 2
		case f.node(had).ID == id:
			r = 3
		case !f.node(had).touched.Load():
			r = 1
		}
		if r > rank {
			way, rank = i, r
		}
	}
	b.slots[way].Store(v)
	b.tags.Store(b.tags.Load()&^(0xff<<(8*way)) | tag<<(8*way))
}

// clearLocked takes the value of id out. It looks at all slots, whatever their tags.
func (f *front[V]) clearLocked(id ID) {
	b, _ := f.bucketFor(lowBits(id))
	for i := range b.slots {
		if v := b.slots[i].Load(); v != nil && f.node(v).ID == id {
			b.slots[i].Store(nil)
			b.tags.Store(b.tags.Load() &^ (0xff << (8 * i)))
		}
	}
}

// touch says that the value was used. A hot one is written to once, and then only read, so that all cores can keep it.
func (n *Node) touch() {
	if !n.touched.Load() {
		n.touched.Store(true)
	}
}
