package keystore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An eventSweep removes the events that are older than the retention.
//
// The invariants:
//
//  1. Before a sweep removes events, the sweep writes the swept mark: a stamp that is greater than
//     the stamps of the events. The swept mark never decreases. So if an event with the stamp of
//     the mark or with a later stamp is missing, no sweep has removed the event: the event is lost.
//  2. A sweep removes an event in the same Apply as the entry of the event index that leads to the
//     event.
type eventSweep struct {
	store   *Store
	end     int64           // the sweep removes the events with an earlier stamp
	marked  bool            // the swept mark of the backend is not less than end
	damaged []backend.Entry // the events that cannot be read, and are still to be removed
}

// maxDamaged is how many damaged events a sweep removes at a time. For each maxDamaged events, the
// sweep reads the whole event index once.
const maxDamaged = 1024

var errManyDamaged = errors.New("the sweep has found maxDamaged events")

// sweptKey is the storage key of the swept mark.
var sweptKey = []byte{sweptSpace}

// sweepEvents removes the events that are older than the retention. A storage engine may keep a
// mark of each removed entry for some time. So a sweep does not read again the range of keys that
// an earlier sweep has emptied.
func (s *Store) sweepEvents(ctx context.Context) {
	if s.retention <= 0 {
		return
	}
	b := &s.background
	from := eventKey(0)
	if b.swept != nil {
		from = append(b.swept, 0) // the smallest key after swept
	}
	last, err := s.sweep(ctx, from, max(0, time.Now().Add(-s.retention).UnixNano()))
	if last != nil {
		b.swept = last
	}
	if err != nil {
		s.log.Warn("API key store could not remove old events, and will try again", "error", err)
	}
}

// sweep removes the events whose storage keys are not before from, and whose stamps are before end.
// The result is the storage key of the last removed event, or nil: a later sweep can begin after
// this storage key.
func (s *Store) sweep(ctx context.Context, from []byte, end int64) (last []byte, err error) {
	for {
		w := &eventSweep{store: s, end: end}
		removed, err := s.remove(ctx, from, eventKey(end), w.removal)
		if err != nil && err != errManyDamaged {
			return last, err
		}
		if err := w.removeDamaged(ctx); err != nil {
			return last, err
		}
		if removed != nil {
			last = removed
			from = append(slices.Clone(removed), 0)
		}
		if err == nil {
			return last, nil
		}
	}
}

// removal returns the changes that remove an event and its entry in the event index. The event of a
// creation may have no entry. A damaged event does not name its key, and waits for removeDamaged.
func (w *eventSweep) removal(ctx context.Context, e backend.Entry) ([]backend.Change, error) {
	if !w.marked {
		if err := w.store.markSwept(ctx, w.end); err != nil {
			return nil, err
		}
		w.marked = true
	}
	changes := []backend.Change{{Key: e.Key, Expect: e.Revision, Delete: true}}
	event, err := parseEvent(e)
	if err != nil {
		if w.damaged = append(w.damaged, e); len(w.damaged) == maxDamaged {
			return nil, errManyDamaged
		}
		return nil, nil
	}
	ctx, cancel := w.store.limitedRead(ctx)
	defer cancel()
	index, err := w.store.backend.Get(ctx, eventIndexKey(token.ID(event.KeyId), stampOf(e.Key)))
	if err == nil {
		changes = append(changes, backend.Change{Key: index.Key, Expect: index.Revision,
			Delete: true})
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, w.store.scanError(ctx, "remove", err)
	}
	return changes, nil
}

// removeDamaged removes the damaged events. No two events of a store have the same stamp. So the
// stamp alone tells which entry of the event index leads to a damaged event.
func (w *eventSweep) removeDamaged(ctx context.Context) error {
	if len(w.damaged) == 0 {
		return nil
	}
	s := w.store
	removals := make(map[string][]backend.Change) // by the storage key of the event
	for _, e := range w.damaged {
		removals[string(e.Key)] = []backend.Change{{Key: e.Key, Expect: e.Revision, Delete: true}}
	}
	from, to := spaceOf(eventIndexSpace)
	for index, err := range s.backend.Scan(ctx, from, to) {
		if err != nil {
			return s.scanError(ctx, "remove", err)
		}
		_, stamp, err := parseEventIndexKey(index)
		if err != nil {
			continue // CheckIntegrity reports the damage
		}
		event := string(eventKey(stamp))
		if changes, ok := removals[event]; ok {
			removals[event] = append(changes, backend.Change{Key: index.Key,
				Expect: index.Revision, Delete: true})
		}
	}
	var batch []backend.Change
	for _, e := range w.damaged {
		changes := removals[string(e.Key)]
		if len(batch)+len(changes) > backend.MaxChanges {
			if err := s.applyRemovals(ctx, batch); err != nil {
				return err
			}
			batch = nil
		}
		batch = append(batch, changes...)
	}
	return s.applyRemovals(ctx, batch)
}

// applyRemovals makes the changes of a batch that remove entries.
func (s *Store) applyRemovals(ctx context.Context, batch []backend.Change) error {
	ctx, cancel := s.limited(ctx)
	defer cancel()
	if err := s.backend.Apply(ctx, batch...); err != nil {
		s.noteFailure(err)
		return wrapErr("remove", err)
	}
	return nil
}

// markSwept raises the swept mark to stamp.
func (s *Store) markSwept(ctx context.Context, stamp int64) error {
	for range changeAttempts {
		have, revision, err := s.sweptMark(ctx)
		if errors.Is(err, ErrCorrupt) {
			have, err = 0, nil
			stamp = max(stamp, time.Now().UnixNano()) // not less than the lost mark
		}
		if err != nil || have >= stamp {
			return err
		}
		value := binary.BigEndian.AppendUint64(nil, uint64(stamp))
		change := backend.Change{Key: sweptKey, Value: value, Expect: revision}
		if err := s.applyRemovals(ctx, []backend.Change{change}); !errors.Is(err,
			backend.ErrConflict) {
			return err
		}
	}
	return wrapErr("remove", errors.New("too much contention on the swept mark"))
}

// sweptMark reads the swept mark, and the revision of its entry. Both are 0 if there is no mark.
func (s *Store) sweptMark(ctx context.Context) (stamp int64, revision uint64, err error) {
	ctx, cancel := s.limitedRead(ctx)
	defer cancel()
	e, err := s.backend.Get(ctx, sweptKey)
	if errors.Is(err, backend.ErrNotFound) {
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, s.scanError(ctx, "read the swept mark", err)
	}
	stamp, err = parseSwept(e)
	return stamp, e.Revision, err
}

func parseSwept(e backend.Entry) (stamp int64, err error) {
	if string(e.Key) == string(sweptKey) && len(e.Value) == 8 {
		stamp = int64(binary.BigEndian.Uint64(e.Value))
	}
	if stamp <= 0 {
		return 0, fmt.Errorf("%w: the storage key %x does not hold the swept mark", ErrCorrupt,
			e.Key)
	}
	return stamp, nil
}
