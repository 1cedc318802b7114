package keystore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// RevokeAllOptions are the settings of RevokeAll. Nil and the zero value are valid.
type RevokeAllOptions struct {
	// All confirms that every key is to be revoked. A Query that selects every key, such as the
	// zero Query, gives ErrInvalid without All. Any other Query gives ErrInvalid with All.
	// Query.Cursor and Query.Limit make no difference to this check.
	All bool
	// DryRun revokes nothing. RevokeAll calls Progress for the keys that RevokeAll would revoke
	// without DryRun. A dry run refuses the same arguments as RevokeAll.
	DryRun bool
	// AtMost is the largest number of keys that the caller expects the query to select, for example
	// from a dry run. If the query selects more keys, RevokeAll revokes none of them, and returns a
	// *SelectionError. If keys are added during the call, RevokeAll stops after AtMost keys, and
	// returns the same error with the number of keys that RevokeAll has revoked. A dry run calls
	// Progress for all selected keys before it returns the error. 0 or less means no limit. In
	// contrast to AtMost, Query.Limit makes RevokeAll stop without an error.
	AtMost int
	// Progress receives each key after the key is revoked, with the number of keys so far. The
	// calls come in the order of the Query. Keys that were added during the call come last. To
	// resume a RevokeAll that failed or was canceled, repeat the call: RevokeAll skips the
	// revoked keys. Nil means that no progress is reported. A panic of Progress passes through to
	// the caller of RevokeAll, and ends the call as an error would.
	Progress func(k *Key, done int)
}

// A SelectionError means that a Query selects more keys than RevokeAllOptions.AtMost.
type SelectionError struct {
	Selected int // the number of keys that the query selects, revoked by this call or not
	AtMost   int
}

func (e *SelectionError) Error() string {
	return fmt.Sprintf("keystore: the Query selects %d keys, and RevokeAllOptions.AtMost is %d",
		e.Selected, e.AtMost)
}

// RevokeAll revokes every key that the query selects and that is not yet revoked. RevokeAll
// revokes many keys in one write, and returns the number of keys that the call revoked. After a
// nil error, no selected key is admitted any more, and the sessions of the keys have ended, as
// with Revoke. RevokeAll refuses a Query that selects every key, unless RevokeAllOptions.All
// is set. An Owner from a variable that was not set must not revoke every key.
//
// If several processes have the store open, RevokeAll waits for the other processes once, at the
// end. ErrNotEverywhere means that all selected keys are revoked, and that another process may
// admit a key for a moment.
//
// RevokeAll evaluates the query once per key. If the Create of a key was running when the call
// began, RevokeAll evaluates the key after the Create has finished. RevokeAll also evaluates the
// keys that are created while RevokeAll reads the selection. RevokeAll does not see changes made
// to a key after the key was evaluated. A query with UnusedSince is evaluated again just before
// the key is revoked. If the key was used since the first evaluation, the key is not revoked.
//
// ErrInvalid means that nothing was done, unless a query with UnusedSince becomes too early during
// the call: see Query.UnusedSince. A *SelectionError means that more keys are selected than
// RevokeAllOptions.AtMost. After any other error, RevokeAll has revoked the keys that Progress was
// called for, and perhaps more keys. Call RevokeAll again to continue with the keys that are not
// revoked.
//
// A key whose stored data is damaged cannot be evaluated. RevokeAll ends the sessions of the key,
// continues with the other keys, and returns ErrCorrupt at the end. If the query has an Owner,
// RevokeAll meets a damaged key only if the key had this owner. If storage cannot read past the
// damage, the keys after the damage are not revoked, and the text of ErrCorrupt says that these
// keys were not read.
func (s *Store) RevokeAll(
	ctx context.Context, q Query, reason string, opts *RevokeAllOptions,
) (int, error) {
	reason = escaped(reason, maxReason)
	if opts == nil {
		opts = new(RevokeAllOptions)
	}
	if err := checkRevokeAll(ctx, &q, reason, opts.All); err != nil {
		return 0, err
	}
	guarded := opts.AtMost > 0 && (q.Limit <= 0 || q.Limit > opts.AtMost)
	done, last := 0, ""
	report := func(k *Key) {
		done++
		last = k.ID
		if opts.Progress != nil {
			opts.Progress(k, done)
		}
	}
	if opts.DryRun {
		failed, corrupt := s.findAll(ctx, q, reason, report)
		if failed == nil && guarded && done > opts.AtMost {
			failed = &SelectionError{done, opts.AtMost}
		}
		return done, errors.Join(failed, corrupt)
	}
	whole := q
	if guarded {
		n, err := s.countUnlessAtMost(ctx, q, opts.AtMost)
		if err != nil {
			return 0, err
		}
		if n > opts.AtMost {
			return 0, &SelectionError{n, opts.AtMost}
		}
		q.Limit = opts.AtMost
	}
	added, stop := s.watchAdded(ctx, q)
	defer stop()
	failed, corrupt := s.revokeAll(ctx, s.candidates, q, reason, report)
	if failed == nil && (q.Limit <= 0 || done < q.Limit) {
		// A key that was added during the call may sort before keys that were already read,
		// because the ID is created before the key is stored. The key is in storage after the
		// pending changes have finished. A second read finds the key.
		var find finder
		if find, failed = added(); failed == nil && find != nil {
			q.Limit = max(0, q.Limit-done)
			var more error
			failed, more = s.revokeAll(ctx, find, q, reason, report)
			corrupt = cmp.Or(more, corrupt)
		}
	}
	var excess error
	if failed == nil && guarded && done == opts.AtMost {
		excess = s.checkExcess(ctx, whole, added, last, done)
	}
	if failed == nil {
		ctx, cancel := s.limited(ctx)
		failed = s.barrier(ctx, "revoke")
		cancel()
	}
	return done, errors.Join(excess, failed, corrupt)
}

// checkRevokeAll returns an error if an argument of RevokeAll cannot be used.
func checkRevokeAll(ctx context.Context, q *Query, reason string, all bool) error {
	if err := checkReason(reason); err != nil {
		return err
	}
	if _, err := actorOf(ctx); err != nil {
		return err
	}
	if err := refuseCondition(ctx, "RevokeAll"); err != nil {
		return err
	}
	switch selectsAll := q.selectsAll(); {
	case selectsAll && !all:
		return invalid("the Query selects every key: set RevokeAllOptions.All if all are meant, " +
			"and otherwise a field of the Query")
	case all && !selectsAll:
		return invalid("RevokeAllOptions.All is set, but the Query selects some keys only: set one " +
			"of them")
	}
	return nil
}

// findAll reports the keys that revokeAll would revoke. failed and corrupt are those of revokeAll.
func (s *Store) findAll(
	ctx context.Context, q Query, reason string, report func(*Key),
) (failed, corrupt error) {
	wanted := s.batches(ctx, s.candidates, q, len(reason), revokeChanges, isLive)
	for batch, err := range wanted {
		if errors.Is(err, ErrCorrupt) {
			corrupt = err
			continue
		}
		if err != nil {
			return err, corrupt
		}
		for _, kr := range batch {
			report(&kr.cached().key)
		}
	}
	return nil, corrupt
}

// checkExcess returns a SelectionError if the query selects keys besides the keys that RevokeAll
// has revoked, of which last was the last. All keys up to last are read, unless some were added
// since.
func (s *Store) checkExcess(
	ctx context.Context, q Query, added func() (finder, error), last string, done int,
) error {
	find, err := added()
	if err != nil {
		return err
	}
	q.Limit = 0
	if find == nil {
		q.Cursor = last
	}
	more, err := s.countWanted(ctx, q)
	if err == nil && more > 0 {
		err = &SelectionError{done + more, done}
	}
	return err
}

// countUnlessAtMost returns the number of keys that RevokeAll would revoke, or any number up to
// most if RevokeAll would revoke at most so many keys. To read the owner index, or the entries of
// the keys, takes a fraction of the time that it takes to read and to decide about each key. The
// keys that are selected are some of these.
func (s *Store) countUnlessAtMost(ctx context.Context, q Query, most int) (int, error) {
	if q.Owner != "" || q.selectsAll() {
		n, err := s.countEntries(ctx, &q, most)
		if err != nil || n <= most {
			return n, err
		}
	}
	return s.countWanted(ctx, q)
}

// countEntries returns the number of keys of the owner of a query, or of the store if the query
// has no owner, up to most+1. countEntries reads no key.
func (s *Store) countEntries(ctx context.Context, q *Query, most int) (n int, err error) {
	if err := s.ready(ctx); err != nil {
		return 0, err
	}
	var check *indexCheck
	if q.Owner != "" {
		if check, err = s.checkIndexes(ctx); err != nil {
			return 0, err
		}
	}
	entries, err := s.scanKeys(ctx, q, false)
	if err != nil {
		return 0, err
	}
	for _, err := range entries {
		if errors.Is(err, ErrCorrupt) {
			return most + 1, nil // countWanted knows which damage matters
		}
		if err != nil {
			return 0, s.listError(ctx, err)
		}
		if n++; n > most {
			break
		}
	}
	return n, check.complete(ctx)
}

// countWanted returns the number of keys that RevokeAll would revoke. Damaged keys do not count.
func (s *Store) countWanted(ctx context.Context, q Query) (n int, err error) {
	for batch, err := range s.batches(ctx, s.candidates, q, 0, revokeChanges, isLive) {
		if errors.Is(err, ErrCorrupt) {
			continue // revokeAll reports the damage
		}
		if err != nil {
			return 0, err
		}
		n += len(batch)
	}
	return n, nil
}

// watchAdded returns a function that returns how to find the keys of the query that may have been
// added since the call of watchAdded, in any process, or nil if there are none. The function first
// waits for the changes that are under way, if any of them may add a key. stop ends the watch.
func (s *Store) watchAdded(
	ctx context.Context, q Query,
) (added func() (finder, error), stop func()) {
	if p := s.processes; p != nil {
		w := p.watch(q)
		return func() (finder, error) {
			_, err := s.awaitChanges(ctx)
			ids, many := p.found(w)
			switch {
			case err != nil:
				return nil, err
			case many:
				return s.candidates, nil
			case len(ids) == 0:
				return nil, nil
			}
			return s.theseKeys(ids), nil
		}, func() { p.unwatch(w) }
	}
	_, finished := s.sequencer.Adds()
	return func() (finder, error) {
		started, _ := s.sequencer.Adds()
		if started == finished {
			return nil, nil
		}
		_, err := s.awaitChanges(ctx)
		return s.candidates, err
	}, func() {}
}

// isLive reports whether a key is not yet revoked.
func isLive(kr *keyRecord) bool { return kr.record.RevokedAt == 0 }

// isLiveOrNotified is isLive. If the key is revoked, isLiveOrNotified also calls notifyUnlessEnded.
func (s *Store) isLiveOrNotified(kr *keyRecord) bool {
	live := isLive(kr)
	if !live {
		s.notifyUnlessEnded(kr)
	}
	return live
}

// stillWanted reports whether RevokeAll has to revoke a key that was selected some time ago. The
// key may have been used since. If the record was read again, the key may have been changed too.
func (s *Store) stillWanted(
	ctx context.Context, q *Query, kr *keyRecord, again bool,
) (bool, error) {
	if !isLive(kr) || again && !(q.selects(&kr.cached().key) && q.knowsUses(kr)) {
		return false, nil
	}
	if q.UnusedSince.IsZero() {
		return true, nil
	}
	last, err := s.lastUsed(ctx, kr.id)
	if err != nil {
		return false, err
	}
	return s.usage.unused(q.UnusedSince, last)
}

// revokeAll reads the selection once, with find, and revokes the selected keys. failed is the error
// that ended the run. corrupt is the error for damaged data.
func (s *Store) revokeAll(
	ctx context.Context, find finder, q Query, reason string, report func(*Key),
) (failed, corrupt error) {
	cut := func(batch []*keyRecord) {
		for _, kr := range batch {
			s.cut(kr.id, ErrRevoked)
		}
	}
	type write struct {
		revoked []*cachedKey
		err     error
	}
	var writes []chan write // the running writes, in the order of the query
	finish := func() error {
		w := <-writes[0]
		writes = writes[1:]
		for _, e := range w.revoked {
			report(&e.key)
		}
		return w.err
	}
	wanted := s.batches(ctx, find, q, len(reason), revokeChanges, s.isLiveOrNotified)
	for batch, err := range wanted {
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
			revoked, err := s.changeAll(ctx, batch, event, ErrRevoked,
				func(kr *keyRecord, again bool) (bool, error) {
					if wanted, err := s.stillWanted(ctx, &q, kr, again); err != nil || !wanted {
						return false, err
					}
					revoke(kr.record, reason)
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

// maxWrites is how many writes RevokeAll runs at the same time, so that the backend can commit
// the writes together.
const maxWrites = 8

func revoke(r *record.Record, reason string) {
	r.Status = record.Status_STATUS_REVOKED
	r.RevokedAt, r.RevokeReason = toNanos(time.Now()), reason
}

// Purge removes the keys that were revoked, or had expired, before a time in the past. Purge
// returns the number of removed keys. The events of the keys remain until Options.EventRetention.
// A few bytes of each key remain forever, so that Restore cannot bring the key back.
//
// Purge removes no other key. A key that is only disabled remains. A key whose expiry is moved by
// an Update during the Purge remains too.
//
// ErrInvalid means that nothing was done: before is zero or in the future, for example.
// ErrNotEverywhere means that the keys are removed, and that another process may not know this yet.
// ErrCorrupt comes at the end, after Purge has removed the other keys: the key, or the bytes that
// would remain of the key, are damaged, and the key stays. After any other error, a part of the
// keys is removed: call Purge again.
func (s *Store) Purge(ctx context.Context, before time.Time) (int, error) {
	now := time.Now()
	if before.IsZero() || before.After(now) {
		return 0, invalid("the time before which keys must have died is zero or in the future: " +
			"it has to be in the past")
	}
	if err := refuseCondition(ctx, "Purge"); err != nil {
		return 0, err
	}
	dead := func(kr *keyRecord) bool {
		k := &kr.cached().key
		return !k.RevokedAt.IsZero() && k.RevokedAt.Before(before) ||
			!k.ExpiresAt.IsZero() && k.ExpiresAt.Before(before)
	}
	done := 0
	var corrupt []error
	note := func(err error) {
		if len(corrupt) == enough {
			err = errors.New("and there is more damage: call CheckIntegrity")
		}
		if len(corrupt) <= enough {
			corrupt = append(corrupt, err)
		}
	}
	for batch, err := range s.batches(ctx, s.candidates, Query{}, 0, maxChanges, dead) {
		if errors.Is(err, ErrCorrupt) {
			note(err)
			continue
		}
		if err != nil {
			return done, err
		}
		event := &record.Event{Action: record.Action_ACTION_PURGE}
		purged, err := s.changeAll(ctx, batch, event, ErrRevoked,
			func(kr *keyRecord, _ bool) (bool, error) {
				if !dead(kr) {
					return false, nil
				}
				purge(kr.record, now)
				return true, nil
			})
		done += len(purged)
		s.usage.forget(purged)
		if errors.Is(err, ErrCorrupt) {
			note(err)
		} else if err != nil {
			return done, err
		}
	}
	s.forgetGone(ctx)
	ctx, cancel := s.limited(ctx)
	defer cancel()
	return done, errors.Join(s.barrier(ctx, "purge"), errors.Join(corrupt...))
}

// revokeChanges is how many changes the revocation of a key takes: of the record, the event and the
// event index.
const revokeChanges = 3

// maxKeyChanges is the largest number of changes of keys in one Apply, beside a guard.
const maxKeyChanges = backend.MaxChanges - 1

// sizeOf returns an upper bound of the space that the change of a key takes in a write: a record,
// an event, and index entries, with a text of so many bytes in the record and in the event.
func sizeOf(kr *keyRecord, text int) int { return proto.Size(kr.record) + 2*text + maxText + 384 }

// batches yields the wanted keys of a selection in batches, in the order of the query. A batch has
// as many keys as one write can change, with a reason of so many bytes, and so many backend changes
// for each key. An error comes without keys and ends the iteration. ErrCorrupt is the exception:
// after ErrCorrupt the iteration may continue, and ErrCorrupt comes with the damaged key, if the
// key is known.
func (s *Store) batches(
	ctx context.Context, find finder, q Query, reason, changes int, wanted func(*keyRecord) bool,
) iter.Seq2[[]*keyRecord, error] {
	return func(yield func([]*keyRecord, error) bool) {
		limit := q.Limit
		q.Limit = 0 // keys that are not wanted do not count
		var batch []*keyRecord
		size, on := 0, true
		err := s.listFound(ctx, find, q, false, func(l listedKey, err error) bool {
			kr := l.keyRecord
			switch {
			case err != nil && kr == nil:
				on = yield(nil, err)
			case err != nil:
				on = yield([]*keyRecord{kr}, err)
			case wanted(kr):
				if size += sizeOf(kr, reason); size > backend.MaxApplySize {
					if on = yield(batch, nil); !on {
						return false
					}
					batch, size = nil, sizeOf(kr, reason)
				}
				batch = append(batch, kr)
				limit--
				if limit == 0 || len(batch) == maxKeyChanges/changes {
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
