// Package memory implements backend.Backend in memory, for tests and as the simplest example of the
// contract. Close drops all entries. The backend starts no goroutine and does no I/O, so the
// backend works in a bubble of testing/synctest.
package memory

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// New returns an empty backend.
func New() backend.Backend { return &memory{} }

// A memory is the backend. The tree never changes, so readers need the lock only to load the tree.
type memory struct {
	mu     sync.Mutex // guards all below
	all    *tree
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

func (m *memory) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := wellFormed(changes); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
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
		if c.Delete {
			m.all = m.all.without(c.Key)
		} else {
			m.all = m.all.with(
				clone(backend.Entry{Key: c.Key, Value: c.Value, Revision: revision(c)}),
			)
		}
	}
	return nil
}

// revision returns the revision of the entry after a write.
func revision(c backend.Change) uint64 {
	if c.Revision != 0 {
		return c.Revision
	}
	return c.Expect + 1
}

// wellFormed returns an error if the changes break the rules of backend.Backend that do not depend
// on the stored entries.
func wellFormed(changes []backend.Change) error {
	if len(changes) == 0 {
		return errors.New("no changes to apply")
	}
	if len(changes) > backend.MaxChanges {
		return backend.ErrTooLarge
	}
	seen, size := make(map[string]bool), 0
	for _, c := range changes {
		if size += len(c.Key) + len(c.Value); size > backend.MaxApplySize {
			return backend.ErrTooLarge
		}
		if len(c.Key) == 0 || seen[string(c.Key)] {
			return errors.New("empty key, or two changes of the same key")
		}
		if len(c.Key) > backend.MaxKeySize || len(c.Value) > backend.MaxValueSize {
			return backend.ErrTooLarge
		}
		if c.Delete && (len(c.Value) != 0 || c.Revision != 0 || c.Expect == 0) {
			return errors.New("a deletion must have no Value, no Revision, and an Expect above 0")
		}
		if !c.Delete && revision(c) <= c.Expect {
			return errors.New("the new revision must be greater than Expect")
		}
		seen[string(c.Key)] = true
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
