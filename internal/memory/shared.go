package memory

import (
	"bytes"
	"context"
	"iter"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Shared is a store that several processes can have open at the same time. Each process has a
// handle from Open. The methods are safe for concurrent use.
type Shared struct{ store store }

// NewShared returns an empty store without handles.
func NewShared() *Shared {
	return &Shared{store{log: &changeLog{last: 1, trimmed: 1, history: 1}}}
}

// Open returns a new handle. Close of the handle ends the calls and the feeds of this handle only.
func (s *Shared) Open() backend.Feeder { return &feeder{memory: memory{store: &s.store}} }

// Last returns the position of the last Apply.
func (s *Shared) Last() backend.Position {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	return s.store.log.last
}

// Trim drops the changes from the log, up to and including the last change. A Feed that has not
// read these changes ends with ErrGap.
func (s *Shared) Trim() {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	s.store.log.batches, s.store.log.trimmed = nil, s.store.log.last
	s.store.log.wake()
}

// Save returns a function that puts the store back to the present entries and position. From then
// on, the store has another history: new changes get positions that other changes had before. Each
// Feed ends with ErrGap.
func (s *Shared) Save() (restore func()) {
	s.store.mu.Lock()
	defer s.store.mu.Unlock()
	all, last := s.store.all, s.store.log.last
	return func() {
		s.store.mu.Lock()
		defer s.store.mu.Unlock()
		l := s.store.log
		s.store.all = all
		l.batches, l.trimmed, l.last = nil, last, last
		l.history++
		l.wake()
	}
}

// A changeLog has the changes of the last calls of Apply.
type changeLog struct {
	last    backend.Position
	trimmed backend.Position // the log has all changes after this position
	batches []backend.Batch  // batches[i] has the position trimmed+1+i
	history uint64           // counts the restores
	changed chan struct{}    // closed when a waiting feed must look again; nil: no feed waits
}

// wait returns a channel that the next call of wake closes. The reader of a feed makes the channel,
// so the channel belongs to the reader's bubble of testing/synctest.
func (l *changeLog) wait() <-chan struct{} {
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return l.changed
}

// wake makes all feeds look again.
func (l *changeLog) wake() {
	if l.changed != nil {
		close(l.changed)
		l.changed = nil
	}
}

// add appends the changes of an Apply.
func (l *changeLog) add(changes []backend.Change) {
	l.last++
	b := backend.Batch{Position: l.last}
	for _, c := range changes {
		switch {
		case c.Check:
		case c.Delete:
			b.Changes = append(b.Changes, backend.Entry{Key: bytes.Clone(c.Key)})
		default:
			b.Changes = append(b.Changes, clone(
				backend.Entry{Key: c.Key, Value: c.Value, Revision: c.NewRevision()}))
		}
	}
	l.batches = append(l.batches, b)
	l.wake()
}

// A feeder is a handle of a Shared.
type feeder struct {
	memory
	// history is the history of the positions that the feeds of the handle have yielded. 0: the
	// feeds have yielded none.
	history uint64
}

func (f *feeder) Apply(ctx context.Context, changes ...backend.Change) error {
	if err := backend.CheckChanges(changes); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err := f.applyLocked(ctx, changes)
	if err == nil {
		f.log.add(changes)
	}
	return err
}

// Feed implements backend.Feeder.
func (f *feeder) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	from, to = bytes.Clone(from), bytes.Clone(to)
	return func(yield func(backend.Batch, error) bool) {
		c := cursor{from: from, to: to, at: after}
		for {
			b, changed, err := f.next(ctx, &c)
			if err != nil {
				yield(backend.Batch{}, err)
				return
			}
			if changed == nil {
				if !yield(b, nil) {
					return
				}
				continue
			}
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
	}
}

// A cursor is the state of one loop over a feed.
type cursor struct {
	from, to []byte
	at       backend.Position // the loop has read the log up to here; 0: the loop has not begun
	history  uint64           // of at
}

// next returns the next Batch of a feed, or a channel that is closed once next must look again.
func (f *feeder) next(ctx context.Context, c *cursor) (backend.Batch, <-chan struct{}, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.usableLocked(ctx); err != nil {
		return backend.Batch{}, nil, err
	}
	l := f.log
	if c.at == 0 {
		c.at, c.history, f.history = l.last, l.history, l.history
		return backend.Batch{Position: c.at}, nil, nil
	}
	if c.history == 0 {
		c.history = f.history
	}
	if c.history != l.history || c.at < l.trimmed || c.at > l.last {
		return backend.Batch{}, nil, backend.ErrGap
	}
	for _, b := range l.batches[c.at-l.trimmed:] {
		c.at = b.Position
		if b = c.inRange(b); len(b.Changes) > 0 {
			return b, nil, nil
		}
	}
	return backend.Batch{}, l.wait(), nil
}

// inRange returns a copy of the part of a Batch that is in the range of the cursor.
func (c *cursor) inRange(b backend.Batch) backend.Batch {
	part := backend.Batch{Position: b.Position}
	for _, e := range b.Changes {
		if bytes.Compare(e.Key, c.from) >= 0 && (c.to == nil || bytes.Compare(e.Key, c.to) < 0) {
			part.Changes = append(part.Changes, clone(e))
		}
	}
	return part
}

// Close ends the calls and the feeds of the handle. The store keeps the entries.
func (f *feeder) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	f.log.wake()
	return nil
}
