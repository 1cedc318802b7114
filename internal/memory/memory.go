// Package memory implements backend.Backend and backend.Feeder in memory, for tests and as the
// simplest example of the contract. The backends start no goroutine and do no I/O, so the backends
// work in a bubble of testing/synctest.
package memory

import (
	"bytes"
	"context"
	"iter"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// New returns an empty backend that belongs to one process. Close drops all entries.
func New() backend.Backend { return &memory{store: new(store)} }

// A store holds the entries, for one or more handles. The tree never changes, so readers need the
// lock only to load the tree.
type store struct {
	mu  sync.Mutex // guards all below, and the field closed of each handle
	all *tree
	log *changeLog // nil: the store has one handle, and no feed
}

// A memory is a handle: what one process has open. A memory is the backend without a feed.
type memory struct {
	*store
	closed bool
}

// current returns the present tree.
func (m *memory) current(ctx context.Context) (*tree, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.all, m.usableLocked(ctx)
}

func (m *memory) usableLocked(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if m.closed {
		return backend.ErrClosed
	}
	return nil
}

func (m *memory) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	all, err := m.current(ctx)
	if err != nil {
		return backend.Entry{}, err
	}
	t := all.find(key)
	if t == nil {
		return backend.Entry{}, backend.ErrNotFound
	}
	return clone(t.entry), nil
}

// GetAll implements backend.AllGetter.
func (m *memory) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	all, err := m.current(ctx)
	if err != nil {
		return nil, err
	}
	entries := make([]backend.Entry, len(keys))
	for i, key := range keys {
		if t := all.find(key); t != nil {
			entries[i] = clone(t.entry)
		}
	}
	return entries, nil
}

func (m *memory) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := backend.CheckChanges(changes); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.applyLocked(ctx, changes)
}

func (m *memory) applyLocked(ctx context.Context, changes []backend.Change) error {
	if err := m.usableLocked(ctx); err != nil {
		return err
	}
	for _, c := range changes {
		revision := uint64(0)
		if t := m.all.find(c.Key); t != nil {
			revision = t.entry.Revision
		}
		if revision != c.Expect {
			return backend.ErrConflict
		}
	}
	for _, c := range changes {
		switch {
		case c.Check:
		case c.Delete:
			m.all = m.all.without(c.Key)
		default:
			m.all = m.all.with(
				clone(backend.Entry{Key: c.Key, Value: c.Value, Revision: c.NewRevision()}),
			)
		}
	}
	return nil
}

func (m *memory) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		m.scan(ctx, func(now *tree) *tree { return now }, from, to, yield)
	}
}

func (m *memory) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		all, err := m.current(ctx)
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		m.scan(ctx, func(*tree) *tree { return all }, from, to, yield)
	}
}

// scan yields the entries of a range. Before each step, source receives the present tree and
// returns the tree to read.
func (m *memory) scan(
	ctx context.Context, source func(now *tree) *tree, from, to []byte,
	yield func(backend.Entry, error) bool,
) {
	for {
		now, err := m.current(ctx)
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		t := source(now).first(from)
		if t == nil || to != nil && bytes.Compare(t.entry.Key, to) >= 0 {
			return
		}
		from = append(bytes.Clone(t.entry.Key), 0) // the smallest key after this key
		if !yield(clone(t.entry), nil) {
			return
		}
	}
}

// ScanDown implements backend.DownScanner.
func (m *memory) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		to := to // each loop over the result begins at the same end
		for {
			now, err := m.current(ctx)
			if err != nil {
				yield(backend.Entry{}, err)
				return
			}
			t := now.last(to)
			if t == nil || bytes.Compare(t.entry.Key, from) < 0 {
				return
			}
			to = t.entry.Key
			if !yield(clone(t.entry), nil) {
				return
			}
		}
	}
}

func (m *memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.all, m.closed = nil, true
	return nil
}

func clone(e backend.Entry) backend.Entry {
	return backend.Entry{Key: bytes.Clone(e.Key), Value: bytes.Clone(e.Value), Revision: e.Revision}
}
