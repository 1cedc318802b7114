package backendtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An Engine is a store that several processes can have open, as RunFeed needs the store.
type Engine interface {
	// Open returns a new handle. RunFeed closes the handle.
	Open() backend.Feeder
}

// A Trimmer is an Engine that can forget changes. RunFeed then tests that Feed does not leave out
// the forgotten changes.
type Trimmer interface {
	// Trim forgets all changes that were made until now. The entries stay.
	Trim()
}

// A Saver is an Engine that can be restored to an earlier moment. RunFeed then tests that Feed
// notices.
type Saver interface {
	// Save returns a function that restores the engine to the moment of the call of Save.
	Save() (restore func())
}

// RunFeed tests a backend against the contract of backend.Feeder. RunFeed calls open for each
// subtest. The function open must return an engine without entries. If the engine is a Trimmer or a
// Saver, RunFeed tests backend.ErrGap too.
//
// RunFeed also runs the tests of Run, with calls that alternate between two handles.
func RunFeed(t *testing.T, open func(t *testing.T) Engine) {
	for _, c := range feedChecks {
		t.Run(c.name, func(t *testing.T) { c.runOn(t, open(t)) })
	}
	t.Run("two handles are one store", func(t *testing.T) {
		Run(t, func(t *testing.T) backend.Backend {
			e := open(t)
			b := &alternating{Feeder: e.Open(), other: e.Open()}
			if _, ok := b.other.(backend.AllGetter); ok {
				return alternatingAll{b}
			}
			return b
		})
	})
}

// An alternating makes each call on the handle that did not make the last call.
type alternating struct {
	backend.Feeder
	other backend.Feeder
	calls atomic.Uint64
}

func (b *alternating) handle() backend.Backend {
	if b.calls.Add(1)%2 == 0 {
		return b.Feeder
	}
	return b.other
}

func (b *alternating) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	return b.handle().Get(ctx, key)
}

func (b *alternating) Apply(ctx context.Context, changes ...backend.Change) error {
	return b.handle().Apply(ctx, changes...)
}

func (b *alternating) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return b.handle().Scan(ctx, from, to)
}

func (b *alternating) Snapshot(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	return b.handle().Snapshot(ctx, from, to)
}

func (b *alternating) Close() error { return errors.Join(b.Feeder.Close(), b.other.Close()) }

// An alternatingAll is an alternating of two handles with GetAll.
type alternatingAll struct{ *alternating }

func (b alternatingAll) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	return b.handle().(backend.AllGetter).GetAll(ctx, keys)
}

// patience is the longest time for which a test waits for a step of a feed.
const patience = time.Minute

// A feedCheck tests one sentence of the contract of backend.Feeder.
type feedCheck struct {
	name string
	run  func(t *feedTest)
}

func (c feedCheck) runOn(t require.TestingT, e Engine) {
	test := &feedTest{TestingT: t, engine: e, revisions: make(map[string]uint64),
		stop: make(chan struct{})}
	defer test.end()
	c.run(test)
}

// A feedTest is one run of a feedCheck.
type feedTest struct {
	require.TestingT
	engine    Engine
	handles   []backend.Feeder
	readers   []*reader
	made      []backend.Batch   // what apply did; without positions
	revisions map[string]uint64 // what apply wrote
	stop      chan struct{}     // closed at the end of the test
}

func (t *feedTest) open() backend.Feeder {
	f := t.engine.Open()
	t.handles = append(t.handles, f)
	return f
}

// end stops the readers and closes the handles.
func (t *feedTest) end() {
	close(t.stop)
	for _, r := range t.readers {
		r.cancel()
	}
	for _, f := range t.handles {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	for _, r := range t.readers {
		select {
		case <-r.ended:
		case <-time.After(patience):
			t.Errorf("Feed does not end with its context, nor with Close")
		}
	}
}

// apply makes the changes, and adds the Batch that they make to made.
func (t *feedTest) apply(b backend.Backend, changes ...backend.Change) {
	require.NoError(t, b.Apply(ctx, changes...))
	var batch backend.Batch
	for _, c := range changes {
		e := backend.Entry{Key: c.Key}
		switch {
		case c.Check:
			continue
		case c.Delete:
			delete(t.revisions, string(c.Key))
		default:
			e.Value, e.Revision = c.Value, c.NewRevision()
			t.revisions[string(c.Key)] = e.Revision
		}
		batch.Changes = append(batch.Changes, e)
	}
	t.made = append(t.made, batch)
}

// put writes the next revision of an entry.
func (t *feedTest) put(b backend.Backend, key, value string) {
	t.apply(b, change(key, value, t.revisions[key]))
}

// A step is what a feed yields.
type step struct {
	batch backend.Batch
	err   error
}

// A reader reads a feed in a goroutine.
type reader struct {
	t      *feedTest
	cancel context.CancelFunc
	steps  chan step     // closed when the loop over the feed has ended
	ended  chan struct{} // closed when the loop over the feed has ended
}

// read reads a feed.
func (t *feedTest) read(f backend.Feeder, from, to string, after backend.Position) *reader {
	return t.readBody(f, from, to, after, func(backend.Batch) {})
}

// readAll reads a feed of all keys, from now on, and returns the starting point too.
func (t *feedTest) readAll(f backend.Feeder) (*reader, backend.Position) {
	r := t.read(f, "", "", 0)
	return r, r.start()
}

// readBody reads a feed, and calls body in the body of the loop.
func (t *feedTest) readBody(
	f backend.Feeder, from, to string, after backend.Position, body func(backend.Batch),
) *reader {
	ctx, cancel := context.WithCancel(ctx)
	var end []byte
	if to != "" {
		end = []byte(to)
	}
	return t.readSeq(cancel, f.Feed(ctx, []byte(from), end, after), body)
}

func (t *feedTest) readSeq(
	cancel context.CancelFunc, feed iter.Seq2[backend.Batch, error], body func(backend.Batch),
) *reader {
	r := &reader{t, cancel, make(chan step, 1000), make(chan struct{})}
	t.readers = append(t.readers, r)
	go func() {
		defer close(r.ended)
		defer close(r.steps)
		for b, err := range feed {
			if err == nil {
				body(b)
			}
			select {
			case r.steps <- step{b, err}:
			case <-t.stop:
				return
			}
		}
	}()
	return r
}

// step returns the next step of the feed.
func (r *reader) step() step {
	select {
	case s, ok := <-r.steps:
		require.True(r.t, ok, "Feed ended without an error")
		return s
	case <-time.After(patience):
		require.Fail(r.t, "Feed yields nothing")
	}
	return step{}
}

func (r *reader) next() backend.Batch {
	s := r.step()
	require.NoError(r.t, s.err)
	require.NotZero(r.t, s.batch.Position)
	return s.batch
}

// start returns the Position of the first Batch of a Feed from 0.
func (r *reader) start() backend.Position {
	b := r.next()
	require.Empty(r.t, b.Changes, "the first Batch has no changes")
	return b.Position
}

// fails requires that the feed ends with an error, and yields nothing before the error.
func (r *reader) fails(err error) {
	s := r.step()
	require.ErrorIs(r.t, s.err, err)
	require.Zero(r.t, s.batch, "the Batch of an error")
	r.endsHere()
}

// failsSoon is like fails, but the feed may yield Batches that were ready before.
func (r *reader) failsSoon(err error) {
	s := r.step()
	for s.err == nil {
		s = r.step()
	}
	require.ErrorIs(r.t, s.err, err)
	r.endsHere()
}

// endsHere requires that no step follows.
func (r *reader) endsHere() {
	select {
	case s, ok := <-r.steps:
		require.False(r.t, ok, "a step follows the error: %v", s)
	case <-time.After(patience):
		require.Fail(r.t, "the loop does not end after an error")
	}
}

// expect requires that the next Batches are those of want in the range, after a position. The
// result is their positions.
func (r *reader) expect(
	want []backend.Batch, from, to string, after backend.Position,
) (positions []backend.Position) {
	for _, batch := range want {
		var entries []backend.Entry
		for _, e := range batch.Changes {
			if key := string(e.Key); key >= from && (to == "" || key < to) {
				entries = append(entries, e)
			}
		}
		if len(entries) == 0 {
			continue
		}
		got := r.next()
		require.Greater(r.t, got.Position, after)
		require.Equal(r.t, describe(entries), describe(got.Changes))
		after = got.Position
		positions = append(positions, after)
	}
	return positions
}

// describe returns a text for each entry, in the order of the keys.
func describe(entries []backend.Entry) (texts []string) {
	entries = slices.Clone(entries)
	slices.SortFunc(entries, func(a, b backend.Entry) int { return bytes.Compare(a.Key, b.Key) })
	for _, e := range entries {
		value := string(e.Value)
		if len(value) > 100 {
			value = fmt.Sprintf("%s... (%d bytes)", value[:100], len(value))
		}
		texts = append(texts, fmt.Sprintf("%q at revision %d: %q", e.Key, e.Revision, value))
	}
	return texts
}

var feedChecks = []feedCheck{
	{"Feed from 0 starts between the start of the iteration and its first step",
		func(t *feedTest) {
			a, b := t.open(), t.open()
			ctx, cancel := context.WithCancel(ctx)
			feed := a.Feed(ctx, nil, nil, 0)
			none := t.readSeq(cancel, feed, func(backend.Batch) {})
			require.NotZero(t, none.start(), "of a store without entries")
			t.put(b, "k", "before the iteration")
			none.expect(t.made, "", "", 0)
			r := t.readSeq(cancel, feed, func(backend.Batch) {})
			start := r.start()
			t.put(b, "k", "after the first step")
			r.expect(t.made[1:], "", "", start)
			for range 20 {
				r := t.readSeq(cancel, feed, func(backend.Batch) {})
				start := r.start()
				t.put(b, "k", "v")
				r.expect(t.made[len(t.made)-1:], "", "", start)
			}
		}},
	{"each Apply is one Batch, in order, and in all handles", func(t *feedTest) {
		a, b, c := t.open(), t.open(), t.open()
		random := rand.New(rand.NewPCG(1, 1))
		ra, start := t.readAll(a)
		rb, _ := t.readAll(b)
		for n := range 200 {
			var changes []backend.Change
			for _, n := range random.Perm(20)[:1+random.IntN(4)] {
				key := fmt.Sprint("k", n)
				c := change(key, fmt.Sprint(random.Uint64()), t.revisions[key])
				switch n := random.IntN(10); {
				case n < 2 && c.Expect > 0:
					c = deletion(key, c.Expect)
				case n == 2:
					c.Revision = c.Expect + 1 + random.Uint64N(3)
				}
				changes = append(changes, c)
			}
			by := []backend.Feeder{a, b, c}[random.IntN(3)]
			t.apply(by, changes...)
			if n%10 == 0 {
				changes = append(changes, change("conflict", "v", 1))
				require.ErrorIs(t, by.Apply(ctx, changes...), backend.ErrConflict)
			}
		}
		require.Equal(t, ra.expect(t.made, "", "", start), rb.expect(t.made, "", "", start),
			"the positions are the same in all handles")
	}},
	{"a large Apply is one Batch", func(t *feedTest) {
		a, b := t.open(), t.open()
		r, start := t.readAll(a)
		var many, large []backend.Change
		for n := range backend.MaxChanges {
			many = append(many, change(fmt.Sprintf("many%03d", n), "v", 0))
		}
		t.apply(b, many...)
		for n := range backend.MaxApplySize / backend.MaxValueSize {
			key := fmt.Sprint("large", n)
			value := bytes.Repeat([]byte{'x'}, backend.MaxValueSize-len(key))
			large = append(large, change(key, string(value), 0))
		}
		t.apply(b, large...)
		for n := range many {
			many[n] = deletion(string(many[n].Key), 1)
		}
		t.apply(b, many...)
		r.expect(t.made, "", "", start)
	}},
	{"a Batch has the entries as the Apply left them", func(t *feedTest) {
		// Many changes of the same key are ready before the feed is read.
		a, b := t.open(), t.open()
		_, start := t.readAll(a)
		for n := range 20 {
			t.put(b, "k", fmt.Sprint("enabled", n))
			t.put(b, "k", fmt.Sprint("disabled", n))
			if n%5 == 0 {
				t.apply(b, deletion("k", t.revisions["k"]))
			}
		}
		t.put(b, "empty", "")
		set := change("k", "revision set", t.revisions["k"])
		set.Revision = 1 << 40
		t.apply(b, set)
		t.read(a, "", "", start).expect(t.made, "", "", start)
	}},
	{"Feed yields only the range", func(t *feedTest) {
		a, b := t.open(), t.open()
		_, start := t.readAll(a)
		ranges := [][2]string{{"k", "n"}, {"m", "m\x00"}, {"\xff", ""}, {"", "k"}, {"", ""},
			{"l", "\xff"}}
		var live []*reader
		for _, r := range ranges {
			live = append(live, t.read(a, r[0], r[1], start))
		}
		keys := []string{"j", "j\xff", "k", "k\x00", "l", "m", "m\x00", "m\xff\xff", "n", "n\x00",
			"\x00", "\xff", "\xff\xff"}
		for _, key := range keys {
			t.put(b, key, "alone")
		}
		var changes []backend.Change
		for _, key := range keys {
			changes = append(changes, change(key, "together", 1))
		}
		t.apply(b, changes...)
		for _, key := range keys {
			t.apply(b, deletion(key, 2))
		}
		// The last change is in every range.
		changes = nil
		for _, key := range []string{"j", "k", "l", "m", "\xff"} {
			changes = append(changes, change(key, "last", 0))
		}
		t.apply(b, changes...)
		for n, r := range ranges {
			live[n].expect(t.made, r[0], r[1], start)
			t.read(a, r[0], r[1], start).expect(t.made, r[0], r[1], start)
		}
	}},
	{"Feed resumes after a position", func(t *feedTest) {
		const n = 600 // more than one page of any backend
		a, b := t.open(), t.open()
		r, start := t.readAll(a)
		for i := range n {
			t.put(b, fmt.Sprint(i%7), fmt.Sprint(i))
		}
		positions := r.expect(t.made, "", "", start)
		resumed := make(map[int]*reader)
		for i := 0; i < n; i += 50 {
			resumed[i] = t.read(a, "", "", positions[i])
			require.Equal(t, positions[i+1:i+3],
				resumed[i].expect(t.made[i+1:i+3], "", "", positions[i]))
		}
		last := t.read(a, "", "", positions[n-1])
		t.put(b, "0", "after the last")
		for i, r := range resumed {
			r.expect(t.made[i+3:], "", "", positions[i+2])
		}
		last.expect(t.made[n:], "", "", positions[n-1])
		r.expect(t.made[n:], "", "", positions[n-1])

		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		feed := a.Feed(ctx, nil, nil, start)
		for range 2 {
			r := t.readSeq(cancel, feed, func(backend.Batch) {})
			require.Equal(t, positions, r.expect(t.made[:n], "", "", start),
				"two loops over one result")
		}
	}},
	{"an Apply that returned before another was called has the lower position",
		func(t *feedTest) {
			const writers, each = 4, 40
			handles := []backend.Feeder{t.open(), t.open(), t.open()}
			ra, _ := t.readAll(handles[0])
			rb, _ := t.readAll(handles[1])
			var clock atomic.Int64
			type span struct{ called, returned int64 }
			var spans [writers][each]span
			var wg sync.WaitGroup
			wrong := make(chan error, writers)
			for w := range writers {
				wg.Go(func() {
					for n := range each {
						called := clock.Add(1)
						err := handles[(w+n)%len(handles)].Apply(ctx,
							change(fmt.Sprint(w), "v", uint64(n)))
						spans[w][n] = span{called, clock.Add(1)}
						if err != nil {
							wrong <- err
							return
						}
					}
				})
			}
			wg.Wait()
			select {
			case err := <-wrong:
				require.NoError(t, err)
			default:
			}
			var latest int64 // when an Apply with a lower position was called
			for range writers * each {
				b, other := ra.next(), rb.next()
				require.Equal(t, b.Position, other.Position)
				require.Equal(t, describe(b.Changes), describe(other.Changes))
				require.Len(t, b.Changes, 1)
				e := b.Changes[0]
				require.Len(t, e.Key, 1)
				require.Positive(t, e.Revision)
				s := spans[e.Key[0]-'0'][e.Revision-1]
				require.Greater(t, s.returned, latest,
					"this Apply returned before an Apply with a lower position was called")
				latest = max(latest, s.called)
			}
		}},
	{"Get shows what Feed has yielded", func(t *feedTest) {
		a, b, c := t.open(), t.open(), t.open()
		wrong := make(chan string, 1)
		r := t.readBody(b, "", "", 0, func(batch backend.Batch) {
			for _, e := range batch.Changes {
				for _, f := range []backend.Feeder{a, b, c} {
					now, err := f.Get(ctx, e.Key)
					if all, ok := f.(backend.AllGetter); ok && err == nil && now.Revision >= e.Revision {
						var found []backend.Entry
						if found, err = all.GetAll(ctx, [][]byte{e.Key}); err == nil {
							now = found[0]
						}
					}
					if err == nil && now.Revision >= e.Revision {
						continue
					}
					select {
					case wrong <- fmt.Sprintf("Feed has yielded revision %d, and a read yields %d, %v",
						e.Revision, now.Revision, err):
					default:
					}
				}
			}
		})
		last := r.start()
		for n := range 50 {
			t.put(a, "k", fmt.Sprint(n))
			last = r.expect(t.made[n:], "", "", last)[0]
		}
		for n := range 50 { // the writer does not wait for the feed
			t.put(a, "k", fmt.Sprint(n))
		}
		r.expect(t.made[50:], "", "", last)
		select {
		case what := <-wrong:
			require.Fail(t, what)
		default:
		}
	}},
	{"Check compares and writes nothing", func(t *feedTest) {
		a, b := t.open(), t.open()
		r, start := t.readAll(b)
		t.put(a, "guard", "v")
		t.put(a, "guard", "w")
		t.apply(b, checkOf("guard", 2), change("k", "v", 0))
		t.apply(b, change("k", "w", 1), checkOf("none", 0), checkOf("guard", 2))
		t.apply(a, deletion("k", 2), checkOf("guard", 2))
		for _, check := range []backend.Change{
			checkOf("guard", 0), checkOf("guard", 1), checkOf("guard", 3), checkOf("none", 1),
		} {
			for _, f := range []backend.Feeder{a, b} {
				require.ErrorIs(t, f.Apply(ctx, change("l", "v", 0), check), backend.ErrConflict)
			}
		}
		requireNone(t, a, "l")
		requireNone(t, a, "none")
		requireEntry(t, b, "guard", "w", 2)
		r.expect(t.made, "", "", start)
	}},
	{"a Change with Check and a value is refused", func(t *feedTest) {
		a := t.open()
		t.put(a, "guard", "v")
		withValue, withRevision := checkOf("guard", 1), checkOf("guard", 1)
		withValue.Value, withRevision.Revision = []byte("v"), 2
		withDelete := checkOf("guard", 1)
		withDelete.Delete = true
		for _, wrong := range []backend.Change{withValue, withRevision, withDelete} {
			require.Error(t, a.Apply(ctx, change("k", "v", 0), wrong))
		}
		require.Error(t, a.Apply(ctx, checkOf("guard", 1)), "no change writes or deletes")
		require.Error(t, a.Apply(ctx, checkOf("guard", 1), change("guard", "w", 1)))
		requireNone(t, a, "k")
		requireEntry(t, a, "guard", "v", 1)
	}},
	{"after the deletion of an entry, no Apply that checks the entry succeeds",
		func(t *feedTest) {
			handles := []backend.Feeder{t.open(), t.open(), t.open()}
			r, _ := t.readAll(handles[2])
			t.put(handles[0], "guard", "v")
			const writers = 4
			var deleted atomic.Bool
			var wg sync.WaitGroup
			wrong := make(chan string, writers)
			ready := make(chan struct{}, 2*writers) // a writer has written, or has ended
			for w := range writers {
				wg.Go(func() {
					defer func() { ready <- struct{}{} }()
					for n := uint64(0); ; n++ {
						late := deleted.Load()
						err := handles[w%2].Apply(ctx, change(fmt.Sprint(w), "v", n),
							checkOf("guard", 1))
						switch {
						case errors.Is(err, backend.ErrConflict):
							return
						case err != nil:
							wrong <- err.Error()
							return
						case late:
							wrong <- "an Apply that was called after the deletion succeeds"
							return
						case n == 10:
							ready <- struct{}{}
						}
					}
				})
			}
			for range writers {
				<-ready
			}
			err := handles[2].Apply(ctx, deletion("guard", 1))
			deleted.Store(true)
			wg.Wait()
			require.NoError(t, err)
			select {
			case what := <-wrong:
				require.Fail(t, what)
			default:
			}
			require.NoError(t, handles[0].Apply(ctx, change("last", "v", 0)))
			gone := false
			for {
				b := r.next()
				require.Len(t, b.Changes, 1)
				e := b.Changes[0]
				if string(e.Key) == "last" {
					break
				}
				require.False(t, gone, "%q was written after the deletion", e.Key)
				gone = string(e.Key) == "guard" && e.Revision == 0
			}
			require.True(t, gone)
		}},
	{"the body may call every method", func(t *feedTest) {
		a := t.open()
		wrong := make(chan error, 1)
		body := func(b backend.Batch) {
			err := func() error {
				n := uint64(0)
				if len(b.Changes) > 0 {
					n = b.Changes[0].Revision
				}
				if n > 20 {
					return nil
				}
				for _, err := range a.Feed(ctx, nil, nil, 0) {
					if err != nil {
						return err
					}
					break
				}
				for _, all := range bothReads(a) {
					for _, err := range all {
						if err != nil {
							return err
						}
					}
				}
				if err := a.Apply(ctx, change("k", "v", n)); err != nil {
					return err
				}
				_, err := a.Get(ctx, []byte("k"))
				return err
			}()
			if err != nil {
				select {
				case wrong <- err:
				default:
				}
			}
		}
		r := t.readBody(a, "", "", 0, body)
		r.start()
		for n := range uint64(21) {
			require.Equal(t, n+1, r.next().Changes[0].Revision)
		}
		select {
		case err := <-wrong:
			require.NoError(t, err)
		default:
		}
	}},
	{"slices of a Batch belong to the caller", func(t *feedTest) {
		a := t.open()
		_, start := t.readAll(a)
		for n := range 5 {
			t.apply(a, change(fmt.Sprint("key", n), "value", 0), change(fmt.Sprint("l", n), "v", 0))
		}
		want := slices.Clone(t.made)
		for n := range want {
			want[n].Changes = slices.Clone(want[n].Changes)
			for m, e := range want[n].Changes {
				want[n].Changes[m].Key = bytes.Clone(e.Key)
				want[n].Changes[m].Value = bytes.Clone(e.Value)
			}
		}
		spoil := func(b backend.Batch) {
			for i, e := range b.Changes {
				clear(e.Key)
				clear(e.Value)
				_ = append(e.Value[:0], "XXX"...)
				b.Changes[i].Revision = 77
			}
		}
		r := t.readBody(a, "", "", start, spoil)
		for range want {
			r.next()
		}
		for _, b := range t.made { // the slices that apply passed in
			spoil(b)
		}
		t.read(a, "", "", start).expect(want, "", "", start)
		requireEntry(t, a, "key0", "value", 1)
	}},
	{"Feed ends with its context", func(t *feedTest) {
		a, b := t.open(), t.open()
		r, start := t.readAll(a)
		t.put(b, "k", "v")
		r.next()
		other, _ := t.readAll(a)
		r.cancel()
		r.fails(context.Canceled)
		for _, after := range []backend.Position{0, start} {
			done, cancel := context.WithCancel(ctx)
			cancel()
			r = t.readSeq(cancel, a.Feed(done, nil, nil, after), func(backend.Batch) {})
			r.fails(context.Canceled)
			timeout, cancel := context.WithTimeout(ctx, time.Millisecond)
			r = t.readSeq(cancel, a.Feed(timeout, nil, nil, after), func(backend.Batch) {})
			r.failsSoon(context.DeadlineExceeded)
			inBody, cancel := context.WithCancel(ctx)
			r = t.readSeq(cancel, a.Feed(inBody, nil, nil, after),
				func(backend.Batch) { cancel() })
			require.NoError(t, r.step().err)
			r.failsSoon(context.Canceled)
		}
		t.put(b, "k", "w")
		other.expect(t.made[1:], "", "", 0)
	}},
	{"Feed ends with Close, and not with Close of another handle", func(t *feedTest) {
		a, b := t.open(), t.open()
		ra, start := t.readAll(a)
		rb, _ := t.readAll(b)
		require.NoError(t, a.Close())
		ra.fails(backend.ErrClosed)
		t.read(a, "", "", 0).fails(backend.ErrClosed)
		t.read(a, "", "", start).fails(backend.ErrClosed)
		t.put(b, "k", "v")
		rb.expect(t.made, "", "", 0)
		require.NoError(t, a.Close())
		t.put(b, "k", "w")
		rb.expect(t.made[1:], "", "", 0)
		wrong := make(chan error, 1)
		r := t.readBody(b, "", "", start, func(backend.Batch) {
			if err := b.Close(); err != nil {
				wrong <- err
			}
		})
		r.next()
		r.failsSoon(backend.ErrClosed)
		require.Empty(t, wrong)
		rb.fails(backend.ErrClosed)
		requireEntry(t, t.open(), "k", "w", 2)
	}},
	{"Feed ends with ErrGap after the changes were forgotten", func(t *feedTest) {
		trimmer, ok := t.engine.(Trimmer)
		if !ok {
			return
		}
		a, b := t.open(), t.open()
		r, start := t.readAll(a)
		// A reader that is slow: its body waits until the changes are forgotten.
		forgotten := make(chan struct{})
		var once sync.Once
		defer once.Do(func() { close(forgotten) })
		begun := make(chan struct{}, 100)
		slow := t.readBody(a, "", "", 0, func(backend.Batch) {
			begun <- struct{}{}
			<-forgotten
		})
		select {
		case <-begun:
		case <-time.After(patience):
			require.Fail(t, "Feed yields nothing")
		}
		var pages []backend.Change
		for n := range 10 {
			t.put(b, "k", fmt.Sprint(n))
			pages = append(pages, change(fmt.Sprint("many", n), "v", 0))
		}
		t.apply(b, pages...)
		positions := append([]backend.Position{start}, r.expect(t.made, "", "", start)...)
		trimmer.Trim()
		once.Do(func() { close(forgotten) })
		t.put(b, "k", "after")
		for _, after := range positions[:len(positions)-1] {
			t.read(a, "", "", after).fails(backend.ErrGap)
		}
		// The slow reader may have the changes in a buffer. If not, it ends with ErrGap.
		slowStart := slow.start()
		for _, made := range t.made {
			s := slow.step()
			if s.err != nil {
				require.ErrorIs(t, s.err, backend.ErrGap)
				break
			}
			require.Greater(t, s.batch.Position, slowStart)
			require.Equal(t, describe(made.Changes), describe(s.batch.Changes),
				"Feed leaves out changes before this Batch")
		}
		fresh, start := t.readAll(a)
		t.put(b, "k", "later")
		fresh.expect(t.made[len(t.made)-1:], "", "", start)
		requireEntry(t, a, "many0", "v", 1)
	}},
	{"Feed ends with ErrGap after the engine was restored", func(t *feedTest) {
		saver, ok := t.engine.(Saver)
		if !ok {
			return
		}
		a, b := t.open(), t.open()
		r, start := t.readAll(a)
		t.put(b, "k", "before Save")
		restore := saver.Save()
		for n := range 3 {
			t.put(b, "k", fmt.Sprint("lost ", n))
		}
		lost := r.expect(t.made, "", "", start)[1:]
		restore()
		requireEntry(t, b, "k", "before Save", 1)
		for n := range uint64(5) { // other changes get the positions
			require.NoError(t, b.Apply(ctx, change("k", fmt.Sprint("new ", n), n+1)))
		}
		r.fails(backend.ErrGap)
		for _, after := range lost {
			t.read(a, "", "", after).fails(backend.ErrGap)
		}
		fresh, start := t.readAll(a)
		require.NoError(t, b.Apply(ctx, change("k", "w", 6)))
		got := fresh.next()
		require.Greater(t, got.Position, start)
		require.Equal(t, []string{`"k" at revision 7: "w"`}, describe(got.Changes))
	}},
}
