package keystore

import (
	"context"
	"errors"
	"iter"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// RevokeAllOptions are the settings of RevokeAll. Nil and the zero value are valid.
type RevokeAllOptions struct {
	// All says that every key is meant. A Query that selects every key, such as the zero Query,
	// gives ErrInvalid without All, and any other Query gives ErrInvalid with All. Query.Cursor and
	// Query.Limit make no difference to this.
	All bool
	// DryRun revokes nothing: Progress is told of the keys that would be. What RevokeAll refuses, a
	// dry run refuses too.
	DryRun bool
	// Progress is told of each key when it has been revoked, in the order of creation, with the
	// number of those so far; keys that were added meanwhile come last. A call that was broken off
	// is just made again: what is revoked is not looked at twice. Nil means nobody. A panic of
	// Progress passes through to the caller of RevokeAll, and ends the call as an error would.
	Progress func(k *Key, done int)
}

// RevokeAll revokes every key that the query selects and that is not revoked, many in one write,
// and returns how many those were. When it returns nil, none of the selection is admitted any more,
// and their live contexts have ended, as with Revoke. A Query that selects every key is refused,
// unless RevokeAllOptions.All says that all are meant: an Owner from a variable that was not set
// must not revoke every key.
//
// Each key is judged when its turn comes. One whose Create was under way when the call began is
// judged too, once that is over, and so is one that is created while the selection is read; one
// that is changed when its turn is over is not. For Query.UnusedSince, a key is judged once more
// just before it is revoked, and stays if it was used meanwhile.
//
// ErrInvalid means that nothing was done. After any other error, those keys are revoked that Progress was told of, and
// perhaps some more; call it again, and it goes on with those that are not. A key that cannot be judged, because what is
// stored of it is damaged, does not stop it: its live contexts end, and ErrCorrupt is returned at the end. Only where
// storage cannot read on behind what is damaged, the keys there are not revoked, and the text of ErrCorrupt says so.
func (s *Store) RevokeAll(ctx context.Context, q Query, reason string, opts *RevokeAllOptions) (int, error) {
	reason = escaped(reason, maxReason)
	if err := checkReason(reason); err != nil {
		return 0, err
	}
	if _, err := actorOf(ctx); err != nil {
		return 0, err
	}
	if opts == nil {
		opts = new(RevokeAllOptions)
	}
	if all := q.selectsAll(); all && !opts.All {
		return 0, invalid("the Query selects every key: set RevokeAllOptions.All if all are meant, " +
			"and otherwise a field of the Query")
	} else if !all && opts.All {
		return 0, invalid("RevokeAllOptions.All is set, but the Query selects some keys only: set one of them")
	}
	done := 0
	tell := func(k *Key) {
		done++
		if opts.Progress != nil {
			opts.Progress(k, done)
		}
	}
	if opts.DryRun {
		var corrupt error
		for batch, err := range s.batches(ctx, q, len(reason), q.wantsRevoked) {
			if errors.Is(err, ErrCorrupt) {
				corrupt = err
				continue
			}
			if err != nil {
				return done, err
			}
			for _, st := range batch {
				tell(&st.entry().key)
			}
		}
		return done, corrupt
	}
	_, over := s.journal.additions()
	failed, corrupt := s.revokeAll(ctx, q, reason, tell)
	if begun, _ := s.journal.additions(); failed == nil && begun != over && (q.Limit <= 0 || done < q.Limit) {
		// A key that was added meanwhile may stand before others that had been read already: its ID is older than itself.
		// It is there when what was under way is over, and found by reading once more.
		if _, failed = s.settled(ctx); failed == nil {
			q.Limit = max(0, q.Limit-done)
			failed, corrupt = s.revokeAll(ctx, q, reason, tell)
		}
	}
	return done, errors.Join(failed, corrupt)
}

// wantsRevoked reports whether RevokeAll has to revoke a key.
func (q *Query) wantsRevoked(st *stored) bool {
	return st.record.RevokedAt == 0 && q.selects(&st.entry().key)
}

// stillWanted is wantsRevoked for a key that was selected some time ago, and may have been used
// since.
func (s *Store) stillWanted(ctx context.Context, q *Query, st *stored) (bool, error) {
	if !q.wantsRevoked(st) || q.UnusedSince.IsZero() {
		return q.wantsRevoked(st), nil
	}
	last, err := s.lastUsed(ctx, st.id)
	if err != nil {
		return false, err
	}
	return s.usage.unused(q.UnusedSince, last)
}

// revokeAll reads the selection once, and revokes it. It returns the error that ended it, and that of what is damaged.
func (s *Store) revokeAll(ctx context.Context, q Query, reason string, tell func(*Key)) (failed, corrupt error) {
	cut := func(batch []*stored) {
		for _, st := range batch {
			s.fence.Cut(st.id, ErrRevoked)
		}
	}
	type write struct {
		revoked []*entry
		err     error
	}
	var writes []chan write // under way, in the order of creation
	finish := func() error {
		w := <-writes[0]
		writes = writes[1:]
		for _, e := range w.revoked {
			tell(&e.key)
		}
		return w.err
	}
	for batch, err := range s.batches(ctx, q, len(reason), q.wantsRevoked) {
		if errors.Is(err, ErrCorrupt) {
			corrupt = err
			cut(batch)
			continue
		}
		if err != nil {
			failed = err
			break
		}
		if len(writes) == maxWrites {
			if failed = finish(); failed != nil {
				cut(batch)
				break
			}
		}
		result := make(chan write, 1)
		writes = append(writes, result)
		go func() {
			event := &record.Event{Action: record.Action_ACTION_REVOKE, Reason: reason}
			revoked, err := s.changeAll(ctx, batch, event, ErrRevoked, func(st *stored) (bool, error) {
				if wanted, err := s.stillWanted(ctx, &q, st); err != nil || !wanted {
					return false, err
				}
				revoke(st.record, reason)
				return true, nil
			})
			if err != nil && !errors.Is(err, ErrInvalid) {
				cut(batch)
			}
			result <- write{revoked, err}
		}()
	}
	for len(writes) > 0 {
		if err := finish(); failed == nil {
			failed = err
		}
	}
	return failed, corrupt
}

// maxWrites is how many writes RevokeAll has under way at once, for the backend to commit together.
const maxWrites = 4

func revoke(r *record.Record, reason string) {
	r.Status = record.Status_STATUS_REVOKED
	r.RevokedAt, r.RevokeReason = toNanos(time.Now()), reason
}

// Purge removes the keys that were revoked, or had expired, before a moment in the past, and returns how many those
// were. Their events stay until Options.EventRetention. A few bytes of each key stay for good: they keep Restore from
// bringing it back to life.
//
// No other key is removed: not one that is only disabled, nor one whose expiry an Update moves while Purge runs. The
// errors are as those of RevokeAll.
func (s *Store) Purge(ctx context.Context, before time.Time) (int, error) {
	now := time.Now()
	if before.IsZero() || before.After(now) {
		return 0, invalid("the time before which keys must have died is zero or in the future: it has to be in the past")
	}
	dead := func(st *stored) bool {
		k := &st.entry().key
		return !k.RevokedAt.IsZero() && k.RevokedAt.Before(before) || !k.ExpiresAt.IsZero() && k.ExpiresAt.Before(before)
	}
	done := 0
	var corrupt error
	for batch, err := range s.batches(ctx, Query{}, 0, dead) {
		if errors.Is(err, ErrCorrupt) {
			corrupt = err
			continue
		}
		if err != nil {
			return done, err
		}
		event := &record.Event{Action: record.Action_ACTION_PURGE}
		purged, err := s.changeAll(ctx, batch, event, ErrRevoked, func(st *stored) (bool, error) {
			if !dead(st) {
				return false, nil
			}
			st.record.Reset()
			st.record.Status = record.Status_STATUS_PURGED
			st.record.PurgedAt = toNanos(now)
			return true, nil
		})
		done += len(purged)
		if err != nil {
			return done, err
		}
		s.usage.forget(purged)
	}
	s.forgetUsage(ctx)
	return done, corrupt
}

// maxBatch is how many keys are changed in one write: a record and an event each.
const maxBatch = backend.MaxChanges / 2

// sizeOf bounds what the change of a key takes of a write: its record and an event, with a text of so many bytes in each.
func sizeOf(st *stored, text int) int { return proto.Size(st.record) + 2*text + maxText + 256 }

// batches yields the keys of a selection that are wanted, in the order of creation, many at a time: as many as can be
// changed in one write, with a reason of so many bytes. An error comes with no keys and ends it, but for ErrCorrupt, which
// comes with the key whose record is damaged, if that is known.
func (s *Store) batches(ctx context.Context, q Query, reason int, wanted func(*stored) bool) iter.Seq2[[]*stored, error] {
	return func(yield func([]*stored, error) bool) {
		limit := q.Limit
		q.Limit = 0 // those that are not wanted do not count
		var batch []*stored
		size, on := 0, true
		err := s.list(ctx, q, false, func(st *stored, _ *Key, err error) bool {
			switch {
			case err != nil && st == nil:
				on = yield(nil, err)
			case err != nil:
				on = yield([]*stored{st}, err)
			case wanted(st):
				if size += sizeOf(st, reason); size > backend.MaxApplySize {
					if on = yield(batch, nil); !on {
						return false
					}
					batch, size = nil, sizeOf(st, reason)
				}
				batch = append(batch, st)
				limit--
				if limit == 0 || len(batch) == maxBatch {
					on = yield(batch, nil) && limit != 0
					batch, size = nil, 0
				}
			}
			return on
		})
		if on && len(batch) > 0 {
			on = yield(batch, nil)
		}
		if on && err != nil {
			yield(nil, err)
		}
	}
}

// changeAll makes the same change of several keys in one write, and returns what those became that edit says it has
// changed. See change for the rest. If somebody else has changed one of them since it was read, it takes one after the
// other, each read anew.
func (s *Store) changeAll(
	ctx context.Context, batch []*stored, event *record.Event, doubt error, edit func(*stored) (bool, error),
) ([]*entry, error) {
	changed, err := s.changeTogether(ctx, batch, event, doubt, edit)
	if !errors.Is(err, backend.ErrConflict) {
		return changed, err
	}
	changed = nil
	for _, st := range batch {
		was := false
		e, err := s.change(ctx, st.id, proto.CloneOf(event), doubt, func(r *record.Record) (bool, error) {
			var err error
			was, err = edit(&stored{id: st.id, record: r})
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
	ctx context.Context, batch []*stored, event *record.Event, doubt error, edit func(*stored) (bool, error),
) ([]*entry, error) {
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
	var entries []*entry
	for _, st := range batch {
		st := &stored{id: st.id, record: proto.CloneOf(st.record), revision: st.revision + 1}
		changed, err := edit(st)
		if err == nil && changed {
			said := proto.CloneOf(event)
			said.Actor = actor
			var p *prepared
			if p, err = s.prepare(st, st.revision-1, said); err == nil {
				all = append(all, p)
				entries = append(entries, p.entry)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	if err := s.commit(ctx, doubt, all, nil); err != nil {
		return nil, err
	}
	return entries, nil
}
