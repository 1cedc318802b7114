package keystore

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Issued is a new key with its secret.
type Issued struct {
	Key    *Key
	Secret Secret
}

// Create makes a key, and returns the key once the key is durable.
//
// If the error is ErrInvalid, its text names what is wrong with the Spec, and nothing was written.
// After any other error the key may exist, but no caller has the secret: create another key.
func (s *Store) Create(ctx context.Context, spec Spec) (*Issued, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	now := time.Now()
	actor, err := s.checkNew(ctx, &spec, now)
	if err != nil {
		return nil, err
	}
	defer s.counts.took[record.Action_ACTION_CREATE].since(now)
	ctx, cancel := s.limited(ctx)
	defer cancel()
	for attempt := 0; ; attempt++ {
		issued, err := s.create(ctx, spec, now, actor)
		if s.processes == nil || !mayRetry(err) {
			return issued, err
		}
		// The stamp or the guard entry has caused the conflict, and nothing was written.
		if !s.retries(ctx, err, attempt, false) {
			return nil, s.contention(ctx, "create", err)
		}
	}
}

// checkNew makes the checks of Create that need no record, and returns the actor.
func (s *Store) checkNew(ctx context.Context, spec *Spec, now time.Time) (actor string, err error) {
	if err := spec.check(new(Spec)); err != nil {
		return "", err
	}
	if err := spec.checkTimes(now, s.maxLifetime); err != nil {
		return "", err
	}
	if err := refuseCondition(ctx, "Create"); err != nil {
		return "", err
	}
	return actorOf(ctx)
}

// create makes one attempt of Create.
func (s *Store) create(
	ctx context.Context, spec Spec, now time.Time, actor string,
) (*Issued, error) {
	guard, err := s.guard() // before the stamp: see processes
	if err != nil {
		return nil, err
	}
	// The stamp must begin before the ID is made: RevokeAll depends on this order.
	stamp := s.sequencer.Begin(true)
	p, text, err := s.prepareNew(spec, now, stamp, actor)
	if err != nil {
		s.endStamps(stamp)
		return nil, err
	}
	p.stamp, p.guard = stamp, guard
	err = s.commit(ctx, nil, p) // no context is bound to a new key
	if err != nil {
		return nil, err
	}
	return &Issued{Key: &p.key.key, Secret: newSecret(text)}, nil
}

// prepareNew makes a key, and returns the text of the key too. stamp is the stamp of the event.
//
// The key is created at the stamp, so that the record leads to the event: see index.go. If the
// stamp is far ahead of the clock, because the clock was set back, the key is created now, and the
// event index leads to the event. So CreatedAt is less than maxLead after the time of the ID.
func (s *Store) prepareNew(
	spec Spec, now time.Time, stamp int64, actor string,
) (p *prepared, text string, err error) {
	id, text := s.format.New()
	if at := id.Time(); at.Before(now) {
		now = at // also if the clock was set back just now
	}
	leads := stamp-now.UnixNano() < int64(maxLead)
	if leads {
		now = fromNanos(stamp)
	}
	digest, err := s.digest(text)
	if err != nil {
		return nil, "", wrapErr("create", err)
	}
	kr := &keyRecord{id: id, record: newRecord(spec, s.format.Prefix(), digest, now), revision: 1}
	if err := checkSize(kr.record, 0); err != nil {
		return nil, "", err
	}
	event := &record.Event{Action: record.Action_ACTION_CREATE, Actor: actor}
	if err := kr.grant(spec.Credits, 0, event); err != nil {
		return nil, "", err
	}
	p, err = s.prepare(prior{}, kr, event)
	if err != nil {
		return nil, "", err
	}
	p.indexesEvent = !leads
	return p, text, nil
}

// maxLead is how much later the CreatedAt of a key can be than the time of its ID.
const maxLead = time.Second

// Revoke ends a key permanently, and returns when the store admits nothing under the key any more:
// see the package comment. To revoke a revoked key is no error: nothing changes, and the first
// reason stays.
//
// The reason is for people. The reason may be empty, and has at most 1,024 bytes. Line breaks and
// other invisible characters are stored escaped, for example as \n and \u202e.
//
// Revoke and Disable go before other changes of the key: while a Revoke or a Disable is under way,
// every other change of the key waits. No change waits for a RevokeAll, which writes many keys
// together. But if another change of a key is committed before this write, RevokeAll revokes the
// key alone, and goes before other changes as Revoke does.
//
// ErrNotFound means that there is no such key. ErrInvalid means that an argument cannot be used.
// ErrConflict means that the key does not have the revision of IfRevision. After these three
// errors, nothing was done. ErrNotEverywhere means that the key is revoked, and that another
// process may admit the key for a moment. After any other error, the key may be revoked or not, and
// the sessions of the key in this process have ended: call Revoke again.
func (s *Store) Revoke(ctx context.Context, id, reason string) error {
	reason = escaped(reason, maxReason)
	return s.deactivate(ctx, id, reason, record.Action_ACTION_REVOKE, ErrRevoked,
		func(r *record.Record) (bool, error) {
			if r.Status == record.Status_STATUS_REVOKED {
				return false, nil
			}
			revoke(r, reason)
			return true, nil
		})
}

// Disable stops a key until Enable. In all other respects, Disable works as Revoke does. If the key
// is revoked, Disable returns ErrKeyRevoked.
func (s *Store) Disable(ctx context.Context, id, reason string) error {
	reason = escaped(reason, maxReason)
	return s.deactivate(ctx, id, reason, record.Action_ACTION_DISABLE, ErrDisabled,
		func(r *record.Record) (bool, error) {
			if r.Status == record.Status_STATUS_DISABLED {
				return false, nil
			}
			r.Status = record.Status_STATUS_DISABLED
			r.DisabledAt, r.DisableReason = toNanos(time.Now()), reason
			return true, refuseRevoked("disable", id, r)
		})
}

// deactivate does the work of Revoke and of Disable. If the change fails, deactivate fails closed.
func (s *Store) deactivate(
	ctx context.Context, id, reason string, action record.Action, cause error,
	edit func(*record.Record) (bool, error),
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
	if _, err := conditionOf(ctx); err != nil {
		return err
	}
	if err := s.serving(); errors.Is(err, ErrClosed) {
		return err
	}
	_, err = s.change(ctx, parsed, &record.Event{Action: action, Reason: reason}, cause, edit)
	if err != nil && !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrConflict) &&
		!errors.Is(err, ErrNotEverywhere) {
		s.cut(parsed, cause)
	}
	return err
}

// Enable ends the effect of Disable. To enable a key that is not disabled is no error and changes
// nothing. If the key is revoked, Enable returns ErrKeyRevoked. If there is no such key, Enable
// returns ErrNotFound.
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

// Update changes the Spec of a key, and returns the changed key. Update calls change with the
// present Spec, and stores the Spec that change leaves. If another change of the key is committed
// first, Update starts again. So Update may call change several times, and change should have no
// other effect. A panic of change passes through to the caller, and nothing was done.
//
// A change that narrows the key, by fewer scopes or an earlier expiry, is in force when Update
// returns. The narrowing ends the sessions of the key with ErrNarrowed. A change that widens the
// key ends no session.
//
// Update returns an error of change without wrapping. The text of an ErrInvalid names what is wrong
// with the Spec that change made. ErrKeyRevoked means that the key is revoked. ErrNotFound means
// that there is no such key. ErrConflict means that the key does not have the revision of
// IfRevision. After each of these errors, nothing was done. After an ErrUnavailable because of
// contention, nothing was done either. With ErrNotEverywhere, the change was made, and Update
// returns the key too. After any other error, the change may have been made.
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
		return s.edit(r, id, change)
	})
	if e == nil {
		return nil, err
	}
	return &e.key, err
}

// edit lets change change the Spec of the record of a key, and reports whether the record is
// another one now.
func (s *Store) edit(r *record.Record, id string, change func(*Spec) error) (bool, error) {
	if err := refuseRevoked("update", id, r); err != nil {
		return false, err
	}
	before := proto.Clone(r)
	key := &(&keyRecord{record: r}).cached().key
	spec, had := key.spec(), key.spec()
	if err := change(&spec); err != nil {
		return false, err
	}
	if spec.Credits != nil {
		return false, invalid("Spec.Credits is set: only Create reads it; call SetCredits or " +
			"AddCredits")
	}
	if err := spec.check(&had); err != nil {
		return false, err
	}
	// Compare times, not nanoseconds: the beginning of 1970 does not mean never.
	if !spec.ExpiresAt.Equal(fromNanos(r.ExpiresAt)) {
		if err := spec.checkTimes(time.Now(), s.maxLifetime); err != nil {
			return false, err
		}
	}
	spec.writeTo(r)
	return !proto.Equal(before, r), checkSize(r, proto.Size(before))
}

// Rotate gives a key a new secret. The ID and everything else stay. The previous secret works
// exactly until the grace is over. Sessions that were opened with the previous secret end at the
// same moment, with ErrExpired. With a grace of 0, the previous secret ends immediately: its
// sessions end, with ErrRevoked, before Rotate returns.
//
// A key has at most two secrets. So a rotation during the grace of an earlier rotation ends the
// older secret immediately. Key.PreviousUntil shows whether the key has a previous secret.
//
// Rotate returns ErrInvalid if the grace is negative or over ten years. Rotate returns
// ErrKeyRevoked if the key is revoked, ErrNotFound if there is no such key, and ErrConflict if the
// key does not have the revision of IfRevision. With ErrNotEverywhere, the key was rotated, and
// Rotate returns the new secret too. After any other error, the key may have been rotated to a
// secret that no caller has. To find out, call Get and compare the Revision. Then rotate the key
// again, but consider the clients that still use the first secret.
func (s *Store) Rotate(ctx context.Context, id string, grace time.Duration) (*Issued, error) {
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if grace < 0 {
		return nil, invalid("the grace %v is negative: 0 ends the present secret immediately", grace)
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
			return false, wrapErr("rotate", err)
		}
		r.DigestScheme, r.Digest, r.Prefix = digest.Scheme, digest.Sum, s.format.Prefix()
		r.Rotations++
		return true, nil
	})
	if e == nil {
		return nil, err
	}
	return &Issued{Key: &e.key, Secret: newSecret(text)}, err
}

const maxGrace = 10 * 365 * 24 * time.Hour

// refuseRevoked returns ErrKeyRevoked if the key is revoked: nothing can change a revoked key.
func refuseRevoked(doing, id string, r *record.Record) error {
	if r.RevokedAt != 0 {
		return &messageError{fmt.Sprintf("keystore: %s: key %s is revoked", doing, id),
			ErrKeyRevoked}
	}
	return nil
}

// parseID parses an ID. A refused text may be a secret in the wrong place, so the error repeats no
// text that is longer than an ID. If the error must name the place of the text, where is the name
// of a field, a colon and a space.
func parseID(where, id string) (token.ID, error) {
	if parsed, ok := token.ParseID(id); ok {
		return parsed, nil
	}
	_, whole := token.Parse(id)
	if whole || strings.HasSuffix(id, "_…") {
		return token.ID{}, invalid("%sa whole key, or its hint, is no key ID: take the 26 "+
			"characters between its last two underscores", where)
	}
	what := "this"
	if len(id) <= len(token.ID{}.String()) {
		what = strconv.Quote(id)
	}
	return token.ID{}, invalid("%s%s is no key ID: an ID has 26 characters of 0-9 and a-z "+
		"without i, l, o and u", where, what)
}
