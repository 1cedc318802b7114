package backendtest

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestSharedFeed(t *testing.T) {
	RunFeed(t, func(*testing.T) Engine { return NewShared() })
}

// An engine without the optional methods passes too.
func TestSharedFeedWithoutOptions(t *testing.T) {
	for _, c := range feedChecks {
		t.Run(c.name, func(t *testing.T) { c.runOn(t, struct{ Engine }{NewShared()}) })
	}
}

// feeder is a short name.
type feeder = backend.Feeder

// A wrongEngine is a Shared with handles that are wrong.
type wrongEngine struct {
	*Shared
	wrong   func(backend.Feeder) backend.Feeder
	handles []backend.Feeder // the handles that are right
}

func (e *wrongEngine) Open() backend.Feeder {
	f := e.Shared.Open()
	e.handles = append(e.handles, f)
	return e.wrong(f)
}

// fails runs a check with handles that are wrong, in a bubble: a check that waits for nothing ends
// soon, and a goroutine that a check leaves behind fails the test.
func fails(t *testing.T, c feedCheck, wrong func(backend.Feeder) backend.Feeder) bool {
	r := new(recorder)
	synctest.Test(t, func(t *testing.T) {
		e := &wrongEngine{Shared: NewShared(), wrong: wrong}
		done := make(chan struct{})
		go func() {
			defer close(done)
			c.runOn(r, e)
		}()
		<-done
		for _, f := range e.handles {
			require.NoError(t, f.Close())
		}
	})
	return r.failed.Load()
}

// A right Feeder passes each check, and leaves no goroutine behind.
func TestSharedFeedInABubble(t *testing.T) {
	for _, c := range feedChecks {
		require.False(t, fails(t, c, func(f feeder) feeder { return f }), c.name)
	}
}

// For each kind of wrong Feeder, at least one check fails, and each check fails for at least one
// kind.
func TestFeedSuiteCatches(t *testing.T) {
	caught, ran := make(map[string]bool), 0
	wrongFeeders := map[string]func(feeder) feeder{
		"merges two Applies":       wrongFeed(merge),
		"splits an Apply":          wrongFeed(split),
		"drops a Batch":            wrongFeed(drop),
		"yields a Batch twice":     wrongFeed(repeat),
		"orders wrongly":           wrongFeed(swap),
		"positions do not match":   wrongFeed(swapChanges),
		"orders of one key only":   func(f feeder) feeder { return &unordered{f} },
		"ignores the range":        func(f feeder) feeder { return &boundless{f} },
		"the range includes to":    func(f feeder) feeder { return &overlong{f} },
		"the range excludes from":  func(f feeder) feeder { return &tooShort{f} },
		"an Apply out of range":    func(f feeder) feeder { return &wholesale{f} },
		"resumes one late":         func(f feeder) feeder { return &resumesLate{f} },
		"resumes one early":        func(f feeder) feeder { return &resumesEarly{f} },
		"starts without a Batch":   func(f feeder) feeder { return &startless{f} },
		"starts when it is called": func(f feeder) feeder { return &startsEarly{f} },
		"starts one late":          func(f feeder) feeder { return &startsLate{f} },
		"yields the latest state":  func(f feeder) feeder { return &latest{f} },
		"deletions are lost":       wrongFeed(withoutDeletions),
		"deletions have a revision": wrongFeed(
			changeEntries(func(e *backend.Entry) { e.Revision = max(e.Revision, 1) })),
		"values are lost":         wrongFeed(withoutValues),
		"the error has a Batch":   wrongFeed(loud),
		"ends without an error":   wrongFeed(quiet),
		"continues after errors":  wrongFeed(stubborn),
		"jumps over a gap":        func(f feeder) feeder { return &gapless{f} },
		"ignores its context":     func(f feeder) feeder { return &unstoppable{f} },
		"Close does not end it":   func(f feeder) feeder { return &unclosed{f} },
		"Close ends other feeds":  closesAll(),
		"holds a lock":            func(f feeder) feeder { return &locking{Feeder: f} },
		"slices are shared":       wrongFeed(sharedSlices()),
		"Get is behind the feed":  func(f feeder) feeder { return &lagging{Feeder: f} },
		"GetAll is behind it":     func(f feeder) feeder { return &laggingAll{lagging{Feeder: f}} },
		"Check is ignored":        func(f feeder) feeder { return &unchecked{f} },
		"Check writes":            func(f feeder) feeder { return &checkWrites{f} },
		"Check is no part of it":  checkFirst(),
		"Check with a value":      func(f feeder) feeder { return &checksAnything{f} },
		"handles differ in order": differ(),
	}
	for name, wrong := range wrongFeeders {
		t.Run(name, func(t *testing.T) {
			ran++
			var by []string
			for _, c := range feedChecks {
				if fails(t, c, wrong) {
					by = append(by, c.name)
					caught[c.name] = true
				}
			}
			t.Logf("caught by %q", by)
			require.NotEmpty(t, by)
		})
	}
	if ran < len(wrongFeeders) {
		return // -run has chosen some
	}
	for _, c := range feedChecks {
		require.True(t, caught[c.name], "nothing fails the check %q", c.name)
	}
}

// feedOf is the type of a feed.
type feedOf = iter.Seq2[backend.Batch, error]

// A filtered changes what Feed yields.
type filtered struct {
	backend.Feeder
	filter func(feedOf) feedOf
}

func wrongFeed(filter func(feedOf) feedOf) func(backend.Feeder) backend.Feeder {
	return func(f feeder) feeder { return &filtered{f, filter} }
}

func (f *filtered) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) feedOf {
	return f.filter(f.Feeder.Feed(ctx, from, to, after))
}

// pairs yields each Batch that has changes together with the next one.
func pairs(
	feed feedOf, yield func(backend.Batch, error) bool,
	pair func(a, b backend.Batch, yield func(backend.Batch, error) bool) bool,
) {
	var first *backend.Batch
	for b, err := range feed {
		switch {
		case err != nil || len(b.Changes) == 0:
			if !yield(b, err) {
				return
			}
		case first == nil:
			first = &b
		default:
			if !pair(*first, b, yield) {
				return
			}
			first = nil
		}
	}
}

func merge(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		pairs(feed, yield, func(a, b backend.Batch, yield func(backend.Batch, error) bool) bool {
			for _, e := range a.Changes {
				if !slices.ContainsFunc(b.Changes,
					func(later backend.Entry) bool { return bytes.Equal(later.Key, e.Key) }) {
					b.Changes = append(b.Changes, e)
				}
			}
			return yield(b, nil)
		})
	}
}

func swap(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		pairs(feed, yield, func(a, b backend.Batch, yield func(backend.Batch, error) bool) bool {
			return yield(b, nil) && yield(a, nil)
		})
	}
}

// swapChanges swaps the changes of two Batches, and keeps the positions in order.
func swapChanges(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		pairs(feed, yield, func(a, b backend.Batch, yield func(backend.Batch, error) bool) bool {
			a.Changes, b.Changes = b.Changes, a.Changes
			return yield(a, nil) && yield(b, nil)
		})
	}
}

func split(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range feed {
			for len(b.Changes) > 1 {
				if !yield(backend.Batch{Position: b.Position, Changes: b.Changes[:1]}, nil) {
					return
				}
				b.Changes = b.Changes[1:]
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// nth calls yield for every fifth Batch with changes, and passes the other Batches on.
func nth(feed feedOf, fifth func(b backend.Batch, yield func(backend.Batch, error) bool) bool,
) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		n := 0
		for b, err := range feed {
			if len(b.Changes) > 0 {
				n++
			}
			if n%5 == 4 && err == nil && len(b.Changes) > 0 {
				if !fifth(b, yield) {
					return
				}
			} else if !yield(b, err) {
				return
			}
		}
	}
}

func drop(feed feedOf) feedOf {
	return nth(feed, func(backend.Batch, func(backend.Batch, error) bool) bool { return true })
}

func repeat(feed feedOf) feedOf {
	return nth(feed, func(b backend.Batch, yield func(backend.Batch, error) bool) bool {
		twice := b
		return yield(b, nil) && yield(twice, nil)
	})
}

// each calls change for each Batch with changes, and leaves out the Batches that have none
// afterwards.
func each(feed feedOf, change func(*backend.Batch)) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range feed {
			if len(b.Changes) > 0 {
				if change(&b); len(b.Changes) == 0 {
					continue
				}
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

func withoutDeletions(feed feedOf) feedOf {
	return each(feed, func(b *backend.Batch) {
		b.Changes = slices.DeleteFunc(b.Changes,
			func(e backend.Entry) bool { return e.Revision == 0 })
	})
}

func withoutValues(feed feedOf) feedOf {
	return changeEntries(func(e *backend.Entry) { e.Value = nil })(feed)
}

func changeEntries(change func(*backend.Entry)) func(feedOf) feedOf {
	return func(feed feedOf) feedOf {
		return each(feed, func(b *backend.Batch) {
			for i := range b.Changes {
				change(&b.Changes[i])
			}
		})
	}
}

// loud yields the last Batch together with an error.
func loud(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		last := backend.Batch{Position: 7}
		for b, err := range feed {
			if err == nil {
				last = b
			}
			if !yield(last, err) {
				return
			}
		}
	}
}

func quiet(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range feed {
			if err != nil || !yield(b, nil) {
				return
			}
		}
	}
}

func stubborn(feed feedOf) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range feed {
			if !yield(b, err) || err != nil && !yield(b, err) {
				return
			}
		}
	}
}

// sharedSlices yields the same slices from all feeds.
func sharedSlices() func(feedOf) feedOf {
	var mu sync.Mutex
	type key struct {
		key      string
		revision uint64
	}
	all := make(map[key]backend.Entry)
	return changeEntries(func(e *backend.Entry) {
		mu.Lock()
		defer mu.Unlock()
		k := key{string(e.Key), e.Revision}
		if before, ok := all[k]; ok {
			*e = before
		}
		all[k] = *e
	})
}

// unordered orders the changes of each key, and not of two keys.
type unordered struct{ backend.Feeder }

func (f *unordered) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		pairs(f.Feeder.Feed(ctx, from, to, after), yield,
			func(a, b backend.Batch, yield func(backend.Batch, error) bool) bool {
				if !bytes.Equal(a.Changes[0].Key, b.Changes[0].Key) {
					a.Changes, b.Changes = b.Changes, a.Changes
				}
				return yield(a, nil) && yield(b, nil)
			})
	}
}

type boundless struct{ backend.Feeder }

func (f *boundless) Feed(ctx context.Context, _, _ []byte, after backend.Position) feedOf {
	return f.Feeder.Feed(ctx, nil, nil, after)
}

type overlong struct{ backend.Feeder }

func (f *overlong) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	if to != nil {
		to = append(bytes.Clone(to), 0)
	}
	return f.Feeder.Feed(ctx, from, to, after)
}

type tooShort struct{ backend.Feeder }

func (f *tooShort) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return f.Feeder.Feed(ctx, append(bytes.Clone(from), 0), to, after)
}

// wholesale yields all changes of an Apply if one change is in the range.
type wholesale struct{ backend.Feeder }

func (f *wholesale) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, nil, nil, after) {
			in := slices.ContainsFunc(b.Changes, func(e backend.Entry) bool {
				return bytes.Compare(e.Key, from) >= 0 &&
					(to == nil || bytes.Compare(e.Key, to) < 0)
			})
			if (in || len(b.Changes) == 0) && !yield(b, err) {
				return
			}
		}
	}
}

type resumesLate struct{ backend.Feeder }

func (f *resumesLate) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		late := after != 0
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			if late && err == nil {
				late = false
				continue
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

type resumesEarly struct{ backend.Feeder }

func (f *resumesEarly) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return f.Feeder.Feed(ctx, from, to, max(after, 2)-min(after, 1))
}

type startless struct{ backend.Feeder }

func (f *startless) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			if (len(b.Changes) > 0 || err != nil) && !yield(b, err) {
				return
			}
		}
	}
}

type startsEarly struct{ backend.Feeder }

func (f *startsEarly) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	if after != 0 {
		return f.Feeder.Feed(ctx, from, to, after)
	}
	var start backend.Position
	for b := range f.Feeder.Feed(ctx, from, to, 0) {
		start = b.Position
		break
	}
	return func(yield func(backend.Batch, error) bool) {
		if start != 0 && !yield(backend.Batch{Position: start}, nil) {
			return
		}
		f.Feeder.Feed(ctx, from, to, start)(yield)
	}
}

// startsLate begins to listen after its first step.
type startsLate struct{ backend.Feeder }

func (f *startsLate) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	if after != 0 {
		return f.Feeder.Feed(ctx, from, to, after)
	}
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, 0) {
			if !yield(b, err) {
				return
			}
			break
		}
		time.Sleep(time.Second)
		for b, err := range f.Feeder.Feed(ctx, from, to, 0) {
			if (len(b.Changes) > 0 || err != nil) && !yield(b, err) {
				return
			}
		}
	}
}

// latest yields each entry as the entry is now.
type latest struct{ backend.Feeder }

func (f *latest) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return changeEntries(func(e *backend.Entry) {
		now, err := f.Get(ctx, e.Key)
		if err == nil {
			*e = now
		} else if errors.Is(err, backend.ErrNotFound) {
			*e = backend.Entry{Key: e.Key}
		}
	})(f.Feeder.Feed(ctx, from, to, after))
}

// gapless continues at the present instead of returning ErrGap.
type gapless struct{ backend.Feeder }

func (f *gapless) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			if errors.Is(err, backend.ErrGap) {
				(&startless{f.Feeder}).Feed(ctx, from, to, 0)(yield)
				return
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

type unstoppable struct{ backend.Feeder }

func (f *unstoppable) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return f.Feeder.Feed(context.WithoutCancel(ctx), from, to, after)
}

type unclosed struct{ backend.Feeder }

func (f *unclosed) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			if errors.Is(err, backend.ErrClosed) {
				<-ctx.Done()
				err = ctx.Err()
			}
			if !yield(b, err) {
				return
			}
		}
	}
}

// A oneForAll closes all handles of the store together.
type oneForAll struct {
	backend.Feeder
	all *[]backend.Feeder
}

func closesAll() func(backend.Feeder) backend.Feeder {
	all := new([]backend.Feeder)
	return func(f backend.Feeder) backend.Feeder {
		*all = append(*all, f)
		return &oneForAll{f, all}
	}
}

func (f *oneForAll) Close() error {
	for _, f := range *f.all {
		_ = f.Close()
	}
	*f.all = nil
	return nil
}

// A locking holds a lock while the body of a loop over a Feed runs. A call that would wait for the
// lock returns an error.
type locking struct {
	backend.Feeder
	bodies atomic.Int64
}

func (f *locking) Apply(ctx context.Context, changes ...backend.Change) error {
	if f.bodies.Load() > 0 {
		return errors.New("deadlock")
	}
	return f.Feeder.Apply(ctx, changes...)
}

func (f *locking) Feed(ctx context.Context, from, to []byte, after backend.Position) feedOf {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range f.Feeder.Feed(ctx, from, to, after) {
			f.bodies.Add(1)
			more := yield(b, err)
			f.bodies.Add(-1)
			if !more {
				return
			}
		}
	}
}

// A lagging returns from Get what the entry was before.
type lagging struct {
	backend.Feeder
	mu     sync.Mutex
	before backend.Entry
}

func (f *lagging) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := f.Feeder.Get(ctx, key)
	f.mu.Lock()
	defer f.mu.Unlock()
	if err == nil && bytes.Equal(f.before.Key, key) && f.before.Revision < e.Revision {
		f.before, e = e, f.before
	} else if err == nil {
		f.before = e
	}
	return e, err
}

// A laggingAll returns from GetAll what the entries were before.
type laggingAll struct{ lagging }

func (f *laggingAll) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	return f.Feeder.Get(ctx, key)
}

func (f *laggingAll) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	all := make([]backend.Entry, len(keys))
	for i, key := range keys {
		all[i], _ = f.lagging.Get(ctx, key)
	}
	return all, nil
}

type unchecked struct{ backend.Feeder }

func (f *unchecked) Apply(ctx context.Context, changes ...backend.Change) error {
	writes := slices.DeleteFunc(slices.Clone(changes),
		func(c backend.Change) bool { return c.Check })
	return f.Feeder.Apply(ctx, writes...)
}

type checkWrites struct{ backend.Feeder }

func (f *checkWrites) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Check = false
	}
	return f.Feeder.Apply(ctx, changes...)
}

// checkFirst returns handles that check before the Apply, and not as a part of the Apply.
func checkFirst() func(feeder) feeder {
	var waits atomic.Int64
	return func(f feeder) feeder { return &checksFirst{f, &waits} }
}

// Between its check and its Apply, a checksFirst waits. No two waits end at the same instant of the
// bubble: while one writer runs, each other writer is between its check and its Apply.
type checksFirst struct {
	backend.Feeder
	waits *atomic.Int64 // of all handles
}

func (f *checksFirst) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := backend.CheckChanges(changes); err != nil {
		return err
	}
	for _, c := range changes {
		if !c.Check {
			continue
		}
		e, err := f.Get(ctx, c.Key)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		if e.Revision != c.Expect {
			return backend.ErrConflict
		}
		time.Sleep(time.Millisecond + time.Duration(f.waits.Add(1)))
	}
	return (&unchecked{f.Feeder}).Apply(ctx, changes...)
}

// checksAnything accepts a Check with a value, a revision or a deletion.
type checksAnything struct{ backend.Feeder }

func (f *checksAnything) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i, c := range changes {
		if c.Check {
			changes[i] = backend.Change{Key: c.Key, Expect: c.Expect, Check: true}
		}
	}
	return f.Feeder.Apply(ctx, changes...)
}

// differ makes every other handle order wrongly.
func differ() func(backend.Feeder) backend.Feeder {
	n := 0
	return func(f backend.Feeder) backend.Feeder {
		if n++; n%2 == 0 {
			return f
		}
		return &unordered{f}
	}
}
