package backendtest

import (
	"context"
	"iter"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) backend.Backend { return NewMemory() })
}

// A recorder is a test that is expected to fail.
type recorder struct{ failed bool }

func (r *recorder) Errorf(string, ...any) { r.failed = true }
func (r *recorder) FailNow()              { r.failed = true; runtime.Goexit() }

// The suite notices what is wrong with a backend.
func TestSuiteCatches(t *testing.T) {
	for name, wreck := range map[string]func(backend.Backend) backend.Backend{
		"expectations that are ignored":     func(b backend.Backend) backend.Backend { return &forceful{b} },
		"half of a request":                 func(b backend.Backend) backend.Backend { return &piecemeal{b} },
		"a scan in disorder":                func(b backend.Backend) backend.Backend { return &disorderly{b} },
		"a scan that includes its end":      func(b backend.Backend) backend.Backend { return &inclusive{b} },
		"slices that are shared":            func(b backend.Backend) backend.Backend { return &sharing{Backend: b} },
		"reads that are stale":              func(b backend.Backend) backend.Backend { return &stale{Backend: b} },
		"contexts that are ignored":         func(b backend.Backend) backend.Backend { return &deaf{b} },
		"writes that are not made":          func(b backend.Backend) backend.Backend { return &forgetful{b} },
		"an error that is not the contract": func(b backend.Backend) backend.Backend { return &vague{b} },
		"deletions that are not made":       func(b backend.Backend) backend.Backend { return &hoarding{b} },
		"deletions that expect anything":    func(b backend.Backend) backend.Backend { return &ruthless{b} },
		"deletions that leave a value":      func(b backend.Backend) backend.Backend { return &hollow{b} },
		"revisions that are not as given":   func(b backend.Backend) backend.Backend { return &counting{b} },
		"revisions that are put right":      func(b backend.Backend) backend.Backend { return &lenient{b} },
		"a snapshot of many moments":        func(b backend.Backend) backend.Backend { return &drifting{b} },
		"a snapshot of an earlier moment":   func(b backend.Backend) backend.Backend { return &hasty{b} },
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
				case <-time.After(time.Minute):
					r.failed = true
				}
				if r.failed {
					caughtBy = append(caughtBy, c.name)
				}
			}
			require.NotEmpty(t, caughtBy)
			t.Logf("caught by %d of %d checks", len(caughtBy), len(checks))
		})
	}
}

type forceful struct{ backend.Backend }

func (b *forceful) Apply(ctx context.Context, changes ...backend.Change) error {
	for i, c := range changes {
		e, _ := b.Get(ctx, c.Key)
		changes[i].Expect = e.Revision
	}
	return b.Backend.Apply(ctx, changes...)
}

type piecemeal struct{ backend.Backend }

func (b *piecemeal) Apply(ctx context.Context, changes ...backend.Change) error {
	for _, c := range changes {
		if err := b.Backend.Apply(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

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

type inclusive struct{ backend.Backend }

func (b *inclusive) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if to != nil {
		to = append(slices.Clone(to), 0)
	}
	return b.Backend.Scan(ctx, from, to)
}

// sharing hands out the same memory each time.
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

// stale answers some reads from what it read before.
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

type deaf struct{ backend.Backend }

func (b *deaf) Get(_ context.Context, key []byte) (backend.Entry, error) {
	return b.Backend.Get(context.Background(), key)
}

type forgetful struct{ backend.Backend }

func (b *forgetful) Apply(ctx context.Context, changes ...backend.Change) error {
	if len(changes) > 2 {
		changes = changes[1:]
	}
	return b.Backend.Apply(ctx, changes...)
}

type vague struct{ backend.Backend }

func (b *vague) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := b.Backend.Get(ctx, key)
	if err != nil {
		err = context.DeadlineExceeded
	}
	return e, err
}

type hoarding struct{ backend.Backend }

func (b *hoarding) Apply(ctx context.Context, changes ...backend.Change) error {
	writes := slices.DeleteFunc(slices.Clone(changes), func(c backend.Change) bool { return c.Delete })
	if len(writes) == 0 && len(changes) > 0 {
		return nil
	}
	return b.Backend.Apply(ctx, writes...)
}

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

type hollow struct{ backend.Backend }

func (b *hollow) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Delete = false
	}
	return b.Backend.Apply(ctx, changes...)
}

type counting struct{ backend.Backend }

func (b *counting) Apply(ctx context.Context, changes ...backend.Change) error {
	changes = slices.Clone(changes)
	for i := range changes {
		changes[i].Revision = 0
	}
	return b.Backend.Apply(ctx, changes...)
}

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

type drifting struct{ backend.Backend }

func (b *drifting) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return b.Backend.Scan(ctx, from, to)
}

// hasty takes its snapshot when it is called.
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
