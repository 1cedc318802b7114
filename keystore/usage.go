package keystore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A usage collects when keys were last used, and has it written behind.
//
// The verify path only compares two words of memory, but for the first use of a key in each minute. What is written
// goes to a key space of its own, one entry a key, so that no such write can touch a key's record, and undo a change
// that was made meanwhile.
type usage struct {
	minute atomic.Int64 // the present one, since the Unix epoch; moved by the background

	mu      sync.Mutex         // guards all below; not held over a call of the backend
	used    map[token.ID]int64 // the last minute of each key that was used since the last flush
	writing map[token.ID]int64 // what a flush has taken, and not finished with

	flushing sync.Mutex // held by the one flush at a time
}

// maxUsed bounds the keys that a usage remembers. The use of another one is noted at a later use.
const maxUsed = 1 << 16

func minuteOf(t time.Time) int64 { return t.Unix() / 60 }

// due reports whether this use of a key has to be noted. It is inlined.
func (u *usage) due(e *entry) bool { return e.used.Load() != u.minute.Load() }

// note says that a key was used.
func (u *usage) note(e *entry) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if _, ok := u.used[e.ID]; ok || len(u.used) < maxUsed {
		minute := u.minute.Load()
		u.used[e.ID] = minute
		e.used.Store(minute)
	}
}

// pending returns the minute of a use that is not written yet, or 0.
func (u *usage) pending(id token.ID) int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return max(u.used[id], u.writing[id])
}

// flush writes what has been collected. What cannot be written is kept for the next time.
func (s *Store) flushUsage(ctx context.Context) error {
	u := &s.usage
	u.flushing.Lock()
	defer u.flushing.Unlock()
	u.mu.Lock()
	u.writing, u.used = u.used, make(map[token.ID]int64)
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		for id, minute := range u.writing {
			u.used[id] = max(u.used[id], minute)
		}
		u.writing = nil
	}()
	ids := slices.Collect(maps.Keys(u.writing)) // read here only, and written below
	for batch := range slices.Chunk(ids, backend.MaxChanges) {
		if err := s.writeUsage(ctx, batch); err != nil {
			return err
		}
		u.mu.Lock()
		for _, id := range batch {
			delete(u.writing, id)
		}
		u.mu.Unlock()
	}
	return nil
}

func (s *Store) writeUsage(ctx context.Context, ids []token.ID) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	var changes []backend.Change
	for _, id := range ids {
		minute, revision, err := s.readUsage(ctx, id)
		if errors.Is(err, ErrCorrupt) {
			continue // or nobody's use would be written any more
		}
		if err != nil {
			return err
		}
		if now := s.usage.pending(id); now > minute {
			value := binary.AppendUvarint(nil, uint64(now))
			changes = append(changes, backend.Change{Key: usageKey(id), Value: value, Expect: revision})
		}
	}
	if len(changes) == 0 {
		return nil
	}
	err := s.backend.Apply(ctx, changes...)
	if err != nil && !errors.Is(err, backend.ErrConflict) { // that is a purge's; there will be another flush
		s.noteFailure(err)
		return trouble("write usage", err)
	}
	return err
}

// forgetUsage removes what is known of the use of keys that are gone: at most so many as fit into one write. If that
// fails, it stays, and does no harm.
func (s *Store) forgetUsage(ctx context.Context, gone []*entry) {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	var changes []backend.Change
	for _, e := range gone {
		s.usage.mu.Lock()
		delete(s.usage.used, e.ID)
		s.usage.mu.Unlock()
		if _, revision, err := s.readUsage(ctx, e.ID); err == nil && revision > 0 {
			changes = append(changes, backend.Change{Key: usageKey(e.ID), Expect: revision, Delete: true})
		}
	}
	if len(changes) > 0 {
		_ = s.backend.Apply(ctx, changes...)
	}
}

// lastUsed returns when a key was last used: the later of what is written and what is not yet.
func (s *Store) lastUsed(ctx context.Context, id token.ID) (time.Time, error) {
	pending := s.usage.pending(id) // before the read: a flush between the two moves it there
	minute, _, err := s.readUsage(ctx, id)
	if err != nil {
		return time.Time{}, err
	}
	if minute = max(minute, pending); minute == 0 {
		return time.Time{}, nil
	}
	return time.Unix(minute*60, 0).UTC(), nil
}

// readUsage reads what is written; all 0 if nothing is.
func (s *Store) readUsage(ctx context.Context, id token.ID) (minute int64, revision uint64, err error) {
	e, err := s.backend.Get(ctx, usageKey(id))
	if errors.Is(err, backend.ErrNotFound) {
		return 0, 0, nil
	}
	if err != nil {
		if ended := endOf(ctx); ended != nil {
			return 0, 0, ended
		}
		s.noteFailure(err)
		return 0, 0, trouble("read usage", err)
	}
	minute, err = parseUsage(e)
	return minute, e.Revision, err
}

func parseUsage(e backend.Entry) (minute int64, err error) {
	value, n := binary.Uvarint(e.Value)
	if len(e.Key) != 1+len(token.ID{}) || n <= 0 || n != len(e.Value) || value > maxMinute {
		return 0, fmt.Errorf("%w: the last use of the storage key %x is not a time", ErrCorrupt, e.Key)
	}
	return int64(value), nil
}

const maxMinute = 1 << 40 // what no clock shows, and time.Unix can hold

// usageSpace is where the backend has the minutes of last use; see keySpace.
const usageSpace = 'u'

func usageKey(id token.ID) []byte { return append([]byte{usageSpace}, id[:]...) }
