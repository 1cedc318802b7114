package fence

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

// A front finds cached values without a lock. A front is a table of buckets, and each bucket is one
// cache line. An ID has one bucket. The value of the ID may be in any slot of the bucket, or in no
// slot: values without a slot are found in the LRU.
//
// The reason: to take a lock would cost a hit as much as to find the value, and the lock of a hot
// key would be fetched from core to core. So step 1 of a reader looks into the front first, without
// a lock, unless the reader registers a binding.
//
// The invariants 1 to 4 are on Fence. The front adds three:
//
//  5. A value is current at the moment when a reader loads the value from its slot. That load is
//     step 1 of the hit. No newer value had been committed at that moment, because a Begin finishes
//     before its commit, and the Begin would have emptied the slot (6).
//  6. A slot is empty, or holds the same value that the LRU has for the ID. So invariants 1 and 2
//     hold for the slot too. A slot is written under the lock only. It is filled in the critical
//     section that installs the value in the LRU or finds the value in the LRU. It is emptied in
//     the critical section that removes the value from the LRU.
//  7. A value that is missing from the front, or seems to be missing, decides nothing: the reader
//     continues under the lock. So a reader may see tags late, a bucket may be too small for all
//     its values, and anything may happen between the loads of a tag and of its slot. The ID that
//     the reader compares is part of the value, and never changes.
type front[V any] struct {
	buckets []bucket[V] // the number is a power of two, or 0 without a cache
	node    func(*V) *Node
}

// ways is the number of slots that fill a cache line together with the tags of the slots.
const ways = 7

// A bucket is read without a lock. All IDs of a bucket have the same shard, and the bucket is
// written under the lock of that shard.
type bucket[V any] struct {
	// Byte i is the tag of the ID in slot i, or 0 if the slot is empty. A tag is a hint that saves
	// loading the values of other IDs. A tag is written after the slot, so a reader may see the tag
	// late.
	tags  atomic.Uint64
	_     [ways * (64 - bits.UintSize) / 8]byte // fills the cache line where a pointer has 32 bits
	slots [ways]atomic.Pointer[V]
}

const (
	perBucket  = 4       // cached keys for each bucket; 2 in 100 keys find no slot by chance
	maxBuckets = 1 << 16 // 4 MiB
)

// newFront returns a front for up to size values. The number of shards is a power of two.
func newFront[V any](size, shards int, node func(*V) *Node) front[V] {
	n := shards // with fewer buckets, two shards would write one bucket
	for n*perBucket < size && n < maxBuckets {
		n *= 2
	}
	return front[V]{make([]bucket[V], n), node}
}

// words returns the halves of an ID as two numbers.
func words(id ID) (hi, lo uint64) {
	return binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:])
}

// lowBits returns the last eight bytes of an ID, which are evenly distributed: see ID.
func lowBits(id ID) uint64 { return binary.BigEndian.Uint64(id[8:]) }

// bucketFor returns the bucket and the tag of IDs with these low bits. A tag is not 0. The bits
// that select the shard are the lowest of the bits that select the bucket.
func (f *front[V]) bucketFor(bits uint64) (*bucket[V], uint64) {
	return &f.buckets[bits&uint64(len(f.buckets)-1)], bits>>40&0x7f | 0x80
}

// get returns the value of the ID with the two words, or nil. The caller needs no lock.
func (f *front[V]) get(hi, lo uint64) *V {
	if len(f.buckets) == 0 {
		return nil
	}
	b, tag := f.bucketFor(lo)
	const each = 0x01_01_01_01_01_01_01_01
	// A byte of differ is zero if the tag matches. In found, the lowest zero byte of differ has its
	// high bit set. Higher bytes may have the bit set without a match, which the comparison of IDs
	// below finds out.
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

// putLocked makes v the value of id. If the bucket is full, v replaces another value, one without
// the touched bit if possible. An ID is never in two slots.
func (f *front[V]) putLocked(id ID, v *V) {
	b, tag := f.bucketFor(lowBits(id))
	way := int(lowBits(id) >> 48 % ways)
	rank := 0 // of the chosen way: 3 the same ID, 2 an empty slot, 1 an untouched value, or 0
	for i := range b.slots {
		r := 0
		switch old := b.slots[i].Load(); {
		case old == nil:
			r = 2
		case f.node(old).ID == id:
			r = 3
		case !f.node(old).touched.Load():
			r = 1
		}
		if r > rank {
			way, rank = i, r
		}
	}
	b.slots[way].Store(v)
	b.tags.Store(b.tags.Load()&^(0xff<<(8*way)) | tag<<(8*way))
}

// clearLocked removes the value of id. clearLocked looks at every slot, whatever the tags.
func (f *front[V]) clearLocked(id ID) {
	b, _ := f.bucketFor(lowBits(id))
	for i := range b.slots {
		if v := b.slots[i].Load(); v != nil && f.node(v).ID == id {
			b.slots[i].Store(nil)
			b.tags.Store(b.tags.Load() &^ (0xff << (8 * i)))
		}
	}
}

// touch sets the touched bit. If the bit is set already, touch only reads it, so every core can
// keep the cache line of a hot value.
func (n *Node) touch() {
	if !n.touched.Load() {
		n.touched.Store(true)
	}
}
