package fence

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
)

// A table holds the cached values by ID. A reader finds a value without a lock. A table is an array
// of chains of buckets. An ID has one chain, and the value of the ID may be in any slot of the
// chain. Most chains are one bucket, and a bucket is one cache line.
//
// The reason: to take a lock would cost a hit as much as to find the value, and the lock of a hot
// key would be fetched from core to core. So step 1 of a reader looks into the table first, without
// a lock, unless the reader registers a binding.
//
// The invariants 1 to 4 are on Fence. The table adds three:
//
//  5. A value is current at the moment when a reader loads the value from its slot. That load is
//     step 1 of the hit. No newer value had been committed at that moment, because a Begin finishes
//     before its commit, and the Begin would have removed the value from the slot (6).
//  6. The slots are written under the lock of the shard only. While no lock is held, each cached
//     value is in exactly one slot, no slot holds any other value, and no ID is in two slots. The
//     occupied slots of a chain come first, and only the first bucket of a chain may be empty. A
//     bucket that has left its chain is empty, and never returns.
//  7. A value that a reader without the lock does not find decides nothing: the reader continues
//     under the lock. So a reader may see tags late, a value may move to a slot that the reader has
//     passed, the reader may be in a bucket that has left its chain, and anything may happen
//     between the loads of a tag and of its slot. The ID that the reader compares is part of the
//     value, and never changes.
type table[V any] struct {
	chains []bucket[V] // the first bucket of each; a power of two of them, or none without a cache
	node   func(*V) *Node
}

// ways is the number of slots that fill a cache line together with the tags and the link.
const ways = 6

// A bucket is read without a lock. All IDs of a bucket have the same shard, and the bucket is
// written under the lock of that shard, except for the touched bits.
type bucket[V any] struct {
	// Byte i is the tag of the ID in slot i, or 0 if the slot is empty. A tag is a hint that saves
	// loading the values of other IDs. A tag is written after the slot, so a reader may see the tag
	// late.
	//
	// Bit i of the last byte is the touched bit of slot i: a hit has found the value since the bit
	// was last cleared. Readers set the bit without the lock. So a bit may be set late, for the
	// next value of the slot.
	tags  atomic.Uint64
	_     [(ways + 1) * (64 - bits.UintSize) / 8]byte // fills the line where pointers have 32 bits
	slots [ways]atomic.Pointer[V]
	next  atomic.Pointer[bucket[V]] // the next bucket of the chain, or nil
}

const (
	perChain  = 4       // cached keys for each chain; 5 in 100 keys are not in the first bucket
	maxChains = 1 << 20 // 64 MiB
)

// newTable returns a table for about size values. The number of shards is a power of two.
func newTable[V any](size, shards int, node func(*V) *Node) table[V] {
	n := shards // with fewer chains, two shards would write one bucket
	for n < size/perChain && n < maxChains {
		n *= 2
	}
	return table[V]{make([]bucket[V], n), node}
}

// words returns the halves of an ID as two numbers.
func words(id ID) (hi, lo uint64) {
	return binary.BigEndian.Uint64(id[:8]), binary.BigEndian.Uint64(id[8:])
}

// lowBits returns the last eight bytes of an ID, which are evenly distributed: see ID.
func lowBits(id ID) uint64 { return binary.BigEndian.Uint64(id[8:]) }

// chainFor returns the first bucket and the tag of IDs with these low bits. A tag is not 0. The
// bits that select the shard are the lowest of the bits that select the chain.
func (t *table[V]) chainFor(bits uint64) (*bucket[V], uint64) {
	return &t.chains[bits&uint64(len(t.chains)-1)], bits>>40&0x7f | 0x80
}

// get returns the value of the ID with the two words, or nil, and sets the touched bit. Under the
// lock, nil means that the ID is not cached.
func (t *table[V]) get(hi, lo uint64) *V {
	if len(t.chains) == 0 {
		return nil
	}
	b, tag := t.chainFor(lo)
	for b != nil {
		tags := b.tags.Load()
		// The comparison of IDs finds out the bits that are set without a match.
		for found := matches(tags, tag); found != 0; found &= found - 1 {
			i := bits.TrailingZeros64(found) / 8
			if i >= ways {
				break
			}
			if v := b.slots[i].Load(); v != nil {
				if h, l := words(t.node(v).ID); l == lo && h == hi {
					// If the bit is set already, the line is not written, so every core can keep
					// the line of a hot value.
					if tags&touched(i) == 0 {
						b.tags.Or(touched(i))
					}
					return v
				}
			}
		}
		b = b.next.Load()
	}
	return nil
}

// mayHave reports whether get may find a value. mayHave loads nothing but the first bucket.
func (t *table[V]) mayHave(lo uint64) bool {
	if len(t.chains) == 0 {
		return false
	}
	b, tag := t.chainFor(lo)
	return matches(b.tags.Load(), tag) != 0 || b.next.Load() != nil
}

// matches returns a word whose byte i has its high bit set if byte i of tags is the tag. Above the
// lowest such byte, the bit may also be set without a match. The bytes that are no tags never
// match.
func matches(tags, tag uint64) uint64 {
	const each = 0x01_01_01_01_01_01_01_01
	const others = 0xffff << (8 * ways)
	differ := tags ^ tag*each | others // a byte is zero if the tag matches
	return (differ - each) &^ differ & (0x80 * each)
}

func touched(way int) uint64 { return 1 << (8*7 + way) }

// A place is a slot of a chain.
type place[V any] struct {
	b   *bucket[V]
	way int
}

// setLocked puts a value into a slot, or empties the slot if v is nil.
func (p place[V]) setLocked(v *V, tag uint64) {
	p.b.slots[p.way].Store(v)
	p.b.tags.And(^(0xff<<(8*p.way) | touched(p.way)))
	p.b.tags.Or(tag << (8 * p.way))
}

func (p place[V]) touched() bool { return p.b.tags.Load()&touched(p.way) != 0 }

// findLocked returns the place of the value of id, and the value. If id is not cached, the value is
// nil and the place is the last one that was looked at. findLocked looks at every slot of the
// chain, whatever the tags.
func (t *table[V]) findLocked(id ID) (place[V], *V) {
	b, _ := t.chainFor(lowBits(id))
	for {
		for i := range b.slots {
			v := b.slots[i].Load()
			if v == nil || t.node(v).ID == id {
				return place[V]{b, i}, v
			}
		}
		next := b.next.Load()
		if next == nil {
			return place[V]{b, ways - 1}, nil
		}
		b = next
	}
}

// putLocked makes v the value of id, and returns the value that v replaces, or nil. The touched bit
// of a new value is not set.
func (t *table[V]) putLocked(id ID, v *V) (old *V) {
	p, old := t.findLocked(id)
	_, tag := t.chainFor(lowBits(id))
	if old == nil && p.b.slots[p.way].Load() != nil { // the chain is full
		next := new(bucket[V])
		p.b.next.Store(next)
		p = place[V]{next, 0}
	}
	p.setLocked(v, tag)
	return old
}

// removeLocked removes and returns the value of id, or returns nil. The last value of the chain
// takes the place of the value.
func (t *table[V]) removeLocked(id ID) *V {
	p, v := t.findLocked(id)
	if v == nil {
		return nil
	}
	var before *bucket[V] // the bucket before the last one
	var last place[V]
	last.b, _ = t.chainFor(lowBits(id))
	for next := last.b.next.Load(); next != nil; next = next.next.Load() {
		before, last.b = last.b, next
	}
	for last.way+1 < ways && last.b.slots[last.way+1].Load() != nil {
		last.way++
	}
	if last != p {
		moved := last.b.slots[last.way].Load()
		p.setLocked(moved, last.b.tags.Load()>>(8*last.way)&0xff)
		if last.touched() {
			p.b.tags.Or(touched(p.way))
		}
	}
	last.setLocked(nil, 0)
	if last.way == 0 && before != nil {
		before.next.Store(nil)
	}
	return v
}

// untouchLocked clears the touched bit of id, and reports whether the bit was set.
func (t *table[V]) untouchLocked(id ID) bool {
	p, v := t.findLocked(id)
	if v == nil || !p.touched() {
		return false
	}
	p.b.tags.And(^touched(p.way))
	return true
}
