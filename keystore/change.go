package keystore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Issued is a new key with its secret.
type Issued struct {
	Key    *Key
	Secret Secret
}

// Create makes a key and returns it when it is durable.
//
// ErrInvalid says what is wrong with the Spec; nothing was written. After any other error the key may exist, but
// nobody holds its secret: create another.
func (s *Store) Create(ctx context.Context, spec Spec) (*Issued, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	now := time.Now()
	if err := spec.check(new(Spec)); err != nil {
		return nil, err
	}
	if err := spec.checkTimes(now, s.maxLifetime); err != nil {
		return nil, err
	}
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	stamp := s.journal.begin(true) // before the ID is made: RevokeAll counts on it
	p, text, err := s.prepareNew(spec, now, actor)
	if err != nil {
		s.journal.end(&prepared{stamp: stamp})
		return nil, err
	}
	p.place(stamp)
	ctx, cancel := s.limited(ctx)
	defer cancel()
	// No phases of the fence: nobody can have read or cached an ID that did not exist, and a miss is not cached.
	err = s.apply(ctx, p.changes, func(err error) {
		s.journal.end(p)
		s.conclude(p, err)
	})
	if err != nil {
		return nil, err
	}
	return &Issued{Key: &p.entry.key, Secret: newSecret(text)}, nil
}

// prepareNew makes a key, and returns its text too.
func (s *Store) prepareNew(spec Spec, now time.Time, actor string) (p *prepared, text string, err error) {
	id, text := s.format.New()
	digest, err := s.digest(text)
	if err != nil {
		return nil, "", trouble("create", err)
	}
	st := &stored{id: id, record: newRecord(spec, s.format.Prefix(), digest, now), revision: 1}
	if err := checkSize(st.record, 0); err != nil {
		return nil, "", err
	}
	p, err = s.prepare(st, 0, &record.Event{Action: record.Action_ACTION_CREATE, Actor: actor})
	return p, text, err
}

// Revoke ends a key for good, and returns when nothing is admitted under it any more: see the
// package's comment. Revoking a revoked key changes nothing, the reason of the first time stays,
// and is no error. The reason is for people; it may be empty, and has at most 1,024 bytes. Line
// breaks, and other characters that do not show, are stored escaped, such as \n and \u202e.
//
// Revoke, Disable and RevokeAll go first: while one of them is under way, each Update, Rotate and
// Enable of the key waits.
//
// ErrNotFound means that there is no such key, ErrInvalid that an argument cannot be used; nothing was done. After any
// other error the key may be revoked or not, and this process's contexts under it are cancelled: call Revoke again.
func (s *Store) Revoke(ctx context.Context, id, reason string) error {
	reason = escaped(reason, maxReason)
	return s.stop(ctx, id, reason, record.Action_ACTION_REVOKE, ErrRevoked, func(r *record.Record) (bool, error) {
		if r.Status == record.Status_STATUS_REVOKED {
			return false, nil
		}
		revoke(r, reason)
		return true, nil
	})
}

// Disable stops a key until Enable, and is otherwise as Revoke. A revoked key gives
// ErrKeyRevoked.
func (s *Store) Disable(ctx context.Context, id, reason string) error {
	reason = escaped(reason, maxReason)
	return s.stop(ctx, id, reason, record.Action_ACTION_DISABLE, ErrDisabled, func(r *record.Record) (bool, error) {
		if r.Status == record.Status_STATUS_DISABLED {
			return false, nil
		}
		r.Status = record.Status_STATUS_DISABLED
		r.DisabledAt, r.DisableReason = toNanos(time.Now()), reason
		return true, refuseRevoked("disable", id, r)
	})
}

// stop is Revoke or Disable: if it fails, it fails closed.
func (s *Store) stop(
	ctx context.Context, id, reason string, action record.Action, cause error, edit func(*record.Record) (bool, error),
) error {
	parsed, err := parseID("", id)
	if err != nil {
		return err
	}
	if err := checkReason(reason); err != nil {
		return err
	}
	if _, err := actorOf(ctx); err != nil {
		return err
	}
	if err := s.serving(); errors.Is(err, ErrClosed) {
		return err
	}
	_, err = s.change(ctx, parsed, &record.Event{Action: action, Reason: reason}, cause, edit)
	if err != nil && !errors.Is(err, ErrNotFound) {
		s.fence.Cut(parsed, cause)
	}
	return err
}

// Enable ends what Disable began. Enabling a key that is not disabled changes nothing and is no error. A revoked key
// gives ErrKeyRevoked, an unknown one ErrNotFound.
func (s *Store) Enable(ctx context.Context, id string) error {
	parsed, err := parseID("", id)
	if err != nil {
		return err
	}
	event := &record.Event{Action: record.Action_ACTION_ENABLE}
	_, err = s.change(ctx, parsed, event, ErrNarrowed, func(r *record.Record) (bool, error) {
		if r.Status == record.Status_STATUS_ACTIVE {
			return false, nil
		}
		r.Status = record.Status_STATUS_ACTIVE
		r.DisabledAt, r.DisableReason = 0, ""
		return true, refuseRevoked("enable", id, r)
	})
	return err
}

// Update changes what a key's Spec says, and returns the key as it is then. It calls change with
// what the key has now, and stores what that makes of it, unless somebody else came first; then it
// begins again. So change may be called several times, and should do nothing else. A panic of
// change passes through to the caller; nothing was done.
//
// A change that narrows the key, by a scope less or an earlier expiry, is in force when Update returns, and ends the
// key's live contexts with ErrNarrowed; one that widens it does not.
//
// An error of change's is returned as it is; ErrInvalid says what is wrong with what it made,
// ErrKeyRevoked means that the key is revoked, ErrNotFound that there is none: nothing was done.
// ErrUnavailable with contention means the same; after any other error the change may have been
// made.
func (s *Store) Update(ctx context.Context, id string, change func(*Spec) error) (*Key, error) {
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if change == nil {
		return nil, invalid("the change is nil")
	}
	event := &record.Event{Action: record.Action_ACTION_UPDATE}
	e, err := s.change(ctx, parsed, event, ErrNarrowed, func(r *record.Record) (bool, error) {
		if err := refuseRevoked("update", id, r); err != nil {
			return false, err
		}
		before := proto.Clone(r)
		key := &(&stored{record: r}).entry().key
		spec, had := key.spec(), key.spec()
		if err := change(&spec); err != nil {
			return false, err
		}
		if err := spec.check(&had); err != nil {
			return false, err
		}
		if !spec.ExpiresAt.Equal(fromNanos(r.ExpiresAt)) { // 1970 is not never
			if err := spec.checkTimes(time.Now(), s.maxLifetime); err != nil {
				return false, err
			}
		}
		spec.writeTo(r)
		return !proto.Equal(before, r), checkSize(r, proto.Size(before))
	})
	if err != nil {
		return nil, err
	}
	return &e.key, nil
}

// Rotate gives a key a new secret. The ID and everything else stay; the secret that it had works until the grace is
// over, to the instant, and live contexts that were opened with it end then, with ErrExpired. With a grace of 0 it
// ends at once: they are cancelled, with ErrRevoked, before Rotate returns.
//
// A key has two secrets at most: a rotation during the grace of an earlier one ends the older secret at once.
// Key.PreviousUntil tells whether there is one.
//
// A grace that is negative or over ten years gives ErrInvalid, a revoked key ErrKeyRevoked, an
// unknown one ErrNotFound. After any other error the key may have been rotated, to a secret that
// nobody has: Get tells, by its Revision. Rotate it again, with care for who still uses the first
// secret.
func (s *Store) Rotate(ctx context.Context, id string, grace time.Duration) (*Issued, error) {
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if grace < 0 {
		return nil, invalid("the grace %v is negative: 0 ends the present secret at once", grace)
	}
	if grace > maxGrace {
		return nil, invalid("the grace %v is too long: at most %v are allowed", grace, maxGrace)
	}
	var text string
	event := &record.Event{Action: record.Action_ACTION_ROTATE}
	e, err := s.change(ctx, parsed, event, ErrNarrowed, func(r *record.Record) (bool, error) {
		if err := refuseRevoked("rotate", id, r); err != nil {
			return false, err
		}
		r.Previous = nil
		if grace > 0 {
			r.Previous = &record.Previous{
				DigestScheme: r.DigestScheme,
				Digest:       r.Digest,
				Until:        toNanos(time.Now().Add(grace)),
			}
		}
		text = s.format.Renew(parsed)
		digest, err := s.digest(text)
		if err != nil {
			return false, trouble("rotate", err)
		}
		r.DigestScheme, r.Digest, r.Prefix = digest.Scheme, digest.Sum, s.format.Prefix()
		r.Rotations++
		return true, nil
	})
	if err != nil {
		return nil, err
	}
	return &Issued{Key: &e.key, Secret: newSecret(text)}, nil
}

const maxGrace = 10 * 365 * 24 * time.Hour

// refuseRevoked returns ErrKeyRevoked for a key that is revoked: nothing can change the key any
// more.
func refuseRevoked(doing, id string, r *record.Record) error {
	if r.RevokedAt != 0 {
		return &plainError{fmt.Sprintf("keystore: %s: key %s is revoked", doing, id), ErrKeyRevoked}
	}
	return nil
}

// changeAttempts is how often a change starts again because another one of the same key came first. In one process the
// changeQueue makes it few; what remains are writes of many keys, and other processes.
const changeAttempts = 16

// change commits what edit does to a record, with the event of it, through the phases of the fence, and returns what it
// became: the change is in force then. The event has its action and reason. Edit may be called several times, each time
// with a fresh record. It says whether it changed anything; its error is returned, and nothing is done. If the outcome is
// not known, live contexts end with doubt.
func (s *Store) change(
	ctx context.Context, id token.ID, event *record.Event, doubt error,
	edit func(*record.Record) (changed bool, err error),
) (*entry, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	actor, err := actorOf(ctx)
	if err != nil {
		return nil, err
	}
	event.Actor = actor
	ctx, cancel := s.limited(ctx)
	defer cancel()
	turn, err := s.queue.acquire(ctx, id, restricts(event))
	if err != nil {
		return nil, err
	}
	defer turn.release()
	for range changeAttempts {
		st, err := s.get(ctx, id)
		if errors.Is(err, ErrNotFound) {
			err = noKey(string(actions[event.Action]), id)
		}
		if err != nil {
			return nil, err
		}
		changed, err := edit(st.record)
		if err != nil {
			return nil, err
		}
		if !changed {
			turn.release() // see commit
			// Whoever committed it may not have reached phase C yet, and this call must not return before.
			e := st.entry()
			s.fence.Notify(id, e)
			return e, nil
		}
		st.revision++
		p, err := s.prepare(st, st.revision-1, event)
		if err != nil {
			return nil, err
		}
		if !turn.mustYield() {
			err = s.commit(ctx, doubt, []*prepared{p}, turn.release)
			if err == nil {
				return p.entry, nil
			}
			if !errors.Is(err, backend.ErrConflict) {
				return nil, err
			}
		}
		if err := turn.retry(ctx); err != nil {
			return nil, err
		}
	}
	return nil, trouble("change", errors.New("others keep changing the key"))
}

// commit makes all of the changes or none, through the phases of the fence. Over, if not nil, is called once nothing is
// left to try.
func (s *Store) commit(ctx context.Context, doubt error, all []*prepared, over func()) error {
	var changes []backend.Change
	for _, p := range all {
		p.place(s.journal.begin(p.event.Action == record.Action_ACTION_RESTORE))
		s.fence.Begin(p.entry.ID)
		changes = append(changes, p.changes...)
	}
	return s.apply(ctx, changes, func(err error) {
		// From here on observers are told, who may call the store. So whatever a call of theirs would wait for ends first.
		s.journal.end(all...)
		if over != nil && !errors.Is(err, backend.ErrConflict) {
			over()
		}
		for _, p := range all {
			switch {
			case err == nil:
				s.fence.End(p.entry.ID, p.entry)
			case errors.Is(err, backend.ErrConflict), errors.Is(err, backend.ErrFull), errors.Is(err, backend.ErrTooLarge):
				s.fence.End(p.entry.ID, nil) // nothing was changed
			default:
				// Without an End the key stays out of the cache, and every use of it asks the store. Nobody
				// knows what its live contexts are still good for.
				s.fence.Cut(p.entry.ID, doubt)
			}
		}
		for _, p := range all {
			s.conclude(p, err)
		}
	})
}

// A prepared is a new state of a key and the event that says so, on their way to the backend.
type prepared struct {
	entry   *entry // what the key becomes
	stamp   int64  // the event's, once it has its place
	event   *record.Event
	changes []backend.Change // of the record, of the event, and what else goes with them
}

// prepare encodes a record at its new revision, and its event. The key has the revision expect until then.
func (s *Store) prepare(st *stored, expect uint64, event *record.Event) (*prepared, error) {
	value, err := record.Encode(st.record)
	if err != nil {
		return nil, trouble("encode", err)
	}
	event.KeyId, event.Revision = st.id[:], st.revision
	said, err := record.EncodeEvent(event)
	if err != nil {
		return nil, trouble("encode", err)
	}
	return &prepared{
		entry: st.entry(),
		event: event,
		changes: []backend.Change{
			{Key: storageKey(st.id), Value: value, Expect: expect, Revision: st.revision, Restricts: restricts(event)},
			{Key: eventKey(0), Value: said}, // until place
		},
	}, nil
}

// restricts reports whether a change takes something from its key: such a change goes before
// ordinary changes.
func restricts(event *record.Event) bool {
	return event.Action == record.Action_ACTION_REVOKE || event.Action == record.Action_ACTION_DISABLE
}

// size is how many bytes the changes take of an Apply.
func (p *prepared) size() (n int) {
	for _, c := range p.changes {
		n += len(c.Key) + len(c.Value)
	}
	return n
}

// place gives the event its place. The journal's end of it has to follow, as soon as it is known whether the changes were
// made: whoever reads events waits for that.
func (p *prepared) place(stamp int64) {
	p.stamp = stamp
	p.changes[1].Key = eventKey(stamp)
}

// conclude tells of a change, if it was made. It is called after the phases of the fence: whoever hears of the change
// finds it in force.
func (s *Store) conclude(p *prepared, err error) {
	if err != nil || s.observer == nil && !s.log.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	e := publicEvent(eventKey(p.stamp), p.event)
	k := &p.entry.key
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

// ready returns why a change cannot start, if it cannot.
func (s *Store) ready(ctx context.Context) error {
	if err := s.serving(); err != nil {
		return err
	}
	return ctx.Err()
}

// parseID reads an ID. What it refuses may be a secret in the wrong place, so that the error repeats nothing that is longer
// than an ID. Where is what the text was found in, if that needs saying: a field's name, a colon and a space.
func parseID(where, id string) (token.ID, error) {
	if parsed, ok := token.ParseID(id); ok {
		return parsed, nil
	}
	_, whole := token.Parse(id)
	if whole || strings.HasSuffix(id, "_…") {
		return token.ID{}, invalid("%sa whole key, or its hint, is no key ID: take the 26 characters between its last two underscores", where)
	}
	what := "this"
	if len(id) <= len(token.ID{}.String()) {
		what = strconv.Quote(id)
	}
	return token.ID{}, invalid("%s%s is no key ID: an ID has 26 characters of 0-9 and a-z without i, l, o and u", where, what)
}
