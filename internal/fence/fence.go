// Package fence is a cache that a revocation cannot lose a race against, with the contexts that live as long as a key
// does beside it.
//
// # The race
//
// A look-aside cache re-admits revoked keys: a reader misses and reads the old record, the revocation commits and
// evicts, and then the reader installs the old record, where it stays. Checked for linearizability over 300 rounds of
// 240 operations:
//
//	how the cache is invalidated                             rounds that were not linearizable
//	read, miss, store read, add; write, commit, remove       154
//	per-shard generation bumped before the commit only        63
//	per-shard generation bumped after the commit only          8
//	two phases, as here                                        0
//
// Leases (Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, §3.2.1) are the same idea for a cache on the
// network; Guava's issue 1881 is what happens without. The wrong ones are in variant.go, and the tests catch each.
package fence

import (
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// An ID names a key. Its last eight bytes are taken as evenly spread; those of a UUIDv7 are random, but for two bits.
type ID = [16]byte

// A Fence caches values by ID, and holds the bindings of each ID. It is safe for concurrent use.
//
// A reader goes:
//
//	v, ticket := f.Get(id, nil)        // 1 a hit is current at a moment of this call
//	v = read the store                 // 2 on a miss
//	f.Put(id, v, ticket, nil)          // 3 installs v, if nothing could have changed since 1
//
// and whoever changes the store goes:
//
//	f.Begin(id)                        // A from here on, no reader hits id, and none that passed 1 installs it
//	commit durably                     // B
//	f.End(id, v)                       // C readers may install id again; bindings are told of the new value
//
// The invariants, each held under the shard's lock; for 5 to 7 see front:
//
//  1. A cached value is the committed one. It is installed only if the generation has not moved since before it was
//     read from the store, and nobody is between Begin and End for its ID; Begin evicts it before the commit. So the
//     step at which a hit takes effect is 1, and that of a miss is 2: both show what is committed, in its order.
//  2. While pending[id] > 0, id is not cached. Readers read the store, and see the change or do not; having seen it,
//     none can go back to a cached older value, because there is none. (Bumping only after the commit fails here: one
//     reader sees the new record in the store while another still hits the old one.)
//  3. A binding is registered in the critical section that finds its value current. On a hit that is 1. On a miss it
//     is 3, where it suffices that nobody has told bindings anything since 1: a change that the value does not show was
//     committed after 2, so its End is still to come and will find the binding. (Requiring an unmoved generation too
//     would be right, and would make binds wait for, or fail because of, every commit in flight.)
//  4. A binding that an End finds is told before that End returns, and outside the lock, because it runs code of the
//     caller's. Two changes of one ID may tell it in either order. It stays registered until it has been told: another
//     End of its ID finds it too, and does not return before it has ended. Those that a value ends are then taken out
//     together, and only when all have ended does any of them do more about it than end.
//
// There is no sharing of store reads between readers (singleflight): one that joins a read begun before a change,
// after that change has returned, is handed the old value.
//
// A generation for each shard and not for each ID keeps no memory of IDs that are gone; the price is that a change
// stops the installs of innocent neighbours that are being read at that moment. They are installed the next time.
//
// A hit in the front does not move its value to the LRU's young end, which takes the lock. It marks it, and what is marked
// when it is the oldest is moved there instead of evicted, once for each mark.
type Fence[V any] struct {
	// All of these are only read after New.
	shards []shard[V]
	front  front[V]
	size   int64
	counts *counts
	steps  Variant
}

// counts are apart, because they are written to.
type counts struct {
	hits   stripedCounter
	cached atomic.Int64 // values in all LRUs
}

// A Node is a part of each value: by it the front finds the value.
type Node struct {
	ID      ID // whose value it is
	touched atomic.Bool
}

type shard[V any] struct {
	mu sync.Mutex // guards all below; never held over a read of the store, a digest, or a cancel

	gen           uint64 // how many phases A and C have passed
	notifications uint64 // how many times bindings were told of something

	lru     *simplelru.LRU[ID, *V]          // nil: no cache
	pending map[ID]int                      // how many are between Begin and End
	bound   map[ID]map[*Binding[V]]struct{} // what is live under each ID
	closed  bool                            // nothing is bound any more

	misses uint64

	_ [64]byte // so that no two locks are in one cache line
}

// A Binding is something that lives under a key until the key no longer admits it. It is compared by address. Its
// functions may be called again, and at once.
type Binding[V any] struct {
	// Changed is told of each new value that is committed, after all that was committed before, and reports whether that
	// ended it. It must not block, nor call the fence: a change has thousands to tell.
	Changed func(v *V) (ended bool)
	// Cut ends it, whatever the value, and otherwise is like Changed.
	Cut func(cause error)
	// Ended, if not nil, is called when it has ended by one of these and been released, and so have all others that the
	// same call ends. It should be quick.
	Ended func()
	// AfterEnd is called in the background after Ended, and may block.
	AfterEnd func()
	// Admitted is set by the caller. Bound and IsBound count only bindings for which it is true.
	Admitted atomic.Bool
}

// A Ticket is what a shard looked like before a store read. The zero Ticket is not valid.
type Ticket struct{ gen, notifications uint64 }

// Stats are counts since New, and numbers of now.
type Stats struct {
	Hits, Misses  uint64 // of Get
	Cached, Bound int
}

// maxShards bounds the shards, and minPerShard keeps a small cache in one piece: its capacity is then exact.
const (
	maxShards   = 64
	minPerShard = 256
)

// New returns a fence that caches about size values, at most one more for each shard; 0 or less means none. A function
// returns the Node that a value has.
func New[V any](size int, node func(*V) *Node) *Fence[V] {
	n := maxShards
	for n > 1 && size < n*minPerShard {
		n /= 2
	}
	if size <= 0 {
		n = maxShards
	}
	f := &Fence[V]{shards: make([]shard[V], n), size: int64(size), counts: new(counts), steps: TwoPhase}
	if size > 0 {
		f.front = newFront(size, n, node)
	}
	for i := range f.shards {
		s := &f.shards[i]
		s.pending = make(map[ID]int)
		s.bound = make(map[ID]map[*Binding[V]]struct{})
		if size > 0 {
			// The only error is for a size below 1. It is not the LRU that evicts, but addLocked.
			s.lru, _ = simplelru.NewLRU[ID, *V](math.MaxInt, nil)
		}
	}
	return f
}

func (f *Fence[V]) shard(id ID) *shard[V] {
	return &f.shards[lowBits(id)&uint64(len(f.shards)-1)]
}

// Hit is Get for an ID in two words, the first the more significant, if that needs no lock. Otherwise it returns nil, which
// says nothing.
func (f *Fence[V]) Hit(hi, lo uint64) *V {
	v := f.front.get(hi, lo)
	if v != nil {
		f.counts.hits.add()
	}
	return v
}

// Get returns the current value of id if it is cached, and registers b, unless that is nil, with it. Otherwise it
// returns nil and the ticket for Put, and registers nothing.
func (f *Fence[V]) Get(id ID, b *Binding[V]) (*V, Ticket) {
	if b == nil {
		if v := f.Hit(words(id)); v != nil {
			return v, Ticket{}
		}
	}
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lru != nil && (b == nil || !s.closed) { // pending or not: see 2
		if v, ok := s.lru.Get(id); ok {
			f.front.putLocked(id, v) // a Get without a binding has just missed it there
			f.counts.hits.add()
			s.bindLocked(id, b)
			return v, Ticket{}
		}
	}
	s.misses++
	return nil, Ticket{s.gen, s.notifications}
}

// Put takes the value that was read from the store after the Get that gave the ticket, and has been decided to admit:
// it is cached if it is certain to be current. A binding is registered too; false means that it was not, because
// it may already be due to end, and the caller starts again from Get.
func (f *Fence[V]) Put(id ID, v *V, t Ticket, b *Binding[V]) bool {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if b != nil && (s.closed || s.notifications != t.notifications) {
		return false
	}
	s.bindLocked(id, b)
	if s.lru == nil {
		return true
	}
	if s.gen == t.gen && s.pending[id] == 0 {
		f.addLocked(s, id, v)
		f.front.putLocked(id, v)
	} else if f.steps&careless != 0 {
		f.front.putLocked(id, v)
	}
	return true
}

// addLocked puts a value into the LRU. The room is counted for all shards together, because chance gives some more IDs than
// others; it is made in this one.
func (f *Fence[V]) addLocked(s *shard[V], id ID, v *V) {
	if !s.lru.Contains(id) && f.counts.cached.Add(1) > f.size {
		f.evictLocked(s)
	}
	s.lru.Add(id, v)
}

// evictLocked evicts the oldest value that has not been used since it was young, of the first maxSecondChances.
func (f *Fence[V]) evictLocked(s *shard[V]) {
	for chances := maxSecondChances; ; chances-- {
		id, v, ok := s.lru.GetOldest()
		if !ok {
			return
		}
		if chances == 0 || !f.front.node(v).touched.Swap(false) {
			f.removeLocked(s, id)
			f.front.clearLocked(id)
			return
		}
		s.lru.Get(id) // makes it the youngest
	}
}

const maxSecondChances = 64

func (f *Fence[V]) removeLocked(s *shard[V], id ID) {
	if s.lru.Remove(id) {
		f.counts.cached.Add(-1)
	}
}

func (s *shard[V]) bindLocked(id ID, b *Binding[V]) {
	if b == nil {
		return
	}
	set := s.bound[id]
	if set == nil {
		set = make(map[*Binding[V]]struct{}, 1)
		s.bound[id] = set
	}
	set[b] = struct{}{}
}

// Release takes b from the registry, without cancelling it. A second call does nothing.
func (f *Fence[V]) Release(id ID, b *Binding[V]) {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.releaseLocked(id, b)
}

func (s *shard[V]) releaseLocked(id ID, all ...*Binding[V]) {
	set := s.bound[id]
	for _, b := range all {
		delete(set, b)
	}
	if len(set) == 0 {
		delete(s.bound, id)
	}
}

// Begin is phase A: call it before the change of id is committed. Every Begin has one End, with one exception: where it
// is unknown whether the change took effect, and when it might yet, End is never called, and id stays out of the cache.
func (f *Fence[V]) Begin(id ID) {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	f.invalidateLocked(s, id, f.steps&evictBefore != 0, f.steps&clearBefore != 0, f.steps&bumpBefore != 0)
	if f.steps&blockInstalls != 0 {
		s.pending[id]++
	}
}

// End is phase C: call it once the commit has succeeded, with the new value, or is certain to have changed nothing,
// with nil. Every binding of id is told of the value before End returns.
func (f *Fence[V]) End(id ID, v *V) {
	s := f.shard(id)
	s.mu.Lock()
	f.invalidateLocked(s, id, f.steps&evictAfter != 0, f.steps&clearAfter != 0, f.steps&bumpAfter != 0)
	if f.steps&blockInstalls != 0 {
		if s.pending[id]--; s.pending[id] == 0 {
			delete(s.pending, id)
		}
	}
	var bindings []*Binding[V]
	if v != nil {
		bindings = s.startNotifyLocked(id)
	}
	s.mu.Unlock()
	s.notify(id, bindings, func(b *Binding[V]) bool { return b.Changed(v) })
}

// Notify tells every binding of id of a value that is committed already, by somebody else, whose End may not have come
// yet.
func (f *Fence[V]) Notify(id ID, v *V) {
	s := f.shard(id)
	s.mu.Lock()
	bindings := s.startNotifyLocked(id)
	s.mu.Unlock()
	s.notify(id, bindings, func(b *Binding[V]) bool { return b.Changed(v) })
}

// Cut ends every binding of id and evicts it, whatever the store says. It is how a revocation whose outcome is unknown
// fails closed.
func (f *Fence[V]) Cut(id ID, cause error) {
	s := f.shard(id)
	s.mu.Lock()
	f.invalidateLocked(s, id, true, true, true)
	bindings := s.startNotifyLocked(id)
	s.mu.Unlock()
	s.notify(id, bindings, func(b *Binding[V]) bool { b.Cut(cause); return true })
}

// Close ends every binding and registers no more.
func (f *Fence[V]) Close(cause error) {
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		s.closed = true
		ids := slices.Collect(maps.Keys(s.bound))
		s.mu.Unlock()
		for _, id := range ids {
			f.Cut(id, cause)
		}
	}
}

// Stats counts. All shards are read at one moment, and hits just before: every one that has returned is counted.
func (f *Fence[V]) Stats() Stats {
	st := Stats{Hits: f.counts.hits.sum()}
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock() // nobody else holds two
		defer s.mu.Unlock()
		st.Misses += s.misses
		if s.lru != nil {
			st.Cached += s.lru.Len()
		}
		for _, set := range s.bound {
			st.Bound += len(set)
		}
	}
	return st
}

// Bound returns the IDs that have an admitted binding. The shards are read one after the other.
func (f *Fence[V]) Bound() (ids []ID) {
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		for id := range s.bound {
			if s.isBoundLocked(id) {
				ids = append(ids, id)
			}
		}
		s.mu.Unlock()
	}
	return ids
}

// IsBound reports whether id has an admitted binding.
func (f *Fence[V]) IsBound(id ID) bool {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isBoundLocked(id)
}

func (s *shard[V]) isBoundLocked(id ID) bool {
	for b := range s.bound[id] {
		if b.Admitted.Load() {
			return true
		}
	}
	return false
}

func (f *Fence[V]) invalidateLocked(s *shard[V], id ID, evict, clear, bump bool) {
	if bump {
		s.gen++
	}
	if s.lru == nil {
		return
	}
	if evict {
		f.removeLocked(s, id)
	}
	if clear {
		f.front.clearLocked(id)
	}
}

// startNotifyLocked returns the bindings to tell, which stay registered meanwhile.
func (s *shard[V]) startNotifyLocked(id ID) []*Binding[V] {
	s.notifications++
	set := s.bound[id]
	return slices.AppendSeq(make([]*Binding[V], 0, len(set)), maps.Keys(set))
}

// notify tells bindings of id, and finishes with those that it ends.
func (s *shard[V]) notify(id ID, bindings []*Binding[V], call func(*Binding[V]) (ended bool)) {
	ended := bindings[:0]
	for _, b := range bindings {
		if call(b) {
			ended = append(ended, b)
		}
	}
	if len(ended) == 0 {
		return
	}
	s.mu.Lock()
	s.releaseLocked(id, ended...)
	s.mu.Unlock()
	for _, b := range ended {
		if b.Ended != nil {
			b.Ended()
		}
	}
	go runAfterEnd(ended)
}
