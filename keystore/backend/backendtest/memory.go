// Package backendtest helps those who implement a backend: a conformance suite, and a reference that is easy to read.
package backendtest

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"maps"
	"slices"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// NewMemory returns a backend that keeps everything in memory, and nothing beyond its Close. It is the contract in its
// plainest form: for tests, and for reading. It starts no goroutine and does no I/O, so that it may live in a bubble of
// testing/synctest.
func NewMemory() backend.Backend { return &memory{entries: make(map[string]backend.Entry)} }

type memory struct {
	mu      sync.Mutex // guards all below
	entries map[string]backend.Entry
	closed  bool
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
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return backend.Entry{}, err
	}
	e, ok := m.entries[string(key)]
	if !ok {
		return backend.Entry{}, backend.ErrNotFound
	}
	return clone(e), nil
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
		if m.entries[string(c.Key)].Revision != c.Expect {
			return backend.ErrConflict
		}
	}
	for _, c := range changes {
		if c.Delete {
			delete(m.entries, string(c.Key))
			continue
		}
		m.entries[string(c.Key)] = clone(backend.Entry{Key: c.Key, Value: c.Value, Revision: revision(c)})
	}
	return nil
}

// revision returns the one that a write makes.
func revision(c backend.Change) uint64 {
	if c.Revision != 0 {
		return c.Revision
	}
	return c.Expect + 1
}

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
			return errors.New("an empty key, or one that stands in two changes")
		}
		if len(c.Key) > backend.MaxKeySize || len(c.Value) > backend.MaxValueSize {
			return backend.ErrTooLarge
		}
		if c.Delete && (len(c.Value) != 0 || c.Revision != 0 || c.Expect == 0) {
			return errors.New("a deletion that has a value or a revision, or expects no entry")
		}
		if !c.Delete && revision(c) <= c.Expect {
			return errors.New("a revision that is not greater than the expected one")
		}
		seen[string(c.Key)] = true
	}
	return nil
}

func (m *memory) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for from := from; ; {
			e, ok, err := m.first(ctx, from, to)
			if err != nil {
				yield(backend.Entry{}, err)
				return
			}
			if !ok {
				return
			}
			from = append(bytes.Clone(e.Key), 0) // the least key behind it
			if !yield(e, nil) {
				return
			}
		}
	}
}

// first returns the entry with the least key in [from, to).
func (m *memory) first(ctx context.Context, from, to []byte) (backend.Entry, bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return backend.Entry{}, false, err
	}
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if key >= string(from) && (to == nil || key < string(to)) {
			return clone(m.entries[key]), true, nil
		}
	}
	return backend.Entry{}, false, nil
}

func (m *memory) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		entries, err := m.within(ctx, from, to)
		for _, e := range entries {
			if !yield(e, nil) {
				return
			}
			if err = m.usable(ctx); err != nil {
				break
			}
		}
		if err != nil {
			yield(backend.Entry{}, err)
		}
	}
}

// within returns the entries with keys in [from, to).
func (m *memory) within(ctx context.Context, from, to []byte) (entries []backend.Entry, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.usableLocked(ctx); err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(m.entries)) {
		if key >= string(from) && (to == nil || key < string(to)) {
			entries = append(entries, clone(m.entries[key]))
		}
	}
	return entries, nil
}

func (m *memory) usable(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.usableLocked(ctx)
}

func (m *memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

func clone(e backend.Entry) backend.Entry {
	return backend.Entry{Key: bytes.Clone(e.Key), Value: bytes.Clone(e.Value), Revision: e.Revision}
}
