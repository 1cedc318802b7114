package keystore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/sequencer"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// changeAttempts is how often a change starts again because another change of the same key was
// committed first. In one process, the changequeue.Queue keeps the number of attempts low. Writes
// of many keys can still come first. With several processes, Options.Timeout limits the attempts:
// see retries.
const changeAttempts = 16

// change reads a record, applies edit, and commits the result with the audit event, through the
// phases of the fence. change returns the new cachedKey once the change is in force. The caller
// sets the action and the reason of the event.
//
// edit may run several times, each time on a fresh record, and reports whether the record changed.
// If edit returns an error, change returns the error, and nothing is done. If the outcome of the
// write is unknown, the live contexts of the key end with unknownCause. Together with
// ErrNotEverywhere, change returns the new cachedKey too.
func (s *Store) change(
	ctx context.Context, id token.ID, event *record.Event, unknownCause error,
	edit func(*record.Record) (changed bool, err error),
) (*cachedKey, error) {
	return s.changeKey(ctx, id, event, unknownCause, func(kr *keyRecord) (bool, error) {
		return edit(kr.record)
	})
}

// changeKey is change for an edit that needs more than the record. The edit may set kr.balance.
func (s *Store) changeKey(
	ctx context.Context, id token.ID, event *record.Event, unknownCause error,
	edit func(*keyRecord) (changed bool, err error),
) (*cachedKey, error) {
	ctx, cancel, actor, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	defer s.counts.took[event.Action].since(time.Now())
	event.Actor = actor
	e, err := s.changeHere(ctx, id, event, unknownCause, edit)
	if err == nil && event.Action != record.Action_ACTION_REHASH { // the old digest still matches
		err = s.barrier(ctx, string(actions[event.Action]))
	}
	return e, err
}

// beginChange returns the actor of a change, and the context of the change, which ends after
// Options.Timeout. beginChange returns an error if the store does not take a change now, or if the
// actor cannot be stored.
func (s *Store) beginChange(ctx context.Context) (
	_ context.Context, cancel context.CancelFunc, actor string, err error,
) {
	if err := s.ready(ctx); err != nil {
		return nil, nil, "", err
	}
	if actor, err = actorOf(ctx); err != nil {
		return nil, nil, "", err
	}
	ctx, cancel = s.limited(ctx)
	return ctx, cancel, actor, nil
}

// changeHere is change up to the moment when the change is in force in this process. The caller has
// set the actor of the event and the timeout of ctx.
func (s *Store) changeHere(
	ctx context.Context, id token.ID, event *record.Event, unknownCause error,
	edit func(*keyRecord) (changed bool, err error),
) (*cachedKey, error) {
	e, w, err := s.changeInTurn(ctx, id, event, unknownCause, edit)
	switch {
	case w != nil:
		w.waitPublished()
	case err == nil:
		// The writer of the present state may not have reached phase C yet. change must not return
		// before the account and the bindings are notified of the state, so change notifies them
		// too.
		s.accounts.note(e)
		s.fence.Notify(id, e)
	}
	if err != nil {
		return nil, err
	}
	return e, nil
}

// cut ends the sessions of a key, and holds the leased credits until the record is read again. So a
// revocation with an unknown outcome fails closed.
func (s *Store) cut(id token.ID, cause error) {
	if a := s.accounts.find(id); a != nil {
		a.hold()
	}
	s.fence.Cut(id, cause)
}

// notifyUnlessEnded is for a call that leaves a key as the key is, and that may have read many
// keys. As in changeHere, the writer of the present state may not have reached phase C yet, so
// notifyUnlessEnded notifies the account and the bindings of the key.
func (s *Store) notifyUnlessEnded(kr *keyRecord) {
	if a := s.accounts.find(kr.id); a != nil {
		a.noteKey(kr.cached())
	}
	s.fence.NotifyUnlessEnded(kr.id, kr.cached)
}

// changeInTurn does the part of change that other changes of the key wait for, up to the answer of
// the backend. The part after changeInTurn notifies observers. An observer may change the same key,
// so the turn has ended by then. Without a write, the key already is as edit wants it.
func (s *Store) changeInTurn(
	ctx context.Context, id token.ID, event *record.Event, unknownCause error,
	edit func(*keyRecord) (changed bool, err error),
) (*cachedKey, *write, error) {
	condition, err := conditionOf(ctx)
	if err != nil {
		return nil, nil, err
	}
	turn, err := s.queue.Acquire(ctx, id, restricts(event))
	if err != nil {
		return nil, nil, endOf(ctx)
	}
	defer turn.Release()
	for attempt := 0; ; attempt++ {
		kr, err := s.get(ctx, id)
		if errors.Is(err, ErrNotFound) {
			err = noKey(string(actions[event.Action]), id)
		}
		if err != nil {
			return nil, nil, err
		}
		if err := condition.check(string(actions[event.Action]), id, kr.revision); err != nil {
			return nil, nil, err
		}
		before := priorOf(kr)
		changed, err := edit(kr)
		if err != nil {
			return nil, nil, err
		}
		if !changed {
			return kr.cached(), nil, nil
		}
		kr.revision++
		p, err := s.prepareChange(ctx, before, kr, event)
		mended := false
		if err == nil && attempt > 0 {
			mended, err = s.mendOwners(ctx, p)
		}
		if err != nil {
			return nil, nil, err
		}
		lost := backend.ErrConflict
		yields := turn.MustYield()
		if !yields {
			w, err := s.begin(ctx, unknownCause, p)
			if err == nil {
				err = w.answer(ctx)
			}
			if !mayRetry(err) {
				if err == nil && mended {
					s.log.Warn("API key store has mended its damaged index", "id", id.String())
				}
				return p.key, w, err
			}
			if w != nil {
				w.waitPublished() // after a conflict, no observer is notified
			}
			lost = err
		}
		if err := turn.Retry(ctx); err != nil {
			return nil, nil, endOf(ctx)
		}
		if yields && s.processes != nil {
			continue // the change has lost no race against another process
		}
		if !s.retries(ctx, lost, attempt, restricts(event)) {
			return nil, nil, s.contention(ctx, "change", lost)
		}
	}
}

// changeAll makes the same change to several keys in one write, and returns the new values of
// the keys for which edit reported a change. See change for the rest. If another writer has
// changed one of the keys since the key was read, or if one of the keys is damaged, changeAll reads
// and changes the keys again, one by one. changeAll passes over damaged keys, and returns an error
// that wraps ErrCorrupt and names the damaged keys, with the new values of the other keys.
//
// again tells edit that the record was read again. edit changes the records of the batch in place,
// so the caller no longer uses these records.
func (s *Store) changeAll(
	ctx context.Context, batch []*keyRecord, event *record.Event, unknownCause error,
	edit func(kr *keyRecord, again bool) (bool, error),
) ([]*cachedKey, error) {
	changed, err := s.changeTogether(ctx, batch, event, unknownCause, edit)
	if !errors.Is(err, backend.ErrConflict) && !errors.Is(err, ErrCorrupt) {
		return changed, err
	}
	changed = nil
	var damaged []error
	for _, kr := range batch {
		was := false
		e, err := s.changeOne(ctx, kr.id, event, unknownCause,
			func(kr *keyRecord) (bool, error) {
				var err error
				was, err = edit(kr, true)
				return was, err
			})
		switch {
		case errors.Is(err, ErrCorrupt):
			damaged = append(damaged, err)
		case err != nil && !errors.Is(err, ErrNotFound):
			return changed, err
		case err == nil && was:
			changed = append(changed, e)
		}
	}
	return changed, errors.Join(damaged...)
}

// changeOne is change without the wait for other processes.
func (s *Store) changeOne(
	ctx context.Context, id token.ID, event *record.Event, unknownCause error,
	edit func(*keyRecord) (changed bool, err error),
) (*cachedKey, error) {
	ctx, cancel, actor, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	own := proto.CloneOf(event)
	own.Actor = actor
	return s.changeHere(ctx, id, own, unknownCause, edit)
}

func (s *Store) changeTogether(
	ctx context.Context, batch []*keyRecord, event *record.Event, unknownCause error,
	edit func(kr *keyRecord, again bool) (bool, error),
) ([]*cachedKey, error) {
	ctx, cancel, actor, err := s.beginChange(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	all := make([]*prepared, 0, len(batch))
	entries := make([]*cachedKey, 0, len(batch))
	for _, kr := range batch {
		before := priorOf(kr)
		changed, err := edit(kr, false)
		if err == nil && changed {
			kr.revision++
			own := &record.Event{Action: event.Action, Reason: event.Reason, Actor: actor}
			var p *prepared
			if p, err = s.prepareChange(ctx, before, kr, own); err == nil {
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
	err = s.commit(ctx, unknownCause, all...)
	if errors.Is(err, errNoMembership) {
		err = backend.ErrConflict // nothing was written: change the keys one by one, with patience
	}
	if err != nil {
		return nil, err
	}
	return entries, nil
}

// A prepared is a new state of a key and the event of the change, both not yet written.
type prepared struct {
	key       *cachedKey // what the key becomes
	event     *record.Event
	stamp     int64 // of the event; zero until assignStamp
	lastStamp int64 // of the event of the change before, or 0
	// the guard that the stamp was given under; nil until there is a stamp, or in one process
	guard        *backend.Change
	encodedEvent []byte
	indexesEvent bool // the change adds the event to the event index

	// The changes of the key's record, of its grave, and of its entries in the owner index.
	keyChanges []backend.Change
	space      [maxChanges]backend.Change // the memory of the changes of a write of one key
}

// maxChanges is the largest number of changes of a prepared, beside a balance: of the record, the
// grave, the event, and the indexes. A change of the owner takes two of the owner index, but none
// of the grave.
const maxChanges = 5

// A prior is the state of a key before a change.
type prior struct {
	revision uint64 // of the record; 0: there is no record
	owner    string // empty: the key has no owner, or there is no record
	// the stamp of the event of the last change; 0: not known
	lastStamp int64
	// the revision of the grave; 0: there is no grave, or the change writes no grave
	grave uint64
}

// priorOf returns the state of a key that has a record.
func priorOf(kr *keyRecord) prior {
	return prior{revision: kr.revision, owner: kr.record.GetOwner(),
		lastStamp: kr.record.GetLastStamp()}
}

// prepareChange is prepare for the change of a key that has a record.
func (s *Store) prepareChange(
	ctx context.Context, before prior, kr *keyRecord, event *record.Event,
) (*prepared, error) {
	if kr.purged() {
		grave, err := s.readGrave(ctx, kr.id)
		if err != nil {
			return nil, err
		}
		before.grave = grave.revision
		if grave.revision > 0 {
			kr.record.CreatedAt = 0 // of another store: no event of this store is meant
		}
	}
	return s.prepare(before, kr, event)
}

// prepare encodes a record at its new revision, and the event of the change.
func (s *Store) prepare(before prior, kr *keyRecord, event *record.Event) (*prepared, error) {
	kr.record.LastStamp = 0 // assignStamp sets the stamp
	value, err := record.Encode(kr.record)
	if err != nil {
		return nil, wrapErr("encode", err)
	}
	event.KeyId, event.Revision = kr.id[:], kr.revision
	encodedEvent, err := record.EncodeEvent(event)
	if err != nil {
		return nil, wrapErr("encode", err)
	}
	p := &prepared{key: kr.cached(), event: event, encodedEvent: encodedEvent,
		lastStamp: before.lastStamp}
	if s.isWrong(noLastStamp) {
		p.lastStamp = 0
	}
	p.indexesEvent = !p.creates()
	key := storageKey(kr.id)
	changes := p.space[:0]
	if kr.purged() {
		if before.revision > 0 {
			remove := backend.Change{Key: key, Expect: before.revision, Delete: true}
			changes = append(changes, remove)
		}
		changes = append(changes, backend.Change{
			Key: graveKey(kr.id), Value: value, Expect: before.grave, Revision: kr.revision,
		})
	} else {
		changes = append(changes, backend.Change{
			Key: key, Value: value, Expect: before.revision, Revision: kr.revision,
			Restricts: restricts(event),
		})
		if before.revision == 0 && !p.creates() { // a Restore or an Import: see graveyard.go
			changes = append(changes, backend.Change{Key: graveKey(kr.id), Expect: before.grave,
				Check: before.grave == 0 && event.Action == record.Action_ACTION_IMPORT})
		}
	}
	if kr.balance != nil {
		changes = append(changes, *kr.balance)
	}
	if s.isWrong(noGrave) {
		changes = slices.DeleteFunc(changes,
			func(c backend.Change) bool { return c.Key[0] == graveSpace })
	}
	p.keyChanges = appendOwnerChanges(changes, kr.id, before.owner, kr.record.Owner)
	return p, nil
}

// restricts reports whether a change stops its key. A restricting change goes before ordinary
// changes.
func restricts(event *record.Event) bool {
	return event.Action == record.Action_ACTION_REVOKE ||
		event.Action == record.Action_ACTION_DISABLE
}

// creates reports whether the key is new. No reader can have read or cached the ID of a new key,
// and the fence does not cache a miss. So a new key does not need the phases of the fence.
func (p *prepared) creates() bool { return p.event.Action == record.Action_ACTION_CREATE }

// assignStamp gives the event its place in the order of events. From then on, readers of events
// wait for the change, until sequencer.End. If there is a stamp already, assignStamp keeps the
// stamp.
//
// With several processes, the record keeps the stamp, so that the stamps of a key ascend although
// the clocks of the processes differ.
func (p *prepared) assignStamp(s *sequencer.Sequencer) {
	if p.stamp == 0 {
		adds := p.creates() || p.event.Action == record.Action_ACTION_RESTORE ||
			p.event.Action == record.Action_ACTION_IMPORT
		p.stamp = s.BeginAfter(p.lastStamp, adds)
	}
	if p.guard == nil {
		return
	}
	for i := range p.keyChanges {
		if c := &p.keyChanges[i]; c.Key[0] == keySpace && !c.Delete {
			c.Value = record.AppendLastStamp(c.Value, p.stamp)
		}
	}
}

// appendTo appends the changes of one write: of the key, of the event, and of the event index.
func (p *prepared) appendTo(changes []backend.Change) []backend.Change {
	changes = append(changes, p.keyChanges...)
	changes = append(changes, backend.Change{Key: eventKey(p.stamp), Value: p.encodedEvent})
	if p.indexesEvent {
		changes = append(changes, backend.Change{Key: eventIndexKey(p.key.ID, p.stamp)})
	}
	return changes
}

// size returns how many bytes of a write the changes take.
func (p *prepared) size() (n int) {
	var space [maxChanges]backend.Change
	for _, c := range p.appendTo(space[:0]) {
		n += len(c.Key) + len(c.Value)
	}
	return n + record.LastStampSize
}

// commit makes all of the changes or none, through the phases of the fence. commit returns when the
// changes are in force, or with an error. If the outcome is unknown, the live contexts of the keys
// end with unknownCause.
func (s *Store) commit(ctx context.Context, unknownCause error, all ...*prepared) error {
	w, err := s.begin(ctx, unknownCause, all...)
	if err != nil {
		return err
	}
	err = w.answer(ctx)
	w.waitPublished()
	return err
}

// A write is a group of changes on the way to the backend. A write cannot be withdrawn: it runs in
// a goroutine, and finishes even if the caller has left.
type write struct {
	store     *Store
	answers   chan error    // the answer of the backend
	answered  bool          // answer has received the answer
	published chan struct{} // closed when fence, logger and observer know of the outcome
}

// begin starts to write the changes, all or none. If the store is closing, begin returns ErrClosed
// and writes nothing.
func (s *Store) begin(ctx context.Context, unknownCause error, all ...*prepared) (*write, error) {
	guard := all[0].guard
	if all[0].stamp == 0 {
		var err error
		if guard, err = s.guard(); err != nil {
			return nil, err
		}
	}
	stamps := make([]int64, 0, len(all))
	for _, p := range all {
		p.guard = guard
		p.assignStamp(&s.sequencer)
		stamps = append(stamps, p.stamp)
	}
	if !s.enter() {
		s.endStamps(stamps...)
		return nil, ErrClosed
	}
	// The keyChanges of the first key lie in its space already, so the event follows them.
	changes := all[0].keyChanges[:0]
	if len(all) > 1 {
		changes = make([]backend.Change, 0, len(all)*maxChanges)
	}
	for _, p := range all {
		if !p.creates() {
			s.fence.Begin(p.key.ID)
		}
		changes = p.appendTo(changes)
	}
	if guard != nil {
		changes = append(changes, *guard)
	}
	w := &write{store: s, answers: make(chan error, 1), published: make(chan struct{})}
	go func() {
		defer s.writes.Done()
		// Deferred, because an Observer may end the goroutine, as FailNow of a test does.
		defer close(w.published)
		err := s.apply(ctx, changes)
		s.counts.noteWrite(err)
		// From publish on, observers are notified, and an observer may call the store. So
		// everything that the call of an observer could wait for ends first: the stamps here, and
		// the turn of the key when the answer arrives.
		mustResolve := guard != nil && outcomeUnknown(err)
		if !mustResolve {
			s.endStamps(stamps...)
		}
		w.answers <- err
		s.publish(err, unknownCause, all)
		if mustResolve {
			s.writes.Go(func() {
				if s.resolve(all[0]) {
					s.endStamps(stamps...)
				}
			})
		}
	}()
	return w, nil
}

// apply is Apply of the backend, for a write that nothing can withdraw. A write to a store of
// several processes has a timeout: the network may have lost the answer.
func (s *Store) apply(ctx context.Context, changes []backend.Change) error {
	ctx = context.WithoutCancel(ctx)
	if s.processes != nil {
		var cancel context.CancelFunc
		ctx, cancel = s.limitedWrite(ctx)
		defer cancel()
	}
	return s.backend.Apply(ctx, changes...)
}

// endStamps ends the stamps of changes whose outcome is certain.
func (s *Store) endStamps(stamps ...int64) {
	s.sequencer.End(stamps...)
	if s.processes != nil {
		s.processes.cluster.StampsMoved()
	}
}

// outcomeUnknown reports whether an error of Apply leaves the outcome unknown.
func outcomeUnknown(err error) bool {
	return err != nil && !errors.Is(err, backend.ErrConflict) &&
		!errors.Is(err, backend.ErrFull) && !errors.Is(err, backend.ErrTooLarge)
}

// enter reports whether a write may start. No write starts once the store is closing. After true,
// the caller calls s.writes.Done at the end of the write.
func (s *Store) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return false
	}
	s.writes.Add(1)
	return true
}

// answer waits for the answer of the backend, and returns the error of the write. If ctx ends
// first, answer returns an error, and the changes may still be made.
func (w *write) answer(ctx context.Context) (err error) {
	select {
	case err = <-w.answers:
	case <-ctx.Done():
		select {
		case err = <-w.answers:
		default:
			return fmt.Errorf("keystore: write: the outcome is not known: %w", endOf(ctx))
		}
	}
	w.answered = true
	if err == nil || errors.Is(err, backend.ErrConflict) {
		return err
	}
	w.store.noteFailure(err)
	w.store.log.Error("API key store could not write", "error", err)
	return wrapErr("write", err)
}

// waitPublished returns when the changes are in force and the observer was notified, however long
// the observer takes. If answer has not received the answer, waitPublished does not wait. The
// caller holds no turn, because the observer may change the same keys.
func (w *write) waitPublished() {
	if w.answered {
		<-w.published
	}
}

// publish ends the changes in the fence, and then announces the changes. err is the answer of the
// backend.
func (s *Store) publish(err, unknownCause error, all []*prepared) {
	for _, p := range all {
		if err == nil && !p.creates() {
			s.accounts.note(p.key)
		}
		switch {
		case p.creates():
		case err == nil:
			s.fence.End(p.key.ID, p.key)
		case !outcomeUnknown(err):
			s.fence.End(p.key.ID, nil) // nothing was changed
		default:
			// Without an End, the key stays out of the cache, and every use of the key reads the
			// store. The store does not know what the live contexts of the key still permit.
			s.cut(p.key.ID, unknownCause)
			if s.processes != nil {
				s.fence.End(p.key.ID, nil) // the feed delivers the change if the change was made
			}
		}
	}
	if err == nil {
		for _, p := range all {
			s.announce(p)
		}
	}
}

// announce counts and logs a change that was made, and reports the change to the observer. The
// caller calls announce after the phases of the fence, so that the observer finds the change in
// force.
func (s *Store) announce(p *prepared) {
	s.counts.changes[p.event.Action].Add(1)
	if s.observer == nil && !s.log.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	e := publicEvent(p.stamp, p.event)
	k := &p.key.key
	attrs := []any{
		"id", e.KeyID, "action", string(e.Action), "revision", e.Revision,
		"status", k.Status().String(), "actor", e.Actor,
		"name", escaped(k.Name, maxRecordSize), "owner", escaped(k.Owner, maxRecordSize),
	}
	if e.Reason != "" {
		attrs = append(attrs, "reason", e.Reason)
	}
	s.log.Info("API key changed", attrs...)
	if s.observer != nil {
		s.observer.Changed(e)
	}
}
