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
//
// The invariants:
//
//  1. A use that is not earlier than since is known: the minute of the use, or a later minute, is
//     in used, in writing or in the backend, or the key has a live context. The minute of a use may
//     be one too early, if minute was moved late.
//  2. used and writing together hold every key that was noted in the present minute, written or
//     not. So if minute moves by more than one, advance can correct the keys that may have been
//     used meanwhile.
//  3. The backend says that uses are complete only while no store is open, and only if every use
//     has been written. So after a crash, since is the moment of the next Open.
type usage struct {
	minute atomic.Int64 // the present one, since the Unix epoch; advance moves it

	mu      sync.Mutex         // guards all below; not held over a call of the backend
	used    map[token.ID]int64 // the last minute of each key used since the last flush, or in this minute
	writing map[token.ID]int64 // what a flush has taken, and not finished with
	most    int                // the keys that used and writing may have together
	since   time.Time          // the uses before it are not all known
	closed  bool               // no use is noted any more

	flushing sync.Mutex // held by the one flush at a time; guards all below
	marked   bool       // the backend says that a store is open
	revision uint64     // of what the backend says; of use only if marked
}

// maxUsed bounds the keys that a usage remembers. The use of another key moves since.
const maxUsed = 1 << 20

func minuteOf(t time.Time) int64 { return t.Unix() / 60 }

// due reports whether this use of a key has to be noted. It is inlined.
func (u *usage) due(e *entry) bool { return e.used.Load() != u.minute.Load() }

// note says that a key was used. It returns false when the store has been closed and the use comes
// too late.
func (u *usage) note(id token.ID, noted *atomic.Int64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	minute := u.minute.Load()
	if u.noteLocked(id, minute) {
		noted.Store(minute)
	}
	return true
}

func (u *usage) noteLocked(id token.ID, minute int64) bool {
	last, ok := u.used[id]
	if !ok && len(u.used)+len(u.writing) >= u.most {
		u.since = time.Now() // the use is forgotten
		return false
	}
	u.used[id] = max(last, minute)
	return true
}

// advance moves the present minute. If nobody has moved it in time, because the machine slept or
// its clock was set, then a key that was noted in the last minute may have been used until now, and
// counts as used now.
func (u *usage) advance(now time.Time) {
	minute := minuteOf(now)
	if u.minute.Load() == minute {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	last := u.minute.Load()
	if minute > last+1 {
		for _, minutes := range []map[token.ID]int64{u.used, u.writing} {
			for id, at := range minutes {
				if at == last {
					minutes[id] = minute
				}
			}
		}
	}
	u.minute.Store(minute)
}

// lose says that uses up to now may not be known.
func (u *usage) lose() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.since = time.Now()
}

// forget drops what is not written of the use of keys that are gone.
func (u *usage) forget(gone []*entry) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, e := range gone {
		delete(u.used, e.ID)
		delete(u.writing, e.ID)
	}
}

// unused reports whether a key has not been used since a moment, by its last use as lastUsed
// returns it. It is ErrInvalid if that is not known.
func (u *usage) unused(since, last time.Time) (bool, error) {
	if !last.Before(since.Truncate(time.Minute).Add(-time.Minute)) {
		return false, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if since.Before(u.since) {
		return false, invalid("Query.UnusedSince %s is too early: the store does not know of every use "+
			"before %s, because the process ended without Close, keys were restored, or very many keys "+
			"were used at the same time",
			since.UTC().Format(time.RFC3339), u.since.UTC().Format(time.RFC3339))
	}
	return true, nil
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
	if !u.marked {
		_ = s.markUsage(ctx, false) // Open could not, and has said so
	}
	u.advance(time.Now())
	bound := s.fence.Bound()
	u.mu.Lock()
	for _, id := range bound {
		u.noteLocked(id, u.minute.Load())
	}
	u.writing, u.used = u.used, make(map[token.ID]int64)
	ids := slices.Collect(maps.Keys(u.writing))
	u.mu.Unlock()
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		for id, minute := range u.writing {
			u.used[id] = max(u.used[id], minute)
		}
		u.writing = nil
	}()
	for batch := range slices.Chunk(ids, backend.MaxChanges) {
		written, err := s.writeUsage(ctx, batch)
		if err != nil {
			return err
		}
		u.mu.Lock()
		for i, id := range batch {
			if minute := u.writing[id]; minute > written[i] || minute >= u.minute.Load() {
				u.used[id] = max(u.used[id], minute)
			}
			delete(u.writing, id)
		}
		u.mu.Unlock()
	}
	return nil
}

// resumeUsage finds out since when all uses are known, and marks the store as open.
func (s *Store) resumeUsage() {
	ctx, cancel := s.limited(context.Background())
	defer cancel()
	u := &s.usage
	now := time.Now()
	u.minute.Store(minuteOf(now))
	u.since = now
	if e, err := s.backend.Get(ctx, usageStateKey); err == nil {
		if state, err := parseUsageState(e); err == nil && state.complete && state.since.Before(now) {
			u.since = state.since
		}
	}
	if err := s.markUsage(ctx, false); err != nil {
		s.log.Warn("API key store could not write that it is open, and will try again: "+
			"after a crash until then, uses may be missing", "error", err)
	}
}

// markUsage writes whether every use since usage.since has been written, and no store is open.
func (s *Store) markUsage(ctx context.Context, complete bool) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	u := &s.usage
	if !u.marked {
		e, err := s.backend.Get(ctx, usageStateKey)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			s.noteFailure(err)
			return trouble("read usage", err)
		}
		u.revision = e.Revision
	}
	u.mu.Lock()
	value := usageState{u.since, complete}.encode()
	u.mu.Unlock()
	// Restricts, because without the mark a later RevokeAll could revoke keys that are in use. A
	// conflict means that another store has the backend open.
	err := s.backend.Apply(ctx, backend.Change{Key: usageStateKey, Value: value, Expect: u.revision, Restricts: true})
	if err != nil {
		s.noteFailure(err)
		return trouble("write usage", err)
	}
	u.marked = true
	u.revision++
	return nil
}

// closeUsage writes all that is left, and that it is complete.
func (s *Store) closeUsage() error {
	u := &s.usage
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	if err := s.flushUsage(context.Background()); err != nil {
		return err
	}
	u.flushing.Lock()
	defer u.flushing.Unlock()
	return s.markUsage(context.Background(), true)
}

// A usageState is what the backend says of all uses.
type usageState struct {
	since    time.Time // the uses before it are not all known
	complete bool      // the others have been written, and no store is open
}

// usageStateKey is where the backend has the usageState; see keySpace.
var usageStateKey = []byte{'w'}

func (st usageState) encode() []byte {
	value := binary.BigEndian.AppendUint64(nil, uint64(st.since.UnixNano()))
	if st.complete {
		return append(value, 1)
	}
	return append(value, 0)
}

func parseUsageState(e backend.Entry) (usageState, error) {
	if string(e.Key) != string(usageStateKey) || len(e.Value) != 9 || e.Value[8] > 1 {
		return usageState{}, fmt.Errorf("%w: the storage key %x does not say since when all uses are known", ErrCorrupt, e.Key)
	}
	return usageState{fromNanos(int64(binary.BigEndian.Uint64(e.Value))), e.Value[8] == 1}, nil
}

// writeUsage writes the pending minutes of keys, and returns them.
func (s *Store) writeUsage(ctx context.Context, ids []token.ID) (minutes []int64, err error) {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	var changes []backend.Change
	for _, id := range ids {
		pending := s.usage.pending(id)
		minutes = append(minutes, pending)
		written, revision, err := s.readUsage(ctx, id)
		if errors.Is(err, ErrCorrupt) {
			continue // or nobody's use would be written any more
		}
		if err != nil {
			return nil, err
		}
		if pending > written {
			value := binary.AppendUvarint(nil, uint64(pending))
			changes = append(changes, backend.Change{Key: usageKey(id), Value: value, Expect: revision})
		}
	}
	if len(changes) == 0 {
		return minutes, nil
	}
	err = s.backend.Apply(ctx, changes...)
	if err != nil && !errors.Is(err, backend.ErrConflict) { // that is a purge's; there will be another flush
		s.noteFailure(err)
		return nil, trouble("write usage", err)
	}
	return minutes, err
}

// forgetUsage removes what is written of the use of keys that are gone, however late it was
// written. If that fails, it stays until the next Purge, and does no harm.
func (s *Store) forgetUsage(ctx context.Context) {
	_, err := s.remove(ctx, []byte{usageSpace}, []byte{usageSpace + 1}, func(e backend.Entry) bool {
		if len(e.Key) != 1+len(token.ID{}) {
			return false
		}
		_, err := s.get(ctx, token.ID(e.Key[1:]))
		return errors.Is(err, ErrNotFound)
	})
	if err != nil {
		s.log.Warn("API key store could not remove when purged keys were last used", "error", err)
	}
}

// lastUsed returns when a key was last used: now if a context from Bind lives under the key, and
// otherwise the later of what is written and what is not yet.
func (s *Store) lastUsed(ctx context.Context, id token.ID) (time.Time, error) {
	s.usage.advance(time.Now())
	if s.fence.IsBound(id) { // first of all: the end of a context is noted before it is no longer bound
		return time.Unix(s.usage.minute.Load()*60, 0).UTC(), nil
	}
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
