package keystore

import (
	"bytes"
	"cmp"
	"context"
	"errors"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// maxKeysSize is the largest size of the changes of keys in one Apply, beside a guard.
const maxKeysSize = backend.MaxApplySize - 64

func (s *Store) restoreKeys(
	ctx context.Context, batch []backend.Entry, attempt int,
) (changed int, err error) {
	actor, err := actorOf(ctx)
	if err != nil {
		return 0, err
	}
	var all []*prepared
	size := 0
	flush := func() error {
		if len(all) == 0 {
			return nil
		}
		err := s.commit(ctx, ErrNarrowed, all...)
		if err == nil {
			changed += len(all)
		}
		all, size = nil, 0
		return err
	}
	for _, e := range batch {
		p, err := s.restoreKey(ctx, e, actor)
		if err != nil {
			return changed, err
		}
		if p == nil {
			continue
		}
		if attempt > 0 {
			if _, err := s.mendOwners(ctx, p); err != nil {
				return changed, err
			}
		}
		// The merged record may be the record of the store. The record of the store may be larger
		// than the saved record, and the batch was sized by the saved records.
		own := p.size()
		if size+own > maxKeysSize {
			if err := flush(); err != nil {
				return changed, err
			}
		}
		all, size = append(all, p), size+own
	}
	return changed, flush()
}

// restoreKey prepares the change of one key. The result is nil if the key does not change.
func (s *Store) restoreKey(ctx context.Context, e backend.Entry, actor string) (*prepared, error) {
	saved, err := parseSavedRecord(e)
	if err != nil {
		return nil, errOtherBackup
	}
	have := &keyRecord{} // revision 0 if the store does not have the key
	local, err := s.backend.Get(ctx, storageKey(saved.id))
	if err == nil {
		have, err = parseKeyRecord(local)
		if err != nil {
			return nil, err
		}
	} else if !errors.Is(err, backend.ErrNotFound) {
		return nil, s.scanError(ctx, "restore", err)
	}
	before := priorOf(have)
	if have.record == nil || saved.purged() {
		grave, err := s.readGrave(ctx, saved.id)
		if err != nil {
			return nil, err
		}
		if grave.record != nil {
			s.notifyUnlessEnded(grave)
			return nil, nil // a purged key stays purged
		}
		// An empty grave without a record means that another Restore has added the key in between,
		// or that the record is lost. In the first case, the write conflicts.
		before.grave = grave.revision
	}
	merged := merge(have, saved)
	if merged == nil {
		s.notifyUnlessEnded(have)
		return nil, nil
	}
	if merged.purged() && (have.record == nil || before.grave > 0) {
		merged.record.CreatedAt = 0 // of another store: no event of this store is meant
	}
	event := &record.Event{Action: record.Action_ACTION_RESTORE, Actor: actor}
	return s.prepare(before, merged, event)
}

// merge returns the new version of a key when a backup is restored. have is the version of the
// store, with revision 0 if the store does not have the key. saved is the version of the backup.
// The result is nil if the key of the store does not change. Purged wins over revoked, and revoked
// wins over any other state. Otherwise the higher revision wins.
func merge(have, saved *keyRecord) *keyRecord {
	rank := func(kr *keyRecord) int {
		switch {
		case kr.record == nil:
			return -1
		case kr.purged():
			return 2
		case kr.record.RevokedAt != 0:
			return 1
		default:
			return 0
		}
	}
	switch hold, take := rank(have), rank(saved); {
	case hold > take, hold == take && (hold > 0 || have.revision >= saved.revision):
		return nil
	case hold == 0 && take == 1 && have.revision > saved.revision:
		// The store has a newer version of the key than the revoked version of the backup. Keep the
		// version of the store, and copy only the revocation.
		r := proto.CloneOf(have.record)
		r.Status = record.Status_STATUS_REVOKED
		r.RevokedAt, r.RevokeReason = saved.record.RevokedAt, saved.record.RevokeReason
		return &keyRecord{id: have.id, record: r, revision: have.revision + 1}
	default:
		if hold == 0 && take == 0 {
			saved.record.Rotations = renumber(have.record, saved.record)
		}
		if have.record != nil {
			// A key is created once: the time leads to the event of the store. See index.go.
			if saved.purged() {
				saved.record.CreatedAt = firstStamp(have.record)
			} else {
				saved.record.CreatedAt = have.record.CreatedAt
				saved.record.ImportedAt = have.record.ImportedAt
			}
		}
		revision := max(saved.revision, have.revision+1)
		return &keyRecord{id: saved.id, record: saved.record, revision: revision}
	}
}

// renumber returns the number of rotations for a saved record that replaces the record of the
// store. By this number, a live context knows the secret that opened the context. Two stores that
// have diverged may have given the same number to different secrets. So the secrets that both
// records have keep their numbers where possible. Otherwise all saved secrets get numbers that no
// context has.
func renumber(have, saved *record.Record) uint32 {
	type secret interface {
		GetDigestScheme() string
		GetDigest() []byte
	}
	same := func(a, b secret) bool {
		return a.GetDigestScheme() == b.GetDigestScheme() &&
			bytes.Equal(a.GetDigest(), b.GetDigest())
	}
	switch {
	case same(have, saved) && (saved.Previous == nil || same(have.Previous, saved.Previous)):
		return have.Rotations
	case saved.Previous != nil && same(have, saved.Previous):
		return have.Rotations + 1
	default:
		return max(have.Rotations, saved.Rotations) + 2
	}
}

// restoreChecks adds the check values of a backup to the store. A check value that the Hasher of
// the store does not match is skipped: no key of the backup needs the check value. A check value
// that the store already has stays, unless no key of the store needs the check value.
func (s *Store) restoreChecks(
	ctx context.Context, batch []backend.Entry, _ int,
) (changed int, err error) {
	var changes []backend.Change
	for _, e := range batch {
		d, err := parseCheck(e)
		if err != nil {
			return 0, err
		}
		have, err := s.readCheck(d.Scheme)
		if err != nil {
			return 0, err
		}
		takes, err := s.takesCheck(ctx, d, have)
		if err != nil {
			return 0, err
		}
		if takes {
			c := backend.Change{Key: have.Key, Value: e.Value, Expect: have.Revision}
			changes = append(changes, c)
		}
	}
	if len(changes) == 0 {
		return 0, nil
	}
	return 0, s.applyCheck(ctx, changes...)
}

// takesCheck reports whether check value d of a backup replaces have. have is the entry of the
// store for the scheme, with revision 0 if the store has no check value.
func (s *Store) takesCheck(
	ctx context.Context, d hashing.Digest, have backend.Entry,
) (bool, error) {
	if bytes.Equal(have.Value, d.Sum) {
		return false, nil
	}
	known := s.knows(d.Scheme)
	if known {
		if ok, err := s.matchesCheck(d); !ok || err != nil {
			return false, err
		}
	}
	switch {
	case have.Revision == 0:
		return true, nil
	case known:
		ok, err := s.matchesCheck(hashing.Digest{Scheme: d.Scheme, Sum: have.Value})
		return !ok, err
	default:
		needed, err := s.needs(ctx, d.Scheme)
		return !needed, err
	}
}

// restoreBalances merges the balances of a backup into the store, before the keys. For a key whose
// balance the store has, the later grant wins: the later SetCredits or AddCredits, by the revision
// of the record, and then the later refill. Of two balances of the same grant, the lower one wins,
// because the higher one does not know of credits that were spent. So no Restore raises what
// remains of a grant.
func (s *Store) restoreBalances(
	ctx context.Context, batch []backend.Entry, _ int,
) (changed int, err error) {
	var changes []backend.Change
	for _, e := range batch {
		saved, err := parseBalance(e)
		if err != nil {
			return 0, err
		}
		have, err := s.readBalance(ctx, saved.id)
		if errors.Is(err, ErrCorrupt) && !errors.Is(err, record.ErrNewer) {
			err = nil // missing or damaged
		}
		if err != nil {
			return 0, err
		}
		if have.CreditsRevision == 0 || saved.isAfter(have) {
			changes = append(changes, backend.Change{Key: e.Key, Value: e.Value,
				Expect: have.revision})
		}
	}
	return 0, s.applyRestored(ctx, changes)
}

// isAfter reports whether the balance b wins over the balance have in a Restore.
func (b *balance) isAfter(have *balance) bool {
	order := cmp.Or(
		cmp.Compare(b.GrantedRevision, have.GrantedRevision),
		cmp.Compare(b.RefilledAt, have.RefilledAt),
		cmp.Compare(have.Remaining, b.Remaining),
	)
	return order > 0
}

// restoreUsage writes each last use of the backup that is later than the last use in the store.
func (s *Store) restoreUsage(
	ctx context.Context, batch []backend.Entry, _ int,
) (changed int, err error) {
	var changes []backend.Change
	for _, e := range batch {
		minute, err := parseUsage(e)
		if err != nil {
			return 0, err
		}
		have, revision, err := s.readUsage(ctx, token.ID(e.Key[1:]))
		if err != nil {
			return 0, err
		}
		if minute > have {
			changes = append(changes, backend.Change{Key: e.Key, Value: e.Value, Expect: revision})
		}
	}
	return 0, s.applyRestored(ctx, changes)
}

// applyRestored writes changes that no event reports. A conflict is returned as it is.
func (s *Store) applyRestored(ctx context.Context, changes []backend.Change) error {
	if len(changes) == 0 {
		return nil
	}
	err := s.backend.Apply(ctx, changes...)
	if err != nil && !errors.Is(err, backend.ErrConflict) {
		return s.scanError(ctx, "restore", err)
	}
	return err
}
