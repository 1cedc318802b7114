package fence

import (
	"errors"
	"math"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// id returns an ID whose shard, bucket, tag and slot depend on n.
func id(n byte) ID { return ID{0: 1, 9: n, 10: n, 15: n} }

// A value is what is cached here: a number.
type value struct {
	Node
	n int64
}

func val(of byte, n int64) *value { return &value{Node: Node{ID: id(of)}, n: n} }

func newFence(size int) *Fence[value] {
	return New(size, func(v *value) *Node { return &v.Node })
}

// load is a reader from step 1 to 3.
func load(f *Fence[value], of byte, n int64) {
	_, ticket := f.Get(id(of), nil)
	f.Put(id(of), val(of, n), ticket, nil)
}

func cached(f *Fence[value], of byte) bool {
	v, _ := f.Get(id(of), nil)
	return v != nil
}

// bind is a reader from step 1 to 3 that registers b.
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
	require.Equal(t, Stats{Hits: 1, Misses: 4, Cached: 3}, f.Stats())
	require.False(t, cached(f, 2), "the oldest that had not been used made room")
	require.True(t, cached(f, 1), "a hit had kept it")

	load(f, 5, 5)
	require.False(t, cached(f, 3))
	load(f, 6, 6)
	require.False(t, cached(f, 4))
	load(f, 7, 7)
	require.True(t, cached(f, 1), "it was used again meanwhile")
	load(f, 8, 8)
	load(f, 9, 9)
	load(f, 10, 10)
	load(f, 11, 11)
	load(f, 12, 12)
	require.False(t, cached(f, 1), "one hit keeps it once")
}

// A hit that binds is a use too, although the front is not asked.
func TestHitThatBindsCountsAsUse(t *testing.T) {
	f := newFence(3)
	for n := byte(1); n <= 3; n++ {
		load(f, n, 1)
	}
	bind(t, f, 1, new(Binding[value]))
	load(f, 4, 1)
	require.True(t, cached(f, 1))
	require.False(t, cached(f, 2), "now the oldest")
}

// An eviction looks at so many values and no more, even if all have been used.
func TestEvictionIsBounded(t *testing.T) {
	const size = maxSecondChances + 20
	f := newFence(size)
	for n := byte(1); n <= size; n++ {
		load(f, n, 1)
		require.True(t, cached(f, n))
	}
	load(f, size+1, 1)
	for n := byte(1); n <= size+1; n++ {
		_, ok := f.shard(id(n)).lru.Peek(id(n))
		require.Equal(t, n != maxSecondChances+1, ok, "%d", n)
	}
}

// A commit of another key of the shard, which is under way, or turns out to have changed nothing, does not hold up a Bind.
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
	require.False(t, cached(f, 1), "but its value is not installed")
}

// Small caches are in one piece, large ones and no cache in many, of which each has its share of the IDs.
func TestShards(t *testing.T) {
	for size, want := range map[int]int{
		-1: maxShards, 0: maxShards, 1: 1, 2*minPerShard - 1: 1, 2 * minPerShard: 2, maxShards * minPerShard: maxShards, 1 << 20: maxShards,
	} {
		require.Len(t, newFence(size).shards, want, "%d", size)
	}
	f := newFence(maxShards * minPerShard)
	b := func() *Binding[value] { return &Binding[value]{Cut: func(error) {}, AfterEnd: func() {}} }
	for n := range byte(maxShards) {
		bind(t, f, n, b())
		bind(t, f, n, b())
		require.Len(t, f.shard(id(n)).bound, 1, "a shard of its own")
	}
	require.Equal(t, Stats{Hits: maxShards, Misses: maxShards, Cached: maxShards, Bound: 2 * maxShards}, f.Stats())
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

// An ID whose Begin has no End, because nobody knows what became of the change, is never cached again.
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
	require.EqualValues(t, 2, v.n, "its neighbours are not affected")
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
	require.Empty(t, values, "a change that was not made is not told")
	f.Begin(id(1))
	f.End(id(1), val(1, 5))
	require.Equal(t, []int64{5, 5}, values)
	f.Notify(id(1), val(1, 6))
	require.Equal(t, []int64{5, 5, 6, 6}, values)
	f.Cut(id(1), cause)
	require.Equal(t, []error{cause, cause}, cut)
	require.Equal(t, 1, f.Stats().Bound, "whoever has ended is released")

	f.Close(cause)
	require.Equal(t, []error{cause, cause, cause}, cut)
	_, ticket = f.Get(id(2), other)
	require.False(t, f.Put(id(2), val(2, 2), ticket, other), "nothing is bound after Close")
	f.Release(id(1), onMiss)
	f.Release(id(1), onHit)
	f.Release(id(2), other)
	require.Zero(t, f.Stats().Bound)
}

// A Bind that races Close finds the fence closed, also where the value is cached: nothing would end it any more.
func TestNothingIsBoundAfterClose(t *testing.T) {
	f := newFence(8)
	load(f, 1, 1)
	f.Close(nil)
	require.True(t, cached(f, 1), "what needs no binding goes on")
	b := new(Binding[value])
	v, ticket := f.Get(id(1), b)
	require.Nil(t, v)
	require.False(t, f.Put(id(1), val(1, 1), ticket, b))
	require.Zero(t, f.Stats().Bound)
	require.True(t, f.Put(id(1), val(1, 1), ticket, nil))
}

// A value ends the bindings that say so, and no others: those stay registered, and are told of the next.
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

// Close ends every binding, of however many IDs, and however many shards they are in.
func TestCloseEndsAll(t *testing.T) {
	const ids, each = 50, 3
	for name, size := range map[string]int{"one shard": 8, "many shards": maxShards * minPerShard, "no cache": 0} {
		t.Run(name, func(t *testing.T) {
			f := newFence(size)
			cause := errors.New("cause")
			var causes []error
			for n := range byte(ids) {
				for range each {
					b := &Binding[value]{Cut: func(err error) { causes = append(causes, err) }, AfterEnd: func() {}}
					bind(t, f, n, b)
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

// After a Cut, the value of before is not found, wherever it was, and not installed by a reader that has read it before.
func TestCutEvicts(t *testing.T) {
	for name, where := range map[string]func(f *Fence[value]){
		"in the front and the LRU": func(*Fence[value]) {},
		"in the LRU only":          func(f *Fence[value]) { f.front.clearLocked(id(1)) },
	} {
		f := newFence(8)
		load(f, 1, oldValue)
		where(f)
		f.Cut(id(1), nil)
		require.False(t, cached(f, 1), name)
		require.Zero(t, f.Stats().Cached, name)
	}
	f := newFence(8)
	_, ticket := f.Get(id(1), nil)
	f.Cut(id(1), nil)
	f.Put(id(1), val(1, oldValue), ticket, nil)
	require.False(t, cached(f, 1), "it may be old")
	load(f, 1, newValue)
	require.True(t, cached(f, 1), "read afterwards")
}

// Readers that miss at the same moment install one value each, and the last stays. It has one place, and counts once: the
// cache holds as many others as before.
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

// What comes and goes leaves no memory behind.
func TestUnusedIDsTakeNoMemory(t *testing.T) {
	f := newFence(8)
	s := f.shard(id(1))
	binding := func(ends bool) *Binding[value] {
		return &Binding[value]{Changed: func(*value) bool { return ends }, Cut: func(error) {}, AfterEnd: func() {}}
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
	require.Len(t, s.bound, 1, "the other one is there")
	f.Release(id(1), second)
	require.Empty(t, s.bound)
	f.Release(id(1), second)
	require.Empty(t, s.bound)
}

// The tests below run every interleaving of the steps in the comment of Fence, against the real code, with the commit
// as a step like any other. That covers a reader that is stopped anywhere, in particular between its store read and
// its install while a change commits, without a goroutine or a sleep.

// A world is one run: a fence, the store behind it, and what the participants saw.
type world struct {
	fence *Fence[value]
	store int64 // the committed value: old, then new
	now   int   // counts steps
	reads []read
	bound bool // a binding was admitted with the old value…
	ended bool // …and cancelled
	done  int  // when a revocation returned first; never, until it has
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

// reader is a Verify, in its three steps.
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

// prober is a Verify that nothing interrupts and that installs nothing.
func prober(w *world) []func() {
	return []func(){func() {
		if v, _ := w.fence.Get(id(1), nil); v != nil {
			w.reads = append(w.reads, read{w.now, w.now, v.n})
		} else {
			w.reads = append(w.reads, read{w.now, w.now, w.store})
		}
	}}
}

// binder is a Bind, in its three steps. The new value does not admit it.
func binder(w *world) []func() {
	b := &Binding[value]{
		Changed:  func(v *value) bool { w.ended = v.n == newValue; return w.ended },
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

// writer is a Revoke, in its three phases.
func writer(w *world) []func() {
	return []func(){
		func() { w.fence.Begin(id(1)) },
		func() { w.store = newValue },
		func() { w.fence.End(id(1), val(1, newValue)); w.done = min(w.done, w.now) },
	}
}

// check says what is wrong with a finished run. For one write of one value, a history is linearizable exactly if nobody
// sees the old value who started after somebody saw the new one, or after the write returned.
func (w *world) check() string {
	for _, y := range w.reads {
		if y.value != oldValue {
			continue
		}
		if y.start > w.done {
			return "old value seen after the change returned"
		}
		for _, x := range w.reads {
			if x.value == newValue && x.end < y.start {
				return "old value seen after the new one was"
			}
		}
	}
	if v, _ := w.fence.Get(id(1), nil); v != nil && v.n == oldValue {
		return "old value left in the cache"
	}
	if w.bound && !w.ended && w.done != never {
		return "a binding outlived the change"
	}
	return ""
}

// explore runs every interleaving of the participants and counts what was wrong, by kind.
func explore(variant Variant, warm bool, participants ...func(*world) []func()) (runs int, wrong map[string]int) {
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

func run(variant Variant, warm bool, participants []func(*world) []func(), schedule []int) string {
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
	for _, tt := range []struct {
		name    string
		variant Variant
		right   bool
	}{
		{"two-phase", TwoPhase, true},
		{"look-aside", LookAside, false},
		{"bump before only", BumpBefore, false},
		{"bump after only", BumpAfter, false},
		{"front cleared after only", FrontLate, false},
		{"front never cleared", FrontNever, false},
		{"front filled with what may be old", FrontCareless, false},
		// Nothing is in it then that could have come in since phase A: that is what the hold is for.
		{"front cleared before only", TwoPhase &^ clearAfter, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			violations := 0
			for _, warm := range []bool{false, true} {
				for _, cast := range [][]func(*world) []func(){
					{reader, reader, prober, writer},
					{binder, reader, prober, writer},
				} {
					runs, wrong := explore(tt.variant, warm, cast...)
					require.Equal(t, 16800, runs) // 10! / (3! 3! 1! 3!)
					t.Logf("warm %v: %d runs, wrong: %v", warm, runs, wrong)
					for _, n := range wrong {
						violations += n
					}
				}
			}
			require.Equal(t, tt.right, violations == 0)
		})
	}
}

// A second revoker finds the change committed by a first, which is stopped before its phase C, and has nothing to
// commit. It must not return before the bindings know all the same: it tells them, and that alone is enough.
func TestNotifyCatchesABindThatReadBeforeTheCommit(t *testing.T) {
	stopped := func(w *world) []func() {
		return []func(){
			func() { w.fence.Begin(id(1)) },
			func() { w.store = newValue },
		}
	}
	second := func(w *world) []func() {
		return []func(){func() {
			if w.store == newValue {
				w.fence.Notify(id(1), val(1, newValue))
				w.done = w.now
			}
		}}
	}
	runs, wrong := explore(TwoPhase, false, binder, reader, stopped, second)
	require.Equal(t, 5040, runs) // 9! / (3! 3! 2! 1!)
	require.Empty(t, wrong)
}

// The same in earnest, for the race detector: readers and binders against a writer.
func TestConcurrent(t *testing.T) {
	const rounds = 2000
	f := newFence(4)
	var committed, announced, liveBindings atomic.Int64
	var wg sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			var least int64 // what it read last
			for {
				select {
				case <-stop:
					return
				default:
				}
				floor := announced.Load()
				// It counts itself once, when it is told of a value beyond its own, or leaves.
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
					t.Errorf("read %d, after %d was announced and %d was read", v.n, floor, least)
					return
				}
				least = v.n
				v, ticket = f.Get(id(1), b)
				ok := v != nil
				if !ok {
					v = val(1, committed.Load())
					liveBindings.Add(1) // before it can be cancelled
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
					t.Errorf("bound with %d, after %d was announced and %d was read", v.n, floor, least)
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
	require.Zero(t, liveBindings.Load(), "every binding was told")
	require.Zero(t, f.Stats().Bound)
}

// A binding that is not admitted, or not any more there, does not count.
func TestBoundIDs(t *testing.T) {
	f := newFence(8)
	binding := func() *Binding[value] {
		return &Binding[value]{Changed: func(*value) bool { return true }, Cut: func(error) {}, AfterEnd: func() {}}
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
