package keystore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"google.golang.org/protobuf/proto"
)

// changeAttempts is how often a change starts again because another change of the same key was
// committed first. In one process, the changequeue.Queue keeps the number of attempts low. Writes of many
// keys, and other processes, can still come first.
const changeAttempts = 16

// change reads a record, applies edit, and commits the result with the audit event, through the
// phases of the fence. change returns the new cachedKey once the change is in force. The caller sets
// the action and the reason of the event.
//
// edit may run several times, each time on a fresh record, and reports whether the record changed.
// If edit returns an error, change returns the error, and nothing is done. If the outcome of the
// write is unknown, the live contexts of the key end with unknownCause.
func (s *Store) change(
	ctx context.Context, id token.ID, event *record.Event, unknownCause error,
	edit func(*record.Record) (changed bool, err error),
) (*cachedKey, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	condition, err := conditionOf(ctx)
	if err != nil {
		return nil, err
	}
	event.Actor = actor
	ctx, cancel := s.limited(ctx)
	defer cancel()
	turn, err := s.queue.Acquire(ctx, id, restricts(event))
	if err != nil {
		return nil, endOf(ctx)
	}
	defer turn.Release()
	for range changeAttempts {
		kr, err := s.get(ctx, id)
		if errors.Is(err, ErrNotFound) {
			err = noKey(string(actions[event.Action]), id)
		}
		if err != nil {
			return nil, err
		}
		if err := condition.check(string(actions[event.Action]), id, kr.revision); err != nil {
			return nil, err
		}
		changed, err := edit(kr.record)
		if err != nil {
			return nil, err
		}
		if !changed {
			turn.Release() // see commit
			// The writer of the present state may not have reached phase C yet. change must not return
			// before the bindings are notified of the state, so change notifies the bindings too.
			e := kr.cached()
			s.fence.Notify(id, e)
			return e, nil
		}
		kr.revision++
		p, err := s.prepare(kr, kr.revision-1, event)
		if err != nil {
			return nil, err
		}
		if !turn.MustYield() {
			err = s.commit(ctx, unknownCause, []*prepared{p}, turn.Release)
			if err == nil {
				return p.key, nil
			}
			if !errors.Is(err, backend.ErrConflict) {
				return nil, err
			}
		}
		if err := turn.Retry(ctx); err != nil {
			return nil, endOf(ctx)
		}
	}
	return nil, wrapErr("change", errors.New("others keep changing the key"))
}

// changeAll makes the same change to several keys in one write, and returns the new values of
// the keys for which edit reported a change. See change for the rest. If another writer has
// changed one of the keys since the key was read, changeAll reads and changes the keys again, one
// by one.
func (s *Store) changeAll(
	ctx context.Context, batch []*keyRecord, event *record.Event, unknownCause error, edit func(*keyRecord) (bool, error),
) ([]*cachedKey, error) {
	changed, err := s.changeTogether(ctx, batch, event, unknownCause, edit)
	if !errors.Is(err, backend.ErrConflict) {
		return changed, err
	}
	changed = nil
	for _, kr := range batch {
		was := false
		e, err := s.change(ctx, kr.id, proto.CloneOf(event), unknownCause, func(r *record.Record) (bool, error) {
			var err error
			was, err = edit(&keyRecord{id: kr.id, record: r})
			return was, err
		})
		if err != nil && !errors.Is(err, ErrNotFound) {
			return changed, err
		}
		if err == nil && was {
			changed = append(changed, e)
		}
	}
	return changed, nil
}

func (s *Store) changeTogether(
	ctx context.Context, batch []*keyRecord, event *record.Event, unknownCause error, edit func(*keyRecord) (bool, error),
) ([]*cachedKey, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	var all []*prepared
	var entries []*cachedKey
	for _, kr := range batch {
		kr := &keyRecord{id: kr.id, record: proto.CloneOf(kr.record), revision: kr.revision + 1}
		changed, err := edit(kr)
		if err == nil && changed {
			own := proto.CloneOf(event)
			own.Actor = actor
			var p *prepared
			if p, err = s.prepare(kr, kr.revision-1, own); err == nil {
				all = append(all, p)
				entries = append(entries, p.key)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	if err := s.commit(ctx, unknownCause, all, nil); err != nil {
		return nil, err
	}
	return entries, nil
}

// A prepared is a new state of a key and the event of the change, both not yet written.
type prepared struct {
	key     *cachedKey // what the key becomes
	stamp   int64      // of the event; zero until assignStamp
	event   *record.Event
	changes []backend.Change // of the record, of the event, and others of the same write
}

// prepare encodes a record at its new revision, and the event of the change. expect is the revision
// of the key before the change.
func (s *Store) prepare(kr *keyRecord, expect uint64, event *record.Event) (*prepared, error) {
	value, err := record.Encode(kr.record)
	if err != nil {
		return nil, wrapErr("encode", err)
	}
	event.KeyId, event.Revision = kr.id[:], kr.revision
	encodedEvent, err := record.EncodeEvent(event)
	if err != nil {
		return nil, wrapErr("encode", err)
	}
	return &prepared{
		key:   kr.cached(),
		event: event,
		changes: []backend.Change{
			{Key: storageKey(kr.id), Value: value, Expect: expect, Revision: kr.revision, Restricts: restricts(event)},
			{Key: eventKey(0), Value: encodedEvent}, // assignStamp replaces the Key
		},
	}, nil
}

// restricts reports whether a change stops its key. A restricting change goes before ordinary
// changes.
func restricts(event *record.Event) bool {
	return event.Action == record.Action_ACTION_REVOKE || event.Action == record.Action_ACTION_DISABLE
}

// size returns how many bytes of an Apply the changes take.
func (p *prepared) size() (n int) {
	for _, c := range p.changes {
		n += len(c.Key) + len(c.Value)
	}
	return n
}

// assignStamp gives the event its place in the order. The caller must call sequencer.End as soon as the
// store knows whether the changes were made: readers of events wait for sequencer.End.
func (p *prepared) assignStamp(stamp int64) {
	p.stamp = stamp
	p.changes[1].Key = eventKey(stamp)
}

// commit makes all of the changes or none, through the phases of the fence. If over is not nil,
// commit calls over once no attempt is left to make: after every outcome except a conflict.
func (s *Store) commit(ctx context.Context, unknownCause error, all []*prepared, over func()) error {
	var changes []backend.Change
	var stamps []int64
	for _, p := range all {
		p.assignStamp(s.sequencer.Begin(p.event.Action == record.Action_ACTION_RESTORE))
		stamps = append(stamps, p.stamp)
		s.fence.Begin(p.key.ID)
		changes = append(changes, p.changes...)
	}
	return s.apply(ctx, changes, func(err error) {
		// From here on, observers are notified, and an observer may call the store. So everything
		// that the call of an observer could wait for ends first.
		s.sequencer.End(stamps...)
		if over != nil && !errors.Is(err, backend.ErrConflict) {
			over()
		}
		for _, p := range all {
			switch {
			case err == nil:
				s.fence.End(p.key.ID, p.key)
			case errors.Is(err, backend.ErrConflict), errors.Is(err, backend.ErrFull), errors.Is(err, backend.ErrTooLarge):
				s.fence.End(p.key.ID, nil) // nothing was changed
			default:
				// Without an End, the key stays out of the cache, and every use of the key reads the
				// store. The store does not know what the live contexts of the key still permit.
				s.fence.Cut(p.key.ID, unknownCause)
			}
		}
		for _, p := range all {
			s.announce(p, err)
		}
	})
}

// apply passes one change to the backend, and returns when the change is durable or ctx is done,
// whichever is first. A change cannot be withdrawn, so the write runs in its own goroutine and
// finishes even if ctx ends. The goroutine calls onDone with the outcome, exactly once, before
// apply returns the outcome.
//
// If ctx ends before the backend has answered, apply returns an error, and the change may still
// happen. Once the backend has answered, the outcome is known, and apply waits for onDone, however
// long onDone takes. If the store is closing, apply calls onDone with ErrClosed and writes nothing.
func (s *Store) apply(ctx context.Context, c []backend.Change, onDone func(error)) error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		onDone(ErrClosed)
		return ErrClosed
	}
	var known atomic.Bool
	done := make(chan error, 1)
	s.changes.Go(func() {
		var err error
		// Deferred, because an Observer may end the goroutine, as FailNow of a test does.
		defer func() { done <- err }()
		err = s.backend.Apply(context.WithoutCancel(ctx), c...)
		known.Store(true)
		onDone(err)
	})
	s.mu.Unlock()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		if !known.Load() {
			return fmt.Errorf("keystore: write: the outcome is not known: %w", endOf(ctx))
		}
		err = <-done
	}
	if err == nil || errors.Is(err, backend.ErrConflict) {
		return err
	}
	s.noteFailure(err)
	s.log.Error("API key store could not write", "error", err)
	return wrapErr("write", err)
}

// announce logs a change, and reports the change to the observer, if the change was made. The
// caller calls announce after the phases of the fence, so that the observer finds the change in
// force.
func (s *Store) announce(p *prepared, err error) {
	if err != nil || s.observer == nil && !s.log.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	e := publicEvent(eventKey(p.stamp), p.event)
	k := &p.key.key
	attrs := []any{
		"id", e.KeyID, "action", string(e.Action), "revision", e.Revision, "status", k.Status().String(),
		"actor", e.Actor, "name", escaped(k.Name, maxRecordSize), "owner", escaped(k.Owner, maxRecordSize),
	}
	if e.Reason != "" {
		attrs = append(attrs, "reason", e.Reason)
	}
	s.log.Info("API key changed", attrs...)
	if s.observer != nil {
		s.observer.Changed(e)
	}
}
