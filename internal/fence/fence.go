// Package fence provides a cache that never serves a value older than the last committed change,
// and a registry of callbacks bound to cached IDs.
//
// A reader asks the cache, reads the store on a miss, and offers the value to the cache. A writer
// calls Begin before each commit and End after the commit. [Fence] describes the steps and the
// invariants.
//
// # The race
//
// An ordinary look-aside cache may admit a revoked key again. A reader misses and reads the old
// record from the store. A revocation commits and evicts the key. Then the reader installs the old
// record, and the record stays in the cache.
//
// The table compares four ways to invalidate a cache. For each way, 300 rounds of 240 operations
// were checked for linearizability:
//
//	how the cache is invalidated                             rounds that were not linearizable
//	read, miss, store read, add; write, commit, remove       154
//	per-shard generation bumped before the commit only        63
//	per-shard generation bumped after the commit only          8
//	two phases, as here                                        0
//
// Leases (Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, §3.2.1) are the same idea
// for a cache on the network. Guava's issue 1881 shows the race in a cache without leases. File
// variant.go contains the wrong ways, and the tests detect each of them.
package fence

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/grpc-api-key/grpc-api-key/internal/striped"
)

// An ID names a key. The fence expects the last eight bytes of IDs to be evenly distributed. In a
// UUIDv7, the last eight bytes are random except for two bits.
type ID = [16]byte

// A Fence caches values by ID and holds the bindings of each ID. A Fence is safe for concurrent
// use.
//
// A reader takes three steps:
//
//	v, ticket := f.Get(id, nil)  // 1  a hit was current at some moment of this call
//	v = read the store           // 2  after a miss only
//	f.Put(id, v, ticket, nil)    // 3  installs v if nothing can have changed since step 1
//
// A writer takes three phases:
//
//	f.Begin(id)                  // A  evicts id; from now on, no reader hits id, and
//	                             //    no reader that passed step 1 earlier installs id
//	commit durably               // B
//	f.End(id, v)                 // C  allows installs again; calls the bindings of id with v
//
// A reader that runs three times beside one writer, all for the same ID:
//
//	reader                               | writer
//	-------------------------------------+---------------------------------------------
//	1  Get: miss, the ticket has gen 7   |
//	2  read the store: old value         |
//	                                     | A  Begin: evict, gen becomes 8, pending 1
//	3  Put: gen is not 7, do not install |
//	1  Get: miss, the ticket has gen 8   |
//	                                     | B  commit the new value
//	2  read the store: new value         |
//	3  Put: pending is 1, do not install |
//	                                     | C  End: gen becomes 9, pending 0; notify
//	1  Get: miss, the ticket has gen 9   |
//	2  read the store: new value         |
//	3  Put: install the new value        |
//
// # Invariants
//
// Each invariant except 5 is maintained under the lock of the shard. Invariants 5 to 7 are on the
// type table, which finds values without a lock.
//
//  1. If one process makes all changes, a cached value is the committed value. Put installs a value
//     only if the generation has not moved since before the value was read from the store, and no
//     writer is between Begin and End for the ID. Begin evicts the value before the commit. So a
//     hit takes effect at step 1, and a miss takes effect at step 2. Both return what is committed
//     at that step, in commit order.
//  2. While pending[id] > 0, id is not cached. Readers read the store, and either see the change or
//     do not. A reader that has seen the change cannot return to an older cached value, because the
//     cache has no value for id. (Moving the generation only after the commit breaks this
//     invariant: one reader sees the new record in the store while another reader still hits the
//     old record.)
//  3. A binding is registered in the critical section that finds its value current. On a hit, that
//     section is step 1. On a miss, that section is step 3, and Put checks only that the shard has
//     sent no notification since step 1. This check is enough: a change that the value does not
//     show was committed after step 2, so the End of the change is still to come and will find the
//     binding. (To require an unmoved generation too would also be correct, but then a Bind would
//     wait for the commits in flight, or fail because of them.)
//  4. A binding that End finds is notified before that End returns. The notification runs outside
//     the lock, because the notification runs code of the caller. Two changes of one ID may notify
//     a binding in either order. A binding stays registered until the notification has returned, so
//     another End of the same ID finds the binding too, and does not return before the binding has
//     ended. Bindings ended by the new value are removed as a batch. The Ended and AfterEnd
//     callbacks run only after every one of these bindings has been marked ended.
//
// # Several processes
//
// If several processes change the store, Begin and End still surround the changes of this process,
// and the process calls Publish for the changes of all processes, in the order of the changes. Then
// invariant 1 is weaker: a cached value is the committed value, or an older value whose successor
// was not published yet. Two more invariants hold:
//
//  8. After the Publish of a value, no older value of the ID is cached, and each binding of the ID
//     has received the value or was registered with the value or a later value. The reason: Publish
//     moves the generation and the notifications in the critical section that evicts the ID. A
//     reader with an earlier ticket neither installs a value nor registers a binding. A reader
//     with a later ticket reads the store after the call of Publish.
//  9. After Flush has reached a shard, the same holds for every value of the shard that was
//     committed before Flush, published or not: no value that was read before is cached, and no
//     binding with such a value is registered.
//
// # Alternatives
//
// Readers do not share a store read that is running (singleflight). A reader that starts after a
// change has returned could join a read that began before the change, and would receive the old
// value. Readers may share a store read that begins after the Get of each of these readers.
//
// Each shard has a generation, and IDs have none, so the fence needs no memory for IDs that are
// gone. The price: a change also stops the installs of other IDs of the shard that are being read
// at that moment. The next read installs these values.
//
// Eviction is CLOCK (second chance), because a true LRU would take the lock on every hit to move
// the value to the young end. A hit sets the value's touched bit instead. The values of a shard are
// in a ring, and the hand points to the oldest. If the oldest value is touched, the eviction clears
// the bit and moves the hand past the value, which is then the youngest. So each time the bit was
// set, the value gets one second chance. A new value takes the place of the evicted value, behind
// the hand. A ring costs 8 bytes a value; a list and a map, as in an LRU, would cost 150.
type Fence[V any] struct {
	// No field is written after New; a test may call Break before the first use.
	shards  []shard[V]
	table   table[V]
	size    int64
	counts  *counts
	steps   Variant
	reports *reports
}

// counts is allocated apart from the Fence, because hits and installs write to the counts while the
// fields of the Fence are only read.
type counts struct {
	hits   striped.Counter
	cached atomic.Int64 // values in the rings of all shards
}

// A Node is a part of each value. The fence finds a value by the Node. A value that was given to
// Put belongs to the fence until the fence is gone: do not give the value to another fence.
type Node struct {
	ID  ID     // whose value it is
	pos uint32 // the index of the value in the ring of the shard; guarded by the lock of the shard
}

type shard[V any] struct {
	mu sync.Mutex // guards all below; never held during a store read, a digest, or a callback

	gen           uint64 // how many phases A and C have passed
	notifications uint64 // how many times bindings were notified

	ring    []*V                            // the cached values of the shard, in no slot twice
	hand    int                             // the index in ring of the oldest value
	pending map[ID]int                      // how many writers are between Begin and End
	bound   map[ID]map[*Binding[V]]struct{} // the registered bindings of each ID
	closed  bool                            // no more bindings are registered

	misses  uint64
	evicted uint64

	_ [32]byte // keeps two locks out of one cache line
}

// A Binding is a set of callbacks that is bound to a key until the key no longer admits the owner
// of the binding. A Binding is identified by its address. A callback may be called again, and
// several calls may run at the same time.
type Binding[V any] struct {
	// Changed receives each new value, after the value was committed, and reports whether the value
	// ends the binding. Two values may arrive in either order: see invariant 4 of Fence. Changed
	// must not block or call the fence, because one change may have thousands of bindings to
	// notify.
	Changed func(v *V) (ended bool)
	// Cut ends the binding, whatever the value. Otherwise Cut is like Changed.
	Cut func(cause error)
	// Ended is called after Changed or Cut has ended the binding and the binding has been released.
	// All other bindings ended by the same call have been ended and released too by then. Ended
	// should be quick. Ended may be nil.
	Ended func()
	// AfterEnd is called in the background after Ended, and may block.
	AfterEnd func()
	// Admitted is set by the caller. Bound, IsBound and BoundTo count only bindings with Admitted
	// set.
	Admitted atomic.Bool
}

// A Ticket is the state of a shard before a store read. The zero Ticket is not valid.
type Ticket struct{ gen, notifications uint64 }

// Stats holds counts since New (Hits, Misses, Evicted) and current numbers (Cached, Bound).
type Stats struct {
	Hits, Misses  uint64 // of Get
	Evicted       uint64 // the values that left a full cache
	Cached, Bound int
}

// maxShards is the upper limit of the number of shards. minPerShard keeps a small cache in one
// shard, so that the capacity is exact.
const (
	maxShards   = 64
	minPerShard = 256
)

// New returns a fence that caches about size values, and at most one more for each shard. A size of
// 0 or less means no cache. The function node returns the Node of a value.
func New[V any](size int, node func(*V) *Node) *Fence[V] {
	n := maxShards
	for n > 1 && size < n*minPerShard {
		n /= 2
	}
	if size <= 0 {
		n = maxShards
	}
	f := &Fence[V]{
		shards:  make([]shard[V], n),
		size:    int64(size),
		counts:  new(counts),
		steps:   TwoPhase,
		reports: new(reports),
	}
	if size > 0 {
		f.table = newTable(size, n, node)
	}
	for i := range f.shards {
		s := &f.shards[i]
		s.pending = make(map[ID]int)
		s.bound = make(map[ID]map[*Binding[V]]struct{})
	}
	return f
}

func (f *Fence[V]) shard(id ID) *shard[V] {
	return &f.shards[lowBits(id)&uint64(len(f.shards)-1)]
}

// Hit returns the value of an ID if the table has the value, and takes no lock. The words hi and lo
// are the first and the last eight bytes of the ID, big-endian. A nil result decides nothing: the
// caller then calls Get. Hit does not count the hit in Stats: the caller counts what the hit led
// to. The processor loads nothing else while it counts, so the caller should count at the end.
func (f *Fence[V]) Hit(hi, lo uint64) *V { return f.table.get(hi, lo) }

// MayHit reports whether Hit may find the value of an ID whose last eight bytes are lo. If MayHit
// is false, Hit would return nil at this moment.
func (f *Fence[V]) MayHit(lo uint64) bool { return f.table.mayHave(lo) }

// Get returns the current value of id if the value is cached, and registers b with the value unless
// b is nil. Otherwise Get returns nil and the ticket for Put, and registers nothing.
func (f *Fence[V]) Get(id ID, b *Binding[V]) (*V, Ticket) {
	hi, lo := words(id)
	if b == nil {
		if v := f.table.get(hi, lo); v != nil {
			f.counts.hits.Add()
			return v, Ticket{}
		}
	}
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if b == nil || !s.closed { // a pending ID is not cached: invariant 2
		if v := f.table.get(hi, lo); v != nil {
			f.counts.hits.Add()
			s.bindLocked(id, b)
			return v, Ticket{}
		}
	}
	s.misses++
	return nil, Ticket{s.gen, s.notifications}
}

// Put offers the value that the caller read from the store after the Get that returned t. The
// caller has decided that the value admits. Put caches the value if the value is certain to be
// current, and registers b unless b is nil. Put returns false if b was not registered, because b
// may already be due to end. The caller then starts again from Get.
func (f *Fence[V]) Put(id ID, v *V, t Ticket, b *Binding[V]) bool {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if b != nil && (s.closed || s.notifications != t.notifications) {
		return false
	}
	s.bindLocked(id, b)
	current := s.gen == t.gen && s.pending[id] == 0
	if f.caches() && (current || f.steps&careless != 0) {
		f.addLocked(s, id, v)
	}
	return true
}

// caches reports whether the fence has a cache.
func (f *Fence[V]) caches() bool { return f.size > 0 }

// addLocked caches a value. The capacity is counted for all shards together, because some shards
// have more IDs than others by chance. The value to evict is taken from this shard.
func (f *Fence[V]) addLocked(s *shard[V], id ID, v *V) {
	node := f.table.node(v)
	if old := f.table.putLocked(id, v); old != nil {
		node.pos = f.table.node(old).pos
		s.ring[node.pos] = v
		return
	}
	if f.counts.cached.Add(1) > f.size && len(s.ring) > 0 {
		node.pos = f.evictLocked(s)
		s.ring[node.pos] = v
		return
	}
	node.pos = uint32(len(s.ring))
	s.ring = append(s.ring, v)
}

// evictLocked evicts the oldest value whose touched bit is not set, moves the hand past the value,
// and returns the index of the free place in the ring. Each older value gets its second chance.
// After maxSecondChances of them, evictLocked evicts the oldest value in any case. The ring is not
// empty.
func (f *Fence[V]) evictLocked(s *shard[V]) (pos uint32) {
	for chances := maxSecondChances; ; chances-- {
		if s.hand >= len(s.ring) {
			s.hand = 0
		}
		pos := s.hand
		s.hand++
		id := f.table.node(s.ring[pos]).ID
		if !f.table.untouchLocked(id) || chances == 0 {
			f.table.removeLocked(id)
			f.counts.cached.Add(-1)
			s.evicted++
			return uint32(pos)
		}
	}
}

const maxSecondChances = 64

// removeLocked removes the value of id from the cache. The last value of the ring takes the place
// of the value, so the ring has no gaps. The age of that one value is then wrong.
func (f *Fence[V]) removeLocked(s *shard[V], id ID) {
	v := f.table.removeLocked(id)
	if v == nil {
		return
	}
	pos, last := f.table.node(v).pos, len(s.ring)-1
	s.ring[pos] = s.ring[last]
	f.table.node(s.ring[pos]).pos = pos
	s.ring[last] = nil
	s.ring = s.ring[:last]
	f.counts.cached.Add(-1)
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

// Release removes b from the registry without ending b. A second call does nothing.
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

// Begin is phase A. Call Begin before the change of id is committed. Every Begin has one End, with
// one exception. If the outcome of the change is unknown, the change may still take effect at any
// time. Then End is never called, and id stays out of the cache. If Publish reports each change
// that takes effect, call Cut and then End with nil instead: an ID must not stay out of the cache
// for good after each call of the network that fails.
func (f *Fence[V]) Begin(id ID) {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	f.invalidateLocked(s, id, f.steps&evictBefore != 0, f.steps&bumpBefore != 0)
	if f.steps&blockInstalls != 0 {
		s.pending[id]++
	}
}

// End is phase C. Call End with the new value after the commit has succeeded, or with nil once the
// commit is certain to have changed nothing. End notifies every binding of id of the new value
// before End returns.
func (f *Fence[V]) End(id ID, v *V) {
	s := f.shard(id)
	s.mu.Lock()
	f.invalidateLocked(s, id, f.steps&evictAfter != 0, f.steps&bumpAfter != 0)
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

// Publish is Begin and End in one critical section, for a value that another process has committed.
// Publish evicts id, and notifies every binding of id of the value before Publish returns. Publish
// calls value only if id has a binding, at most once, and without a lock: most values that other
// processes commit have no binding, and need not be decoded. If value is nil or returns nil, the
// value is gone or unknown: Publish then ends every binding of id with cause.
//
// Publish, Flush and EndAll call Ended in the background, and do not wait: their caller reads the
// changes of all processes, and code of the user must not delay the next change. Quiesce waits.
//
// A Get of the store that starts after the call of Publish must return the value or a later value.
// Then invariant 8 holds. Publish may run between a Begin and an End of the same ID.
func (f *Fence[V]) Publish(id ID, value func() *V, cause error) {
	s := f.shard(id)
	s.mu.Lock()
	f.invalidateLocked(s, id, true, true)
	bindings := s.startNotifyLocked(id)
	s.mu.Unlock()
	if len(bindings) == 0 {
		return
	}
	var v *V
	if value != nil {
		v = value()
	}
	f.afterwards(s.end(id, bindings, func(b *Binding[V]) bool {
		if v == nil {
			b.Cut(cause)
			return true
		}
		return b.Changed(v)
	}))
}

// Flush evicts every value, prevents the install of the values that were read before, and ends
// every binding, because a process that has missed changes does not know what its values are worth.
//
// A binding that is registered after Flush has reached its shard has a value that was read after
// Flush: see invariant 9.
func (f *Fence[V]) Flush(cause error) {
	f.endAll(cause, func(s *shard[V]) {
		s.gen++
		s.notifications++
		f.clearLocked(s)
	})
}

// EndAll ends every binding that is registered when EndAll reaches the shard of the binding. The
// cached values stay.
func (f *Fence[V]) EndAll(cause error) { f.endAll(cause, func(*shard[V]) {}) }

// endAll calls before under the lock of each shard, and ends every binding of the shard.
func (f *Fence[V]) endAll(cause error, before func(*shard[V])) {
	var ended []*Binding[V]
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock()
		before(s)
		ids := slices.Collect(maps.Keys(s.bound))
		bindings := make([][]*Binding[V], len(ids))
		for j, id := range ids {
			bindings[j] = s.startNotifyLocked(id)
		}
		s.mu.Unlock()
		for j, id := range ids {
			cut := func(b *Binding[V]) bool { b.Cut(cause); return true }
			ended = append(ended, s.end(id, bindings[j], cut)...)
		}
	}
	f.afterwards(ended)
}

// EndOne ends one binding, on behalf of no change, and calls Ended and AfterEnd. Ended may be
// called in a goroutine that no call waits for, so Quiesce waits for EndOne up to the end of Ended.
// After Quiesce, EndOne does nothing.
func (f *Fence[V]) EndOne(id ID, b *Binding[V], cause error) {
	if !f.reports.begin() {
		return // Close has ended the binding
	}
	defer b.AfterEnd() // even if Ended ends this goroutine
	defer f.reports.end()
	b.Cut(cause)
	f.Release(id, b)
	callEnded([]*Binding[V]{b})
}

// afterwards calls Ended and AfterEnd of the bindings in the background.
func (f *Fence[V]) afterwards(ended []*Binding[V]) {
	if len(ended) == 0 || !f.reports.begin() {
		return
	}
	go func() {
		defer runAfterEnd(ended) // even if an Ended ends this goroutine
		defer f.reports.end()
		callEnded(ended)
	}()
}

// clearLocked evicts every value of a shard.
func (f *Fence[V]) clearLocked(s *shard[V]) {
	for _, v := range s.ring {
		f.table.removeLocked(f.table.node(v).ID)
	}
	f.counts.cached.Add(-int64(len(s.ring)))
	clear(s.ring)
	s.ring, s.hand = s.ring[:0], 0
}

// Notify calls every binding of id with a value that another writer has committed but may not have
// published with End yet.
func (f *Fence[V]) Notify(id ID, v *V) {
	s := f.shard(id)
	s.mu.Lock()
	bindings := s.startNotifyLocked(id)
	s.mu.Unlock()
	s.notify(id, bindings, func(b *Binding[V]) bool { return b.Changed(v) })
}

// NotifyUnlessEnded is Notify for a caller that reads many values. If no writer of id is between
// Begin and End, and id has no binding, every binding has received the value, and NotifyUnlessEnded
// does not call value. A Notify of each value would make each Bind of the shard start again.
func (f *Fence[V]) NotifyUnlessEnded(id ID, value func() *V) {
	s := f.shard(id)
	s.mu.Lock()
	// While End notifies a binding, the binding stays registered: see invariant 4.
	if s.pending[id] == 0 && len(s.bound[id]) == 0 {
		s.mu.Unlock()
		return
	}
	bindings := s.startNotifyLocked(id)
	s.mu.Unlock()
	v := value()
	s.notify(id, bindings, func(b *Binding[V]) bool { return b.Changed(v) })
}

// Cut ends every binding of id and evicts id, whatever the store contains. Cut makes a revocation
// with an unknown outcome fail closed.
func (f *Fence[V]) Cut(id ID, cause error) {
	s := f.shard(id)
	s.mu.Lock()
	f.invalidateLocked(s, id, true, true)
	bindings := s.startNotifyLocked(id)
	s.mu.Unlock()
	s.notify(id, bindings, func(b *Binding[V]) bool { b.Cut(cause); return true })
}

// Close ends every binding. After Close, no binding can be registered. Close does not wait for the
// calls of Ended that Publish, Flush, EndAll and EndOne have begun: see Quiesce.
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

// Stats reads all shards at one moment, and the hits just before. Every hit that returned before
// the call is counted.
func (f *Fence[V]) Stats() Stats {
	st := Stats{Hits: f.counts.hits.Sum()}
	for i := range f.shards {
		s := &f.shards[i]
		s.mu.Lock() // no deadlock: no other function holds two of these locks
		defer s.mu.Unlock()
		st.Misses += s.misses
		st.Evicted += s.evicted
		st.Cached += len(s.ring)
		for _, set := range s.bound {
			st.Bound += len(set)
		}
	}
	return st
}

// Bound returns the IDs that have an admitted binding. Bound reads one shard after the other.
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

// BoundTo returns the number of admitted bindings of id.
func (f *Fence[V]) BoundTo(id ID) (n int) {
	s := f.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	for b := range s.bound[id] {
		if b.Admitted.Load() {
			n++
		}
	}
	return n
}

func (s *shard[V]) isBoundLocked(id ID) bool {
	for b := range s.bound[id] {
		if b.Admitted.Load() {
			return true
		}
	}
	return false
}

func (f *Fence[V]) invalidateLocked(s *shard[V], id ID, evict, bump bool) {
	if bump {
		s.gen++
	}
	if evict && f.caches() {
		f.removeLocked(s, id)
	}
}

// startNotifyLocked counts a notification and returns the bindings of id. The bindings stay
// registered until the caller has notified them with notify.
func (s *shard[V]) startNotifyLocked(id ID) []*Binding[V] {
	s.notifications++
	set := s.bound[id]
	if len(set) == 0 {
		return nil
	}
	return slices.AppendSeq(make([]*Binding[V], 0, len(set)), maps.Keys(set))
}

// notify calls each of the bindings, releases those that ended, and runs the Ended and AfterEnd
// callbacks of the ended bindings. The caller must not hold the lock.
func (s *shard[V]) notify(id ID, bindings []*Binding[V], call func(*Binding[V]) (ended bool)) {
	ended := s.end(id, bindings, call)
	if len(ended) == 0 {
		return
	}
	callEnded(ended)
	go runAfterEnd(ended)
}

// end calls each of the bindings, and releases and returns those that ended. The caller must not
// hold the lock.
func (s *shard[V]) end(
	id ID, bindings []*Binding[V], call func(*Binding[V]) (ended bool),
) (ended []*Binding[V]) {
	ended = bindings[:0]
	for _, b := range bindings {
		if call(b) {
			ended = append(ended, b)
		}
	}
	if len(ended) > 0 {
		s.mu.Lock()
		s.releaseLocked(id, ended...)
		s.mu.Unlock()
	}
	return ended
}

func callEnded[V any](ended []*Binding[V]) {
	for _, b := range ended {
		if b.Ended != nil {
			b.Ended()
		}
	}
}
