package backendtest

import (
	"bytes"
	"context"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewMemory() })
}

// A recorder is a require.TestingT that records whether a check failed.
type recorder struct{ failed atomic.Bool }

func (r *recorder) Errorf(string, ...any) { r.failed.Store(true) }
func (r *recorder) FailNow()              { r.failed.Store(true); runtime.Goexit() }

// A busy backend makes two other transfers after each read of the last account. The last account
// then has the revision of before, because it was deleted in between.
type busy struct {
	backend.Backend
	t *testing.T
}

func (b *busy) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := b.Backend.Get(ctx, key)
	if string(key) != "z" {
		return e, err
	}
	for _, changes := range [][]backend.Change{
		{change("a", "10", 0), deletion("z", 1)},
		{change("a", "7", 1), change("z", "3", 0)},
	} {
		moves, err := b.Backend.Get(ctx, []byte("moves"))
		require.NoError(b.t, err)
		changes = append(changes, change("moves", "", moves.Revision))
		require.NoError(b.t, b.Apply(ctx, changes...))
	}
	return e, nil
}

// A transfer that reads the accounts before two other transfers, and writes after them, conflicts.
func TestTransferBesideTransfers(t *testing.T) {
	const total = 10
	for seed := range uint64(100) {
		b := &busy{NewMemory(), t}
		require.NoError(t, b.Apply(ctx, change("z", "10", 0), change("moves", "", 0)))
		random := rand.New(rand.NewPCG(seed, 0))
		require.ErrorIs(t, transfer(b, random, total), backend.ErrConflict)
	}
}

// For each kind of broken backend, at least one check of the suite fails.
func TestSuiteCatches(t *testing.T) {
	for name, wreck := range map[string]func(backend.Backend) backend.Backend{
		"Expect is ignored":     func(b backend.Backend) backend.Backend { return &forceful{b} },
		"Apply is not atomic":   func(b backend.Backend) backend.Backend { return &piecemeal{b} },
		"Scan is not in order":  func(b backend.Backend) backend.Backend { return &disorderly{b} },
		"Scan includes the end": func(b backend.Backend) backend.Backend { return &inclusive{b} },
		"slices are shared": func(b backend.Backend) backend.Backend {
			return &sharing{Backend: b}
		},
		"reads are stale": func(b backend.Backend) backend.Backend {
			return &stale{Backend: b}
		},
		"contexts are ignored":  func(b backend.Backend) backend.Backend { return &deaf{b} },
		"writes are lost":       func(b backend.Backend) backend.Backend { return &forgetful{b} },
		"errors are wrong":      func(b backend.Backend) backend.Backend { return &vague{b} },
		"deletes are lost":      func(b backend.Backend) backend.Backend { return &hoarding{b} },
		"deletes ignore Expect": func(b backend.Backend) backend.Backend { return &ruthless{b} },
		"deletes leave a value": func(b backend.Backend) backend.Backend { return &hollow{b} },
		"Revision is ignored":   func(b backend.Backend) backend.Backend { return &counting{b} },
		"bad revisions pass":    func(b backend.Backend) backend.Backend { return &lenient{b} },
		"Snapshot is a Scan":    func(b backend.Backend) backend.Backend { return &drifting{b} },
		"Snapshot is too early": func(b backend.Backend) backend.Backend { return &hasty{b} },
		"Check is ignored":      func(b backend.Backend) backend.Backend { return &unguarded{b} },
		"Check writes":          func(b backend.Backend) backend.Backend { return &marking{b} },
		"Check is too early":    func(b backend.Backend) backend.Backend { return &eager{b} },
		"ScanDown ascends":      func(b backend.Backend) backend.Backend { return &ascending{b} },
		"ScanDown includes to":  func(b backend.Backend) backend.Backend { return &lifted{b} },
		"ScanDown is too early": func(b backend.Backend) backend.Backend { return &premature{b} },
		"ScanDown loses a key":  func(b backend.Backend) backend.Backend { return &losing{b} },
		"GetAll is in order":    func(b backend.Backend) backend.Backend { return &sorting{b} },
		"GetAll leaves out":     func(b backend.Backend) backend.Backend { return &skipping{b} },
		"GetAll is stale":       func(b backend.Backend) backend.Backend { return &dated{Backend: b} },
	} {
		t.Run(name, func(t *testing.T) {
			var caughtBy []string
			for _, c := range checks {
				r := new(recorder)
				done := make(chan struct{})
				go func() {
					defer close(done)
					b := wreck(NewMemory())
					defer b.Close()
					c.run(r, b)
				}()
				select {
				case <-done:
				case <-time.After(time.Minute): // the check still runs
					r.failed.Store(true)
				}
				if r.failed.Load() {
					caughtBy = append(caughtBy, c.name)
				}
			}
			require.NotEmpty(t, caughtBy)
			t.Logf("caught by %d of %d checks", len(caughtBy), len(checks))
		})
	}
}

// forceful ignores Expect.
type forceful struct{ backend.Backend }

func (b *forceful) Apply(ctx context.Context, changes ...backend.Change) error {
	for i, c := range changes {
		e, _ := b.Get(ctx, c.Key)
		changes[i].Expect = e.Revision
	}
	return b.Backend.Apply(ctx, changes...)
}

// piecemeal makes each change of an Apply separately.
type piecemeal struct{ backend.Backend }

func (b *piecemeal) Apply(ctx context.Context, changes ...backend.Change) error {
	for _, c := range changes {
		if err := b.Backend.Apply(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// disorderly yields the entries of a Scan in reverse order.
type disorderly struct{ backend.Backend }

func (b *disorderly) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		var entries []backend.Entry
		for e, err := range b.Backend.Scan(ctx, from, to) {
			if err != nil {
				yield(e, err)
				return
			}
			entries = append(entries, e)
		}
		slices.Reverse(entries)
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// inclusive yields the entry of the key to as well.
type inclusive struct{ backend.Backend }

func (b *inclusive) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if to != nil {
		to = append(slices.Clone(to), 0)
	}
	return b.Backend.Scan(ctx, from, to)
}

// sharing returns the same slices from each Get of an unchanged entry.
type sharing struct {
	backend.Backend
	mu   sync.Mutex
	last map[string]backend.Entry
}

func (b *sharing) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := b.Backend.Get(ctx, key)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.last == nil {
		b.last = make(map[string]backend.Entry)
	}
	if last, ok := b.last[string(key)]; ok && err == nil && last.Revision == e.Revision {
		return last, nil
	}
	if err == nil {
		b.last[string(key)] = e
	}
	return e, err
}

// stale returns an earlier entry from every fifth Get.
type stale struct {
	backend.Backend
	mu   sync.Mutex
	last backend.Entry
	n    int
}

func (b *stale) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := b.Backend.Get(ctx, key)
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.n++; err == nil && b.n%5 == 0 && string(b.last.Key) == string(key) {
		return b.last, nil
	}
	if err == nil {
		b.last = e
	}
	return e, err
}

// deaf ignores the context of Get.
type deaf struct{ backend.Backend }

func (b *deaf) Get(_ context.Context, key []byte) (backend.Entry, error) {
	return b.Backend.Get(context.Background(), key)
}

// forgetful loses the first change of a large Apply.
type forgetful struct{ backend.Backend }

func (b *forgetful) Apply(ctx context.Context, changes ...backend.Change) error {
	if len(changes) > 2 {
		changes = changes[1:]
	}
	return b.Backend.Apply(ctx, changes...)
}

// vague returns an error that the contract does not allow.
type vague struct{ backend.Backend }

func (b *vague) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := b.Backend.Get(ctx, key)
	if err != nil {
		err = context.DeadlineExceeded
	}
	return e, err
}

// hoarding ignores deletions.
type hoarding struct{ backend.Backend }

func (b *hoarding) Apply(ctx context.Context, changes ...backend.Change) error {
	writes := slices.DeleteFunc(slices.Clone(changes),
		func(c backend.Change) bool { return c.Delete })
	if len(writes) == 0 && len(changes) > 0 {
		return nil
	}
	return b.Backend.Apply(ctx, writes...)
}

// ruthless ignores the Expect of deletions.
type ruthless struct{ backend.Backend }

func (b *ruthless) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i, c := range changes {
		if e, err := b.Get(ctx, c.Key); c.Delete && err == nil {
			changes[i].Expect = e.Revision
		}
	}
	return b.Backend.Apply(ctx, changes...)
}

// hollow writes an empty value instead of deleting.
type hollow struct{ backend.Backend }

func (b *hollow) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Delete = false
	}
	return b.Backend.Apply(ctx, changes...)
}

// counting ignores Revision.
type counting struct{ backend.Backend }

func (b *counting) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Revision = 0
	}
	return b.Backend.Apply(ctx, changes...)
}

// lenient accepts a Revision that is not greater than Expect.
type lenient struct{ backend.Backend }

func (b *lenient) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i, c := range changes {
		if c.Revision <= c.Expect {
			changes[i].Revision = 0
		}
	}
	return b.Backend.Apply(ctx, changes...)
}

// drifting makes a Scan out of a Snapshot.
type drifting struct{ backend.Backend }

func (b *drifting) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return b.Backend.Scan(ctx, from, to)
}

// hasty takes the snapshot when Snapshot is called, and not when the loop starts.
type hasty struct{ backend.Backend }

func (b *hasty) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	type step struct {
		e   backend.Entry
		err error
	}
	var steps []step
	for e, err := range b.Backend.Snapshot(ctx, from, to) {
		steps = append(steps, step{e, err})
	}
	return func(yield func(backend.Entry, error) bool) {
		for _, s := range steps {
			if !yield(s.e, s.err) {
				return
			}
		}
	}
}

// ascending makes a Scan out of a ScanDown.
type ascending struct{ backend.Backend }

func (b *ascending) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return b.Scan(ctx, from, to)
}

// lifted yields the entry of the key to as well.
type lifted struct{ backend.Backend }

func (b *lifted) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if to != nil {
		to = append(slices.Clone(to), 0)
	}
	return b.Backend.(backend.DownScanner).ScanDown(ctx, from, to)
}

// premature reads everything before the first step of a ScanDown.
type premature struct{ backend.Backend }

func (b *premature) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		var entries []backend.Entry
		for e, err := range b.Snapshot(ctx, from, to) {
			if err != nil {
				yield(e, err)
				return
			}
			entries = append(entries, e)
		}
		for _, e := range slices.Backward(entries) {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// losing loses the last key of each page of a ScanDown.
type losing struct{ backend.Backend }

func (b *losing) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		n := 0
		for e, err := range b.Backend.(backend.DownScanner).ScanDown(ctx, from, to) {
			if n++; n%256 != 0 && !yield(e, err) {
				return
			}
		}
	}
}

// sorting returns the entries of GetAll in the order of the keys' bytes.
type sorting struct{ backend.Backend }

func (b *sorting) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	return b.Backend.(backend.AllGetter).GetAll(ctx, slices.SortedFunc(slices.Values(keys),
		bytes.Compare))
}

// skipping leaves out the keys without an entry.
type skipping struct{ backend.Backend }

func (b *skipping) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	all, err := b.Backend.(backend.AllGetter).GetAll(ctx, keys)
	return slices.DeleteFunc(all, func(e backend.Entry) bool { return e.Revision == 0 }), err
}

// dated remembers what GetAll has returned for the same keys before.
type dated struct {
	backend.Backend
	known sync.Map
}

func (b *dated) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	if known, ok := b.known.Load(string(bytes.Join(keys, nil))); ok {
		return known.([]backend.Entry), nil
	}
	all, err := b.Backend.(backend.AllGetter).GetAll(ctx, keys)
	if err == nil {
		b.known.Store(string(bytes.Join(keys, nil)), all)
	}
	return all, err
}

// unguarded ignores changes with Check.
type unguarded struct{ backend.Backend }

func (b *unguarded) Apply(ctx context.Context, changes ...backend.Change) error {
	writes := slices.DeleteFunc(slices.Clone(changes),
		func(c backend.Change) bool { return c.Check })
	return b.Backend.Apply(ctx, writes...)
}

// marking writes what a Check compares.
type marking struct{ backend.Backend }

func (b *marking) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Check = false
	}
	return b.Backend.Apply(ctx, changes...)
}

// eager checks before the Apply, and not as a part of the Apply.
type eager struct{ backend.Backend }

func (b *eager) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := backend.CheckChanges(changes); err != nil {
		return err
	}
	for _, c := range changes {
		if e, _ := b.Get(ctx, c.Key); c.Check && e.Revision != c.Expect {
			return backend.ErrConflict
		}
	}
	time.Sleep(time.Millisecond)
	return (&unguarded{b.Backend}).Apply(ctx, changes...)
}
