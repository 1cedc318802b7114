package fence

import (
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

// id returns an ID. The shard, bucket, tag and slot of the ID depend on n.
func id(n byte) ID { return ID{0: 1, 9: n, 10: n, 15: n} }

// A value is what these tests cache: a number.
type value struct {
	Node
	n int64
}

func val(of byte, n int64) *value { return &value{Node: Node{ID: id(of)}, n: n} }

// just returns a function that returns v, for Publish.
func just(v *value) func() *value { return func() *value { return v } }

func newFence(size int) *Fence[value] {
	return New(size, func(v *value) *Node { return &v.Node })
}

// load runs steps 1 to 3 of a reader. Step 2 reads n from the store.
func load(f *Fence[value], of byte, n int64) {
	_, ticket := f.Get(id(of), nil)
	f.Put(id(of), val(of, n), ticket, nil)
}

func cached(f *Fence[value], of byte) bool {
	v, _ := f.Get(id(of), nil)
	return v != nil
}

// peek returns the cached value, and does not touch it.
func peek(f *Fence[value], of byte) *value {
	_, v := f.table.findLocked(id(of))
	return v
}

// bind runs steps 1 to 3 of a reader that registers b.
func bind(t *testing.T, f *Fence[value], of byte, b *Binding[value]) {
	t.Helper()
	if v, ticket := f.Get(id(of), b); v == nil {
		require.True(t, f.Put(id(of), val(of, 1), ticket, b))
	}
}

func TestHitMissAndEviction(t *testing.T) {
	f := newFence(3)
	v, ticket := f.Get(id(1), nil)
	require.Nil(t, v)
	require.True(t, f.Put(id(1), val(1, 1), ticket, nil))
	v, _ = f.Get(id(1), nil)
	require.EqualValues(t, 1, v.n)

	load(f, 2, 2)
	load(f, 3, 3)
	load(f, 4, 4)
	require.Equal(t, Stats{Hits: 1, Misses: 4, Evicted: 1, Cached: 3}, f.Stats())
	require.False(t, cached(f, 2), "the oldest untouched value was evicted")
	require.True(t, cached(f, 1), "a hit gives a second chance")

	load(f, 5, 5)
	require.False(t, cached(f, 3))
	load(f, 6, 6)
	require.False(t, cached(f, 4))
	load(f, 7, 7)
	require.True(t, cached(f, 1), "another hit gives another second chance")
	load(f, 8, 8)
	load(f, 9, 9)
	load(f, 10, 10)
	load(f, 11, 11)
	load(f, 12, 12)
	require.False(t, cached(f, 1), "one hit gives one second chance")
}

// BoundTo counts the admitted bindings of one ID, and does not allocate.
func TestBoundTo(t *testing.T) {
	f := newFence(3)
	load(f, 1, 1)
	load(f, 2, 1)
	require.Zero(t, f.BoundTo(id(1)))
	var all [3]Binding[value]
	for i := range all {
		bind(t, f, 1, &all[i])
	}
	require.Zero(t, f.BoundTo(id(1)), "not yet admitted")
	all[0].Admitted.Store(true)
	all[2].Admitted.Store(true)
	require.Equal(t, 2, f.BoundTo(id(1)))
	require.Zero(t, f.BoundTo(id(2)))
	require.Zero(t, testing.AllocsPerRun(100, func() { f.BoundTo(id(1)) }))
	f.Release(id(1), &all[0])
	require.Equal(t, 1, f.BoundTo(id(1)))
}

// A hit that registers a binding counts as a use, although Get takes the lock first.
func TestHitThatBindsCountsAsUse(t *testing.T) {
	f := newFence(3)
	for n := byte(1); n <= 3; n++ {
		load(f, n, 1)
	}
	bind(t, f, 1, new(Binding[value]))
	load(f, 4, 1)
	require.True(t, cached(f, 1))
	require.False(t, cached(f, 2), "now the oldest value")
}

// An eviction gives at most maxSecondChances second chances, even if every value is touched.
func TestEvictionIsBounded(t *testing.T) {
	const size = maxSecondChances + 20
	f := newFence(size)
	for n := byte(1); n <= size; n++ {
		load(f, n, 1)
		require.True(t, cached(f, n))
	}
	load(f, size+1, 1)
	for n := byte(1); n <= size+1; n++ {
		require.Equal(t, n != maxSecondChances+1, peek(f, n) != nil, "%d", n)
	}
}

// A Bind does not wait for a commit of another key of the shard, neither while the commit is under
// way nor after the commit changed nothing.
func TestBindDoesNotWaitForOtherKeys(t *testing.T) {
	f := newFence(8)
	require.Same(t, f.shard(id(1)), f.shard(id(2)))
	b := new(Binding[value])
	_, ticket := f.Get(id(1), b)
	f.Begin(id(2))
	require.True(t, f.Put(id(1), val(1, 1), ticket, b))
	_, ticket = f.Get(id(1), b)
	f.End(id(2), nil)
	require.True(t, f.Put(id(1), val(1, 1), ticket, b))
	require.False(t, cached(f, 1), "the value is not installed")
}

// A small cache has one shard. A large cache, or no cache, has many shards, and the IDs are spread
// over the shards.
func TestShards(t *testing.T) {
	for size, want := range map[int]int{
		-1: maxShards, 0: maxShards, 1: 1, 2*minPerShard - 1: 1, 2 * minPerShard: 2,
		maxShards * minPerShard: maxShards, 1 << 20: maxShards,
	} {
		require.Len(t, newFence(size).shards, want, "%d", size)
	}
	f := newFence(maxShards * minPerShard)
	b := func() *Binding[value] { return &Binding[value]{Cut: func(error) {}, AfterEnd: func() {}} }
	for n := range byte(maxShards) {
		bind(t, f, n, b())
		bind(t, f, n, b())
		require.Len(t, f.shard(id(n)).bound, 1, "each ID has another shard")
	}
	want := Stats{Hits: maxShards, Misses: maxShards, Cached: maxShards, Bound: 2 * maxShards}
	require.Equal(t, want, f.Stats())
	f.Close(nil)
}

func TestNoCache(t *testing.T) {
	for _, size := range []int{0, -1} {
		f := newFence(size)
		_, ticket := f.Get(id(1), nil)
		require.True(t, f.Put(id(1), val(1, 1), ticket, nil))
		v, _ := f.Get(id(1), nil)
		require.Nil(t, v)
		f.Begin(id(1))
		f.End(id(1), nil)
		f.Cut(id(1), errors.New("cut"))
	}
}

// If the outcome of a change is unknown, Begin has no End, and the ID is never cached again.
func TestUnknownOutcomeIsNotCached(t *testing.T) {
	f := newFence(8)
	f.Begin(id(1))
	f.Begin(id(1))
	f.End(id(1), nil)
	_, ticket := f.Get(id(1), nil)
	f.Put(id(1), val(1, 1), ticket, nil)
	v, _ := f.Get(id(1), nil)
	require.Nil(t, v)

	_, ticket = f.Get(id(2), nil)
	f.Put(id(2), val(2, 2), ticket, nil)
	v, _ = f.Get(id(2), nil)
	require.EqualValues(t, 2, v.n, "other IDs of the shard are cached")
}

func TestBindings(t *testing.T) {
	f := newFence(8)
	cause := errors.New("cause")
	var values []int64
	var cut []error
	binding := func() *Binding[value] {
		return &Binding[value]{
			Changed:  func(v *value) bool { values = append(values, v.n); return false },
			Cut:      func(err error) { cut = append(cut, err) },
			AfterEnd: func() {},
		}
	}

	onMiss, onHit, released, other := binding(), binding(), binding(), binding()
	_, ticket := f.Get(id(1), onMiss)
	require.Zero(t, f.Stats().Bound, "a miss registers nothing")
	require.True(t, f.Put(id(1), val(1, 1), ticket, onMiss))
	v, _ := f.Get(id(1), onHit)
	require.NotNil(t, v)
	f.Get(id(1), released)
	_, ticket = f.Get(id(2), other)
	require.True(t, f.Put(id(2), val(2, 2), ticket, other))
	require.Equal(t, 4, f.Stats().Bound)

	f.Release(id(1), released)
	f.Release(id(1), released)
	f.Begin(id(1))
	f.End(id(1), nil)
	require.Empty(t, values, "End with nil notifies no binding")
	f.Begin(id(1))
	f.End(id(1), val(1, 5))
	require.Equal(t, []int64{5, 5}, values)
	f.Notify(id(1), val(1, 6))
	require.Equal(t, []int64{5, 5, 6, 6}, values)
	f.Cut(id(1), cause)
	require.Equal(t, []error{cause, cause}, cut)
	require.Equal(t, 1, f.Stats().Bound, "bindings that have ended are released")

	f.Close(cause)
	require.Equal(t, []error{cause, cause, cause}, cut)
	_, ticket = f.Get(id(2), other)
	require.False(t, f.Put(id(2), val(2, 2), ticket, other), "no binding is registered after Close")
	f.Release(id(1), onMiss)
	f.Release(id(1), onHit)
	f.Release(id(2), other)
	require.Zero(t, f.Stats().Bound)
}

// A Bind that races with Close fails, even if the value is cached, because no call would end the
// binding any more.
func TestNothingIsBoundAfterClose(t *testing.T) {
	f := newFence(8)
	load(f, 1, 1)
	f.Close(nil)
	require.True(t, cached(f, 1), "Get without a binding still works")
	b := new(Binding[value])
	v, ticket := f.Get(id(1), b)
	require.Nil(t, v)
	require.False(t, f.Put(id(1), val(1, 1), ticket, b))
	require.Zero(t, f.Stats().Bound)
	require.True(t, f.Put(id(1), val(1, 1), ticket, nil))
}

// A value ends exactly the bindings whose Changed returns true. The other bindings stay registered
// and receive the next value.
func TestNewValueEndsSomeBindings(t *testing.T) {
	f := newFence(8)
	ends := make(map[int]int)
	var followed sync.WaitGroup
	for n := range 9 {
		bind(t, f, 1, &Binding[value]{
			Changed:  func(v *value) bool { return int64(n%3) < v.n },
			Ended:    func() { ends[n]++ },
			AfterEnd: followed.Done,
		})
	}
	for round := 1; round <= 3; round++ {
		followed.Add(3)
		f.Begin(id(1))
		f.End(id(1), val(1, int64(round)))
		require.Equal(t, 9-3*round, f.Stats().Bound)
		require.Len(t, ends, 3*round)
		for n := range ends {
			require.Less(t, n%3, round)
			require.Equal(t, 1, ends[n])
		}
	}
	followed.Wait()
}

// Close ends every binding of every ID in every shard.
func TestCloseEndsAll(t *testing.T) {
	const ids, each = 50, 3
	for name, size := range map[string]int{
		"one shard": 8, "many shards": maxShards * minPerShard, "no cache": 0,
	} {
		t.Run(name, func(t *testing.T) {
			f := newFence(size)
			cause := errors.New("cause")
			var causes []error
			for n := range byte(ids) {
				for range each {
					bind(t, f, n, &Binding[value]{
						Cut:      func(err error) { causes = append(causes, err) },
						AfterEnd: func() {},
					})
				}
			}
			require.Equal(t, ids*each, f.Stats().Bound)
			f.Close(cause)
			require.Len(t, causes, ids*each)
			require.Same(t, cause, causes[0])
			require.Zero(t, f.Stats().Bound)
			for i := range f.shards {
				require.Empty(t, f.shards[i].bound)
			}
		})
	}
}

// After Cut, no reader finds the old value. A reader that read the old value before Cut does not
// install the value.
func TestCutEvicts(t *testing.T) {
	f := newFence(8)
	load(f, 1, oldValue)
	f.Cut(id(1), nil)
	require.False(t, cached(f, 1))
	require.Zero(t, f.Stats().Cached)
	f = newFence(8)
	_, ticket := f.Get(id(1), nil)
	f.Cut(id(1), nil)
	f.Put(id(1), val(1, oldValue), ticket, nil)
	require.False(t, cached(f, 1), "the value may be old")
	load(f, 1, newValue)
	require.True(t, cached(f, 1), "the value was read after Cut")
}

// Two readers miss at the same moment, and each installs a value. The second value replaces the
// first and counts once, so the cache still holds as many other values.
func TestValueInstalledTwiceCountsOnce(t *testing.T) {
	const size = 3
	f := newFence(size)
	for range 10 {
		_, first := f.Get(id(1), nil)
		_, second := f.Get(id(2), nil)
		f.Put(id(1), val(1, 1), first, nil)
		f.Put(id(2), val(2, 1), second, nil)
		f.Put(id(2), val(2, 2), second, nil)
		f.Put(id(1), val(1, 2), first, nil)
		v, _ := f.Get(id(1), nil)
		require.EqualValues(t, 2, v.n)
	}
	load(f, 3, 3)
	require.Equal(t, size, f.Stats().Cached)
	for n := byte(1); n <= size; n++ {
		require.True(t, cached(f, n), "%d", n)
	}
	load(f, 4, 4)
	require.Equal(t, size, f.Stats().Cached)
	require.EqualValues(t, size, f.counts.cached.Load())
}

// The maps of a shard have no entries for IDs without bindings and without pending changes.
func TestUnusedIDsTakeNoMemory(t *testing.T) {
	f := newFence(8)
	s := f.shard(id(1))
	binding := func(ends bool) *Binding[value] {
		return &Binding[value]{
			Changed:  func(*value) bool { return ends },
			Cut:      func(error) {},
			AfterEnd: func() {},
		}
	}
	for name, remove := range map[string]func(b *Binding[value]){
		"Release": func(b *Binding[value]) { f.Release(id(1), b) },
		"Cut":     func(*Binding[value]) { f.Cut(id(1), nil) },
		"Notify":  func(*Binding[value]) { f.Notify(id(1), val(1, 2)) },
		"End":     func(*Binding[value]) { f.Begin(id(1)); f.End(id(1), val(1, 2)) },
	} {
		b := binding(true)
		bind(t, f, 1, b)
		require.Len(t, s.bound, 1)
		remove(b)
		require.Empty(t, s.bound, name)
		require.Empty(t, s.pending, name)
	}
	first, second := binding(false), binding(false)
	bind(t, f, 1, first)
	bind(t, f, 1, second)
	require.Len(t, s.bound[id(1)], 2)
	f.Begin(id(1))
	f.Begin(id(1))
	f.End(id(1), nil)
	require.Equal(t, map[ID]int{id(1): 1}, s.pending)
	f.End(id(1), val(1, 2))
	require.Empty(t, s.pending)
	f.Release(id(1), first)
	require.Len(t, s.bound, 1, "the other binding is still registered")
	f.Release(id(1), second)
	require.Empty(t, s.bound)
	f.Release(id(1), second)
	require.Empty(t, s.bound)
}

// The tests below run every interleaving of the steps in the comment of Fence against the real
// code. The commit is a step like the others. So the tests cover a reader that is stopped anywhere,
// for example between the store read and the install while a change commits. The tests need no
// goroutine and no sleep.

// A world is one run: a fence, the store that the fence caches, and what the participants saw.
type world struct {
	fence *Fence[value]
	store int64 // the committed value: oldValue, then newValue
	now   int   // counts steps
	reads []read
	bound bool // a binding was admitted with the old value
	ended bool // that binding was ended by the new value
	done  int  // the step at which the first revocation returned, or never
}

type read struct {
	start, end int
	value      int64
}

const (
	oldValue = 1
	newValue = 2
	never    = math.MaxInt
)

// reader is a Verify, as three steps.
func reader(w *world) []func() {
	var (
		r      read
		ticket Ticket
		v      *value
		hit    bool
	)
	return []func(){
		func() {
			r.start = w.now
			if v, ticket = w.fence.Get(id(1), nil); v != nil {
				hit = true
				w.reads = append(w.reads, read{r.start, w.now, v.n})
			}
		},
		func() {
			if !hit {
				v = val(1, w.store)
			}
		},
		func() {
			if !hit {
				w.fence.Put(id(1), v, ticket, nil)
				w.reads = append(w.reads, read{r.start, w.now, v.n})
			}
		},
	}
}

// prober is a Verify that runs as one step and installs nothing.
func prober(w *world) []func() {
	return []func(){func() {
		if v, _ := w.fence.Get(id(1), nil); v != nil {
			w.reads = append(w.reads, read{w.now, w.now, v.n})
		} else {
			w.reads = append(w.reads, read{w.now, w.now, w.store})
		}
	}}
}

// binder is a Bind, as three steps. The new value ends the binding.
func binder(w *world) []func() {
	b := &Binding[value]{
		Changed:  func(v *value) bool { w.ended = v.n == newValue; return w.ended },
		Cut:      func(error) { w.ended = true },
		AfterEnd: func() {},
	}
	var (
		ticket Ticket
		v      *value
		hit    bool
	)
	return []func(){
		func() {
			if v, ticket = w.fence.Get(id(1), b); v != nil {
				hit = true
				if w.bound = v.n == oldValue; !w.bound {
					w.fence.Release(id(1), b)
				}
			}
		},
		func() {
			if !hit {
				v = val(1, w.store)
			}
		},
		func() {
			if !hit && v.n == oldValue {
				w.bound = w.fence.Put(id(1), v, ticket, b)
			}
		},
	}
}

// writer is a Revoke, as three phases.
func writer(w *world) []func() {
	return []func(){
		func() { w.fence.Begin(id(1)) },
		func() { w.store = newValue },
		func() { w.fence.End(id(1), val(1, newValue)); w.done = min(w.done, w.now) },
	}
}

// remote returns a change by another process: the commit, and then a verb of the fence.
func remote(verb func(*Fence[value])) func(*world) []func() {
	return func(w *world) []func() {
		return []func(){
			func() { w.store = newValue },
			func() { verb(w.fence); w.done = min(w.done, w.now) },
		}
	}
}

// check returns what is wrong with a finished run, or an empty string. With one write of one value,
// a history is linearizable if and only if every reader that starts after the write has returned,
// or after another reader has returned the new value, returns the new value.
func (w *world) check() string {
	for _, y := range w.reads {
		if y.value != oldValue {
			continue
		}
		if y.start > w.done {
			return "old value seen after the change had returned"
		}
		for _, x := range w.reads {
			if x.value == newValue && x.end < y.start {
				return "old value seen after the new value"
			}
		}
	}
	if v, _ := w.fence.Get(id(1), nil); v != nil && v.n == oldValue {
		return "old value left in the cache"
	}
	if w.bound && !w.ended && w.done != never {
		return "binding still alive after the change"
	}
	return ""
}

// explore runs every interleaving of the participants and counts the runs by what was wrong.
func explore(
	variant Variant, warm bool, participants ...func(*world) []func(),
) (runs int, wrong map[string]int) {
	wrong = make(map[string]int)
	left := make([]int, len(participants))
	probe := &world{fence: newFence(4)}
	total := 0
	for i, p := range participants {
		left[i] = len(p(probe))
		total += left[i]
	}
	schedule := make([]int, 0, total)
	var walk func()
	walk = func() {
		if len(schedule) == total {
			runs++
			if what := run(variant, warm, participants, schedule); what != "" {
				wrong[what]++
			}
			return
		}
		for i := range left {
			if left[i] > 0 {
				left[i]--
				schedule = append(schedule, i)
				walk()
				schedule = schedule[:len(schedule)-1]
				left[i]++
			}
		}
	}
	walk()
	return runs, wrong
}

// run runs one interleaving and returns what was wrong.
func run(
	variant Variant, warm bool, participants []func(*world) []func(), schedule []int,
) string {
	w := &world{fence: newFence(4), store: oldValue, done: never}
	w.fence.Break(variant)
	if warm {
		_, ticket := w.fence.Get(id(1), nil)
		w.fence.Put(id(1), val(1, oldValue), ticket, nil)
	}
	steps := make([][]func(), len(participants))
	for i, p := range participants {
		steps[i] = p(w)
	}
	for _, i := range schedule {
		w.now++
		steps[i][0]()
		steps[i] = steps[i][1:]
	}
	return w.check()
}

func TestEveryInterleaving(t *testing.T) {
	const schedules = 16800 // 10! / (3! 3! 1! 3!)
	casts := [][]func(*world) []func(){
		{reader, reader, prober, writer},
		{binder, reader, prober, writer},
	}
	variants := []struct {
		name    string
		variant Variant
		right   bool
	}{
		{"two-phase", TwoPhase, true},
		{"look-aside", LookAside, false},
		{"bump before only", BumpBefore, false},
		{"bump after only", BumpAfter, false},
		{"evicted after only", EvictLate, false},
		{"never evicted", EvictNever, false},
		{"installs what may be old", Careless, false},
		// Evicting in phase C is redundant: from phase A on, blockInstalls keeps the value of the
		// ID out of the cache.
		{"evicted before only", TwoPhase &^ evictAfter, true},
	}
	for _, tt := range variants {
		t.Run(tt.name, func(t *testing.T) {
			violations := 0
			for _, warm := range []bool{false, true} {
				for _, cast := range casts {
					runs, wrong := explore(tt.variant, warm, cast...)
					require.Equal(t, schedules, runs)
					t.Logf("warm %v: %d runs, wrong: %v", warm, runs, wrong)
					for _, n := range wrong {
						violations += n
					}
				}
			}
			require.Equal(t, tt.right, violations == 0)
		})
	}
	figures.Record(t,
		"%d interleavings, cold and warm, for each of %d casts and %d sets of steps: "+
			"right steps are never wrong, and wrong steps are caught", schedules, len(casts),
		len(variants))
}

// After Publish or Flush has returned, no reader and no binding has the old value. Before, a reader
// may see the old value after another reader has seen the new value.
func TestEveryInterleavingWithAnotherProcess(t *testing.T) {
	for name, tt := range map[string]struct {
		verb  func(*Fence[value])
		right bool
	}{
		"Publish": {func(f *Fence[value]) { f.Publish(id(1), just(val(1, newValue)), nil) }, true},
		"Publish of nothing": {
			func(f *Fence[value]) { f.Publish(id(1), nil, errors.New("cause")) }, true,
		},
		"Flush": {func(f *Fence[value]) { f.Flush(errors.New("cause")) }, true},
		"only the bindings are notified": {
			func(f *Fence[value]) { f.Notify(id(1), val(1, newValue)) }, false,
		},
		"only the bindings are ended": {
			func(f *Fence[value]) { f.EndAll(errors.New("cause")) }, false,
		},
	} {
		t.Run(name, func(t *testing.T) {
			violations := 0
			for _, warm := range []bool{false, true} {
				for _, first := range []func(*world) []func(){reader, binder} {
					_, wrong := explore(TwoPhase, warm, first, reader, prober, remote(tt.verb))
					delete(wrong, "old value seen after the new value")
					t.Logf("warm %v, wrong: %v", warm, wrong)
					for _, n := range wrong {
						violations += n
					}
				}
			}
			require.Equal(t, tt.right, violations == 0)
		})
	}
}

// If an ID has no binding, Publish evicts the ID without a look at the new value. Otherwise Publish
// looks once, and all bindings receive the same value.
func TestPublishLooksAtTheValueForBindingsOnly(t *testing.T) {
	f := newFence(4)
	load(f, 1, 1)
	looks := 0
	next := val(1, 2)
	look := func() *value {
		require.True(t, f.shard(id(1)).mu.TryLock(), "the shard is not locked")
		f.shard(id(1)).mu.Unlock()
		looks++
		return next
	}
	f.Publish(id(1), look, nil)
	require.False(t, cached(f, 1))
	require.Zero(t, looks)

	var received []*value
	for range 2 {
		bind(t, f, 1, &Binding[value]{
			Changed:  func(v *value) bool { received = append(received, v); return true },
			AfterEnd: func() {},
		})
	}
	f.Publish(id(1), look, nil)
	require.Equal(t, 1, looks)
	require.Equal(t, []*value{next, next}, received)

	cause := errors.New("cause")
	var cut error
	bind(t, f, 1, &Binding[value]{
		Cut:      func(err error) { cut = err },
		AfterEnd: func() {},
	})
	f.Publish(id(1), func() *value { return nil }, cause)
	require.Equal(t, cause, cut, "a value that cannot be read ends the bindings")
}

// Publish and Begin with End may overlap, in any order.
func TestPublishBesideAnOwnChange(t *testing.T) {
	f := newFence(4)
	load(f, 1, 1)
	f.Begin(id(1))
	f.Publish(id(1), just(val(1, 2)), nil)
	load(f, 1, 2)
	require.False(t, cached(f, 1), "a change is pending")
	f.End(id(1), val(1, 2))
	load(f, 1, 2)
	require.True(t, cached(f, 1))
	f.Publish(id(1), just(val(1, 2)), nil)
	require.False(t, cached(f, 1))
}

// Publish, Flush and EndAll do not wait for Ended.
func TestEndedInTheBackground(t *testing.T) {
	for _, verb := range []func(*Fence[value]){
		func(f *Fence[value]) { f.Publish(id(1), just(val(1, 2)), nil) },
		func(f *Fence[value]) { f.Publish(id(1), nil, nil) },
		func(f *Fence[value]) { f.Flush(nil) },
		func(f *Fence[value]) { f.EndAll(nil) },
	} {
		f := newFence(4)
		proceed, done := make(chan struct{}), make(chan struct{})
		marked := false
		bind(t, f, 1, &Binding[value]{
			Changed:  func(*value) bool { marked = true; return true },
			Cut:      func(error) { marked = true },
			Ended:    func() { <-proceed },
			AfterEnd: func() { close(done) },
		})
		verb(f)
		require.True(t, marked)
		require.Zero(t, f.Stats().Bound)
		close(proceed)
		<-done
	}
}

// Flush empties every shard, and a fence works as a new fence afterwards. EndAll keeps the values.
func TestFlushAndEndAll(t *testing.T) {
	const most = 1 << 12
	f := newFence(most)
	fill := func() {
		for n := range most {
			v := &value{Node: Node{ID: ID{8: byte(n >> 8), 14: byte(n >> 8), 15: byte(n)}}}
			_, ticket := f.Get(v.ID, nil)
			f.Put(v.ID, v, ticket, nil)
		}
	}
	fill()
	ended := 0
	b := &Binding[value]{Cut: func(error) { ended++ }, AfterEnd: func() {}}
	bind(t, f, 1, b)
	cachedValues := f.Stats().Cached
	require.NotZero(t, cachedValues)
	f.EndAll(errors.New("cause"))
	require.Equal(t, 1, ended)
	require.Zero(t, f.Stats().Bound)
	require.Equal(t, cachedValues, f.Stats().Cached)

	bind(t, f, 1, b)
	f.Flush(errors.New("cause"))
	require.Equal(t, 2, ended)
	require.Zero(t, f.Stats().Bound)
	require.Zero(t, f.Stats().Cached)
	for n := range most {
		v, _ := f.Get(ID{8: byte(n >> 8), 14: byte(n >> 8), 15: byte(n)}, nil)
		require.Nil(t, v)
	}
	fill()
	require.Equal(t, cachedValues, f.Stats().Cached)

	noCache := newFence(0)
	noCache.Flush(nil)
	noCache.EndAll(nil)
}

// A second writer finds that a first writer has committed the change, and has perhaps not come to
// phase C. The second writer has nothing to commit. The second writer must not return before the
// bindings were notified, so the second writer calls Notify or NotifyUnlessEnded. No other step is
// needed.
func TestNotifyCatchesABindThatReadBeforeTheCommit(t *testing.T) {
	stopped := func(w *world) []func() {
		return []func(){
			func() { w.fence.Begin(id(1)) },
			func() { w.store = newValue },
		}
	}
	ends := func(w *world) []func() {
		return append(stopped(w), func() { w.fence.End(id(1), val(1, newValue)) })
	}
	for name, notify := range map[string]func(f *Fence[value]){
		"Notify":            func(f *Fence[value]) { f.Notify(id(1), val(1, newValue)) },
		"NotifyUnlessEnded": func(f *Fence[value]) { f.NotifyUnlessEnded(id(1), just(val(1, newValue))) },
	} {
		second := func(w *world) []func() {
			return []func(){func() {
				if w.store == newValue {
					notify(w.fence)
					w.done = w.now
				}
			}}
		}
		for _, warm := range []bool{false, true} {
			runs, wrong := explore(TwoPhase, warm, binder, reader, stopped, second)
			require.Equal(t, 5040, runs) // 9! / (3! 3! 2! 1!)
			require.Empty(t, wrong, name)
			runs, wrong = explore(TwoPhase, warm, binder, reader, ends, second)
			require.Equal(t, 16800, runs) // 10! / (3! 3! 3! 1!)
			require.Empty(t, wrong, name)
		}
	}
}

// The End of the first writer has begun to notify a binding, and has not come to its end.
func TestNotifyUnlessEndedNotifiesBesideAnEnd(t *testing.T) {
	f := newFence(4)
	load(f, 1, oldValue)
	notifying, goOn := make(chan struct{}), make(chan struct{})
	var calls atomic.Int32
	bind(t, f, 1, &Binding[value]{
		Changed: func(*value) bool {
			if calls.Add(1) == 1 {
				close(notifying)
				<-goOn
			}
			return true
		},
		AfterEnd: func() {},
	})
	f.Begin(id(1))
	var end sync.WaitGroup
	end.Go(func() { f.End(id(1), val(1, newValue)) })
	<-notifying
	f.NotifyUnlessEnded(id(1), just(val(1, newValue)))
	require.EqualValues(t, 2, calls.Load())
	close(goOn)
	end.Wait()
}

// A call that reads many IDs makes neither the values nor the Binds of other IDs start again.
func TestNotifyUnlessEndedDoesNothingForAnIDThatNoCallUses(t *testing.T) {
	f := newFence(4)
	_, ticket := f.Get(id(1), nil)
	f.NotifyUnlessEnded(id(2), func() *value { panic("no binding wants the value") })
	require.True(t, f.Put(id(1), val(1, 1), ticket, new(Binding[value])))
}

// The same with goroutines, for the race detector: readers and binders against a writer.
func TestConcurrent(t *testing.T) {
	const rounds = 2000
	f := newFence(4)
	var committed, announced, liveBindings atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			var least int64 // the value of the latest read
			for {
				select {
				case <-stop:
					return
				default:
				}
				floor := announced.Load()
				// ended counts once: when a newer value ends the binding, or in leave.
				ended := sync.OnceFunc(func() { liveBindings.Add(-1) })
				b := &Binding[value]{
					Changed:  func(*value) bool { return true },
					Cut:      func(error) {},
					Ended:    ended,
					AfterEnd: func() {},
				}
				leave := func() {
					f.Release(id(1), b)
					ended()
				}
				v, ticket := f.Get(id(1), nil)
				if v == nil {
					v = val(1, committed.Load())
					f.Put(id(1), v, ticket, nil)
				}
				if v.n < max(floor, least) {
					t.Errorf("read %d after %d was announced and %d was read", v.n, floor, least)
					return
				}
				least = v.n
				v, ticket = f.Get(id(1), b)
				ok := v != nil
				if !ok {
					v = val(1, committed.Load())
					liveBindings.Add(1) // before the binding can end
					if ok = f.Put(id(1), v, ticket, b); !ok {
						leave()
					}
				} else {
					liveBindings.Add(1)
				}
				if liveBindings.Load() > 100 {
					leave()
				}
				if v.n < max(floor, least) {
					t.Errorf("bound with %d after %d was announced and %d was read", v.n, floor,
						least)
					return
				}
			}
		})
	}
	for n := int64(1); n <= rounds; n++ {
		f.Begin(id(1))
		committed.Store(n)
		f.End(id(1), val(1, n))
		announced.Store(n)
	}
	close(stop)
	wg.Wait()
	f.Close(errors.New("closed"))
	require.Zero(t, liveBindings.Load(), "every binding has ended")
	require.Zero(t, f.Stats().Bound)
}

// Bound and IsBound ignore bindings that are not admitted and bindings that were released.
func TestBoundIDs(t *testing.T) {
	f := newFence(8)
	binding := func() *Binding[value] {
		return &Binding[value]{
			Changed:  func(*value) bool { return true },
			Cut:      func(error) {},
			AfterEnd: func() {},
		}
	}
	load(f, 1, 1)
	load(f, 2, 2)
	refused, admitted, other := binding(), binding(), binding()
	f.Get(id(1), refused)
	f.Get(id(1), admitted)
	f.Get(id(2), other)
	require.False(t, f.IsBound(id(1)))
	require.Empty(t, f.Bound())
	admitted.Admitted.Store(true)
	other.Admitted.Store(true)
	require.True(t, f.IsBound(id(1)))
	require.False(t, f.IsBound(id(3)))
	require.ElementsMatch(t, []ID{id(1), id(2)}, f.Bound())
	f.Release(id(1), admitted)
	require.False(t, f.IsBound(id(1)))
	require.Equal(t, []ID{id(2)}, f.Bound())
	f.Begin(id(2))
	f.End(id(2), val(2, 3))
	require.Empty(t, f.Bound())
}
