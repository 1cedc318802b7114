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

// A usage collects the last use of each key in memory. The background writes the uses to the
// backend later.
//
// The verify path notes the first use of a key in each minute. For every other use, the verify path
// only compares two words of memory. The last uses have a separate key space, with one entry for
// each key. So a write of a last use never touches the record of the key, and cannot undo a
// concurrent change.
//
// The invariants:
//
//  1. Every use at or after since is known: the minute of the use, or a later minute, is in used,
//     in writing or in the backend, or the key has a live context. The minute of a use may be one
//     too early, if minute was moved late.
//  2. used and writing together hold every key that was noted in the current minute, written or
//     not. So if minute moves by more than one, advance can correct the keys that may have been
//     used in between.
//  3. The backend records the uses as complete only while no store is open, and only if every use
//     has been written. So after a crash, since is the time of the next Open.
//
// If several processes have the store open, each process collects its own uses, and invariant 1
// holds for these uses. The uses of other processes are known once written, within two minutes. The
// state in the backend has the latest since of all processes: see syncUsage. A process that removes
// a dead process moves since, because the unwritten uses of the dead process are lost.
type usage struct {
	minute atomic.Int64 // the current minute, counted from the Unix epoch; advance moves minute

	mu sync.Mutex // guards all fields below; not held during a call of the backend

	// used holds the last minute of each key used since the last flush, or in the current minute.
	used    map[token.ID]int64
	writing map[token.ID]int64 // the minutes that a flush has taken and not yet finished
	most    int                // the maximum number of keys in used and writing together
	since   time.Time          // some uses before since may be unknown
	closed  bool               // uses are no longer noted

	// flushing has an element while a flush runs: see beginFlush. So flushes run one at a time. A
	// flush waits for the backend, so flushing is no Mutex: a caller stops to wait when its context
	// ends. flushing guards all fields below.
	flushing chan struct{}
	marked   bool   // the backend records that a store is open
	revision uint64 // the revision of the storeState in the backend; valid only if marked
	// the dead processes that this process has removed, and whose lost uses since covers
	evictions uint64
	written   bool // Close has written all uses
	reported  bool // the log has the error that another Store has the backend open
}

// maxUsed is the maximum number of keys in a usage. The use of a further key moves since.
const maxUsed = 1 << 20

func minuteOf(t time.Time) int64 { return t.Unix() / 60 }

// markOf returns the mark of a minute. A mark is never 0, so memory that is not set holds no mark,
// whatever the clock says. The marks of two minutes differ, unless the minutes are 4000 years
// apart.
func markOf(minute int64) uint32 { return uint32(minute)<<1 | 1 }

// mark returns the mark of the current minute. The compiler inlines mark.
func (u *usage) mark() uint32 { return markOf(u.minute.Load()) }

// due reports whether this use of a key has to be noted.
func (u *usage) due(recorded *atomic.Uint32) bool { return recorded.Load() != u.mark() }

// note records the use of a key, and sets recorded to the mark of the minute. The result is false
// if the store is closed and the use is too late to be recorded.
func (u *usage) note(id token.ID, recorded *atomic.Uint32) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return false
	}
	minute := u.minute.Load()
	if u.noteLocked(id, minute) {
		recorded.Store(markOf(minute))
	}
	return true
}

func (u *usage) noteLocked(id token.ID, minute int64) bool {
	last, ok := u.used[id]
	if !ok && len(u.used)+len(u.writing) >= u.most {
		u.since = time.Now() // the use is not recorded
		return false
	}
	u.used[id] = max(last, minute)
	return true
}

// advance sets minute to the current minute. advance may run late, because the machine slept or the
// clock was set. Then a key that was noted in the previous value of minute may have been used until
// now, and counts as used now.
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

// lose records that some uses until now may be unknown.
func (u *usage) lose() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.since = time.Now()
}

// loseUses records that some uses until now may be unknown, in all processes.
func (s *Store) loseUses(ctx context.Context) error {
	s.usage.lose()
	if s.processes == nil {
		return nil
	}
	return s.syncUsage(ctx)
}

// forget drops the unwritten uses of keys that are gone.
func (u *usage) forget(gone []*cachedKey) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, e := range gone {
		delete(u.used, e.ID)
		delete(u.writing, e.ID)
	}
}

// unused reports whether a key has not been used since the time since. last is the last use of the
// key, as returned by lastUsed. The error is ErrInvalid if the answer is unknown.
func (u *usage) unused(since, last time.Time) (bool, error) {
	if !last.Before(since.Truncate(time.Minute).Add(-time.Minute)) {
		return false, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if since.Before(u.since) {
		return false, invalid("Query.UnusedSince %s is too early: the store does not know "+
			"of every "+
			"use before %s, because the process ended without Close, keys were restored, or very "+
			"many keys were used at the same time",
			since.UTC().Format(time.RFC3339), u.since.UTC().Format(time.RFC3339))
	}
	return true, nil
}

// pending returns the last minute of a key that is not written yet, or 0.
func (u *usage) pending(id token.ID) int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return max(u.used[id], u.writing[id])
}

// beginFlush waits until no other flush runs. After nil, the caller calls endFlush. If ctx ends
// first, beginFlush returns the error of ctx.
func (u *usage) beginFlush(ctx context.Context) error {
	select {
	case u.flushing <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (u *usage) endFlush() { <-u.flushing }

// flushUsage writes the collected uses. Uses that cannot be written are kept for the next flush.
func (s *Store) flushUsage(ctx context.Context) error {
	u := &s.usage
	if err := u.beginFlush(ctx); err != nil {
		return err
	}
	defer u.endFlush()
	switch {
	case s.processes != nil:
		if err := s.syncUsageLocked(ctx); err != nil {
			return err
		}
	case !u.marked:
		_ = s.markUsage(ctx, false) // Open has failed to write the mark, and has logged a warning
	default:
		s.checkAlone(ctx)
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
		// Another process has written a use of one of the keys since writeUsage has read the uses.
		for range usageAttempts {
			if s.processes == nil || !errors.Is(err, backend.ErrConflict) {
				break
			}
			written, err = s.writeUsage(ctx, batch)
		}
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

// usageAttempts is how often a flush writes a batch again after a conflict with another process.
const usageAttempts = 3

// resumeUsage reads the time since when all uses are known, and marks the store as open.
func (s *Store) resumeUsage() {
	ctx, cancel := s.limited(context.Background())
	defer cancel()
	u := &s.usage
	now := time.Now()
	u.minute.Store(minuteOf(now))
	u.since = now
	// The other processes know of every use since the time in the state.
	others := s.processes != nil && s.processes.cluster.Stats().Processes > 1
	if e, err := s.backend.Get(ctx, stateKey); err == nil {
		state, err := parseState(e)
		if err == nil && (state.complete || others) && state.since.Before(now) {
			u.since = state.since
		}
	}
	mark := func() error { return s.markUsage(ctx, false) }
	if s.processes != nil {
		mark = func() error { return s.syncUsage(ctx) }
	}
	if err := mark(); err != nil {
		s.log.Warn("API key store could not write that it is open, and will try again: "+
			"after a crash until then, uses may be missing", "error", err)
	}
}

// markUsage writes the storeState to the backend. complete means that every use since usage.since
// has been written, and that no store is open.
func (s *Store) markUsage(ctx context.Context, complete bool) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	u := &s.usage
	if !u.marked {
		e, err := s.backend.Get(ctx, stateKey)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			s.noteFailure(err)
			return wrapErr("read usage", err)
		}
		u.revision = e.Revision
	}
	u.mu.Lock()
	value := storeState{u.since, complete, completeIndexes(s.indexedSince)}.encode()
	u.mu.Unlock()
	// Restricts is set because without the mark a later RevokeAll could revoke keys that are in
	// use. A conflict means that another store has the backend open.
	err := s.backend.Apply(ctx, backend.Change{Key: stateKey, Value: value, Expect: u.revision,
		Restricts: true})
	if errors.Is(err, backend.ErrConflict) {
		s.reportSecondStore()
	}
	if err != nil {
		s.noteFailure(err)
		return wrapErr("write usage", err)
	}
	u.marked = true
	u.revision++
	return nil
}

// closeUsage writes all remaining uses, and then marks the uses as complete.
func (s *Store) closeUsage() error {
	u := &s.usage
	u.mu.Lock()
	u.closed = true
	u.mu.Unlock()
	if err := s.flushUsage(context.Background()); err != nil {
		return err
	}
	_ = u.beginFlush(context.Background()) // the context does not end
	defer u.endFlush()
	u.written = true
	if s.processes != nil {
		return nil // leaveProcesses marks the uses as complete
	}
	return s.markUsage(context.Background(), true)
}

// checkAlone reports if another Store has the backend open although the backend is not a Feeder.
// Nothing can lock such a backend, but the other Store has changed the state of the store. The
// store's own directory has a lock.
func (s *Store) checkAlone(ctx context.Context) {
	u := &s.usage
	if s.readsUninterruptible || u.reported || s.serving() != nil {
		return
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	if e, err := s.backend.Get(ctx, stateKey); err == nil && e.Revision != u.revision {
		s.reportSecondStore()
	}
}

// reportSecondStore logs, once, that another Store has the backend open.
func (s *Store) reportSecondStore() {
	u := &s.usage
	if s.processes != nil || u.reported {
		return
	}
	u.reported = true
	s.log.Error("another Store has opened the backend of this API key store: a key that is revoked " +
		"in one Store stays valid in the other; close one of the two, and use a backend that is a " +
		"backend.Feeder for a store of several processes")
}

// syncUsage makes usage.since and the since in the backend the later of the two, and marks the
// store as open. In a store of several processes, syncUsage replaces markUsage.
func (s *Store) syncUsage(ctx context.Context) error {
	if err := s.usage.beginFlush(ctx); err != nil {
		return err
	}
	defer s.usage.endFlush()
	return s.syncUsageLocked(ctx)
}

func (s *Store) syncUsageLocked(ctx context.Context) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	u := &s.usage
	for range changeAttempts {
		if evictions := s.processes.cluster.Stats().Evictions; evictions > u.evictions {
			u.evictions = evictions
			u.lose()
		}
		e, state, err := s.readState(ctx)
		if err != nil {
			return err
		}
		if state.index.version == indexVersion && state.index.phase != phaseDone {
			return nil // another process builds the indexes: the state is the state of its work
		}
		u.mu.Lock()
		if state.since.After(u.since) {
			u.since = state.since
		}
		want := storeState{u.since, false, completeIndexes(s.indexedSince)}
		u.mu.Unlock()
		if state.index.version == indexVersion {
			want.index = state.index
		}
		if e.Revision > 0 && string(want.encode()) == string(e.Value) {
			return nil
		}
		err = s.backend.Apply(ctx, backend.Change{Key: stateKey, Value: want.encode(),
			Expect: e.Revision, Restricts: true})
		if errors.Is(err, backend.ErrConflict) {
			continue // another process was first
		}
		if err != nil {
			return wrapErr("write usage", err)
		}
		return nil
	}
	return wrapErr("write usage", errors.New("too much contention on the state of the store"))
}

// readState reads the storeState. If there is no state, or the state is damaged, the result is the
// zero storeState, with the revision of the entry.
func (s *Store) readState(ctx context.Context) (backend.Entry, storeState, error) {
	e, err := s.backend.Get(ctx, stateKey)
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		s.noteFailure(err)
		return backend.Entry{}, storeState{}, wrapErr("read usage", err)
	}
	state, err := parseState(e)
	if err != nil {
		state = storeState{}
	}
	return e, state, nil
}

// completeUsage marks the uses as complete, if no process has the store open any more. The caller
// has left the other processes, after the last flush. Each process that joins writes the header of
// the membership table. So if the header has not changed since before the table was empty, no
// process has joined since.
func (s *Store) completeUsage(ctx context.Context) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	u := &s.usage
	if err := u.beginFlush(ctx); err != nil {
		return endOf(ctx)
	}
	written := u.written
	lost := !written || s.processes.cluster.Stats().Evictions > u.evictions
	u.endFlush()
	if !written {
		u.lose()
	}
	if lost {
		if err := s.syncUsage(ctx); err != nil {
			return err
		}
	}
	e, state, err := s.readState(ctx)
	if err != nil || state.complete || state.index.phase != phaseDone {
		return err
	}
	if !written {
		return nil
	}
	header, err := s.backend.Get(ctx, []byte{memberSpace})
	if err != nil {
		return wrapErr("read usage", err)
	}
	from, to := spaceOf(memberSpace)
	for e, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return s.scanError(ctx, "read usage", err)
		}
		if len(e.Key) > len(header.Key) {
			return nil // another process has the store open
		}
	}
	state.complete = true
	err = s.backend.Apply(ctx,
		backend.Change{Key: stateKey, Value: state.encode(), Expect: e.Revision, Restricts: true},
		backend.Change{Key: header.Key, Expect: header.Revision, Check: true})
	if err != nil && !errors.Is(err, backend.ErrConflict) {
		return wrapErr("write usage", err)
	}
	return nil
}

// writeUsage writes the pending minutes of keys, and returns the pending minutes.
func (s *Store) writeUsage(ctx context.Context, ids []token.ID) (minutes []int64, err error) {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	var changes []backend.Change
	for _, id := range ids {
		pending := s.usage.pending(id)
		minutes = append(minutes, pending)
		written, revision, err := s.readUsage(ctx, id)
		if errors.Is(err, ErrCorrupt) {
			continue // a corrupt entry must not prevent the writes for other keys
		}
		if err != nil {
			return nil, err
		}
		if pending > written {
			value := binary.AppendUvarint(nil, uint64(pending))
			changes = append(changes, backend.Change{Key: usageKey(id), Value: value,
				Expect: revision})
		}
	}
	if len(changes) == 0 {
		return minutes, nil
	}
	err = s.backend.Apply(ctx, changes...)
	s.counts.noteWrite(err)
	// A purge causes ErrConflict. The next flush writes the minutes again.
	if err != nil && !errors.Is(err, backend.ErrConflict) {
		s.noteFailure(err)
		return nil, wrapErr("write usage", err)
	}
	return minutes, err
}

// forgetGone removes the written last uses and the balances of keys that are gone, including last
// uses that were written late. After a failure, the entries stay until the next Purge, and do no
// harm.
func (s *Store) forgetGone(ctx context.Context) {
	for _, space := range []byte{creditSpace, usageSpace} {
		if err := s.forgetSpace(ctx, space); err != nil {
			s.log.Warn("API key store could not remove what it knows of the uses of purged keys",
				"error", err)
		}
	}
}

func (s *Store) forgetSpace(ctx context.Context, space byte) error {
	from, to := spaceOf(space)
	_, err := s.remove(ctx, from, to, func(ctx context.Context, e backend.Entry) ([]backend.Change,
		error) {
		if len(e.Key) != 1+len(token.ID{}) {
			return nil, nil
		}
		if _, err := s.get(ctx, token.ID(e.Key[1:])); !errors.Is(err, ErrNotFound) {
			return nil, nil
		}
		return []backend.Change{{Key: e.Key, Expect: e.Revision, Delete: true}}, nil
	})
	return err
}

// lastUsed returns when a key was last used. If the key has a live context from Bind, the result is
// now. Otherwise the result is the later of the written minute and the pending minute.
func (s *Store) lastUsed(ctx context.Context, id token.ID) (time.Time, error) {
	s.usage.advance(time.Now())
	// recentUse must come before readUsage: a flush in between moves the minute to the backend.
	recent := s.recentUse(id)
	if recent.bound {
		return recent.last(0), nil
	}
	minute, _, err := s.readUsage(ctx, id)
	if err != nil {
		return time.Time{}, err
	}
	return recent.last(minute), nil
}

// lastUsedOf is lastUsed for a candidate.
func (s *Store) lastUsedOf(ctx context.Context, c candidate) (time.Time, error) {
	if c.use == nil {
		return s.lastUsed(ctx, c.id)
	}
	if c.use.recent.bound || c.use.written.Revision == 0 {
		return c.use.recent.last(0), nil
	}
	minute, err := parseUsage(c.use.written)
	if err != nil {
		return time.Time{}, err
	}
	return c.use.recent.last(minute), nil
}

// A keyUse is the last use of a key: what the store has not written yet, and then what the backend
// has. The Revision of written is 0 if the backend has no entry.
type keyUse struct {
	recent  recentUse
	written backend.Entry
}

// A recentUse is the last use of a key that is perhaps not written yet. The minute is 0 if there is
// none. bound means that the key has a live context from Bind, so that the key is in use now.
type recentUse struct {
	minute int64
	bound  bool
}

// recentUse returns the recentUse of a key. The caller has advanced the minute.
func (s *Store) recentUse(id token.ID) recentUse {
	// IsBound must come first: the end of a context is noted as a use before the context is
	// unbound.
	if s.fence.IsBound(id) {
		return recentUse{s.usage.minute.Load(), true}
	}
	return recentUse{s.usage.pending(id), false}
}

// last returns the time of the last use, if the backend has this minute. The time is zero if there
// was no use.
func (r recentUse) last(written int64) time.Time {
	minute := max(r.minute, written)
	if minute == 0 {
		return time.Time{}
	}
	return time.Unix(minute*60, 0).UTC()
}

// readUsage reads the written minute of a key and the revision of the entry. Both are 0 if the
// backend has no entry.
func (s *Store) readUsage(
	ctx context.Context, id token.ID,
) (minute int64, revision uint64, err error) {
	e, err := s.backend.Get(ctx, usageKey(id))
	if errors.Is(err, backend.ErrNotFound) {
		return 0, 0, nil
	}
	if err != nil {
		if ended := endOf(ctx); ended != nil {
			return 0, 0, ended
		}
		s.noteFailure(err)
		return 0, 0, wrapErr("read usage", err)
	}
	minute, err = parseUsage(e)
	return minute, e.Revision, err
}

func parseUsage(e backend.Entry) (minute int64, err error) {
	value, n := binary.Uvarint(e.Value)
	if len(e.Key) != 1+len(token.ID{}) || n <= 0 || n != len(e.Value) || value > maxMinute {
		return 0, fmt.Errorf("%w: the last use of the storage key %x is not a time", ErrCorrupt,
			e.Key)
	}
	return int64(value), nil
}

const maxMinute = 1 << 40 // no clock shows this minute, and time.Unix can represent the minute
