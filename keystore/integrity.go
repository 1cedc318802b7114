package keystore

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"math"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// CheckIntegrity reads everything that is stored, and returns ErrCorrupt if any of the data differs
// from what was written, if an index does not lead to the keys and events that there are, or if the
// event of the creation of a key is missing before the end of Options.EventRetention. The text of
// the error says what is damaged. CheckIntegrity checks the state of one moment while the store
// continues to work, takes a few seconds for each million keys, and changes nothing.
//
// Open checks the files, and each use of a key checks the record of the key. Call CheckIntegrity
// from time to time, and before you keep a backup for good. To mend a damaged index, see
// Options.RebuildIndexes.
func (s *Store) CheckIntegrity(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	check, err := s.checkIndexes(ctx)
	if err != nil {
		return err
	}
	c := &integrityCheck{store: s, seed: maphash.MakeSeed()}
	var wg sync.WaitGroup
	var damaged, failed error
	if checker, ok := s.backend.(backend.Checker); ok {
		wg.Go(func() {
			if err := checker.Check(ctx); errors.Is(err, backend.ErrCorrupt) {
				damaged = err
			} else if err != nil {
				failed = s.scanError(ctx, "check", err)
			}
		})
	}
	err = c.run(ctx)
	wg.Wait()
	if err == nil && c.index {
		err = check.complete(ctx) // what another process has not built yet is no damage
	}
	if failed != nil {
		return failed
	}
	if err != nil {
		return err
	}
	if damaged != nil {
		c.damage = append([]error{damaged}, c.damage...)
	}
	if len(c.damage) == 0 {
		return nil
	}
	if c.index {
		c.damage = append(c.damage, errors.New("to mend the indexes, open the store once with "+
			"Options.RebuildIndexes"))
	}
	return fmt.Errorf("keystore: check: %w", errors.Join(c.damage...))
}

// An integrityCheck is one call of CheckIntegrity.
//
// To compare the indexes with the records and events, the check first reads a snapshot, and adds up
// a hash of each index entry that there is, and of each index entry that there should be. The hash
// has a random seed. So equal sums mean equal indexes, at the cost of one scan and of no memory.
// Only if the sums differ, the check looks up each entry, and names the entries that differ.
//
// The sum of the event index needs to know which events have no index entry, because the record of
// their key leads to them. The check expects this of each key that was created since the store has
// indexes and since the swept mark, and was neither restored nor imported: see leads. The
// expectation is wrong for a key that was created while the clock was set back. The look-ups know
// of this exception. So a wrong expectation costs time, and causes no error. If the expectation is
// right and the event is missing, the sums differ, and the look-ups find that the event is lost.
type integrityCheck struct {
	store  *Store
	seed   maphash.Seed
	damage []error

	owners, events indexSum
	// The records of keys that were created at or after since lead to the events of their creation.
	since int64
	// index is true if an index is damaged, so that Options.RebuildIndexes mends the damage.
	index bool
}

// An indexSum compares an index with what the index should be.
type indexSum struct{ is, should uint64 }

// enough is how many damaged entries the error names.
const enough = 16

// note notes damage, and reports whether the check should continue.
func (c *integrityCheck) note(err error) bool {
	c.damage = append(c.damage, err)
	if len(c.damage) == enough {
		c.damage = append(c.damage, errors.New("and there may be more"))
	}
	return len(c.damage) < enough
}

func (c *integrityCheck) run(ctx context.Context) error {
	if err := c.readSnapshot(ctx); err != nil || len(c.damage) > 0 {
		return err // damaged entries have no place in the sums
	}
	if c.owners.is != c.owners.should {
		if err := c.compareOwners(ctx); err != nil {
			return err
		}
	}
	if c.events.is != c.events.should {
		if err := c.compareEvents(ctx); err != nil {
			return err
		}
		return c.findCreations(ctx)
	}
	return nil
}

// readSince sets since.
func (c *integrityCheck) readSince(ctx context.Context) error {
	swept, _, err := c.store.sweptMark(ctx)
	if errors.Is(err, ErrCorrupt) {
		swept, err = math.MaxInt64, nil // the scan of the snapshot reports the damage
	}
	c.since = max(1, c.store.indexedSince, swept)
	return err
}

// readSnapshot parses every entry, and adds up the sums.
func (c *integrityCheck) readSnapshot(ctx context.Context) error {
	s := c.store
	if err := c.readSince(ctx); err != nil {
		return err
	}
	graves, stop := s.graves(ctx)
	defer stop()
	for e, err := range s.backend.Snapshot(ctx, nil, nil) {
		if err == nil {
			err = c.add(ctx, e, graves)
		} else if errors.Is(err, backend.ErrCorrupt) {
			err = fmt.Errorf("%w; the entries after the damage were not checked", err)
		}
		if errors.Is(err, ErrCorrupt) {
			if !c.note(err) {
				return nil
			}
		} else if err != nil {
			return s.scanError(ctx, "check", err)
		}
	}
	return nil
}

// add parses an entry of the snapshot, and adds the entry to the sums. The error wraps ErrCorrupt
// if the entry is damaged.
func (c *integrityCheck) add(ctx context.Context, e backend.Entry, graves *gravePointer) error {
	switch e.Key[0] {
	case eventSpace:
		event, err := parseEvent(e)
		if err != nil {
			return err
		}
		c.events.should += c.hashEvent(token.ID(event.KeyId), stampOf(e.Key))
	case graveSpace:
		grave, err := parseGrave(e)
		if err != nil {
			return err
		}
		if grave.record != nil && c.leads(grave) {
			c.events.should -= c.hashEvent(grave.id, firstStamp(grave.record))
		}
	case keySpace:
		kr, err := parseKeyRecord(e)
		if err != nil {
			return err
		}
		if kr.record.CreditsRevision != 0 {
			if err := c.findBalance(ctx, kr.id); err != nil {
				return err
			}
		}
		if kr.record.Owner != "" {
			c.owners.should += c.hash(ownerKey(kr.record.Owner, kr.id))
		}
		grave, err := graves.find(kr.id)
		if err != nil {
			return err
		}
		switch {
		case grave == nil:
			if c.leads(kr) {
				c.events.should -= c.hashEvent(kr.id, firstStamp(kr.record))
			}
		case grave.record != nil:
			return c.bothLiveAndDead(ctx, kr.id)
		}
	case ownerIndexSpace:
		if _, err := parseOwnerKey(e); err != nil {
			c.index = true
			return err
		}
		c.owners.is += c.hash(e.Key)
	case eventIndexSpace:
		if _, _, err := parseEventIndexKey(e); err != nil {
			c.index = true
			return err
		}
		c.events.is += c.hash(e.Key)
	default:
		return checkEntry(e)
	}
	return nil
}

// findBalance returns ErrCorrupt if a key with credits has no balance.
func (c *integrityCheck) findBalance(ctx context.Context, id token.ID) error {
	there, err := c.has(ctx, creditKey(id))
	if err != nil || there {
		return err
	}
	kr, err := c.store.get(ctx, id)
	if errors.Is(err, ErrNotFound) || err == nil && kr.record.CreditsRevision == 0 {
		return nil // the key was purged or changed after the snapshot
	}
	if err != nil {
		return err
	}
	return noBalance(id)
}

// leads reports whether the record of a key or of a full grave should lead to the event of the
// creation or of the import of the key. The key has no grave, or the record is the record of its
// grave.
func (c *integrityCheck) leads(kr *keyRecord) bool { return firstStamp(kr.record) >= c.since }

func (c *integrityCheck) hash(key []byte) uint64 { return maphash.Bytes(c.seed, key) }

func (c *integrityCheck) hashEvent(id token.ID, stamp int64) uint64 {
	return c.hash(eventIndexKey(id, stamp))
}

// A gravePointer reads the graveyard in order, beside a scan of the keys in the same order.
type gravePointer struct {
	next    func() (backend.Entry, error, bool)
	current *keyRecord // nil: there is no further grave
}

// graves returns a gravePointer before the first grave.
func (s *Store) graves(ctx context.Context) (p *gravePointer, stop func()) {
	from, to := spaceOf(graveSpace)
	next, stop := iter.Pull2(s.backend.Scan(ctx, from, to))
	return &gravePointer{next: next, current: &keyRecord{}}, stop
}

// find returns the grave of a key, or nil. The IDs of the calls ascend.
func (p *gravePointer) find(id token.ID) (*keyRecord, error) {
	for p.current != nil && string(p.current.id[:]) < string(id[:]) {
		e, err, ok := p.next()
		if !ok {
			p.current = nil
			break
		}
		if err != nil {
			return nil, err
		}
		grave, err := parseGrave(e)
		if err != nil {
			continue // the scan of the snapshot reports the damage
		}
		p.current = grave
	}
	if p.current == nil || p.current.id != id {
		return nil, nil
	}
	return p.current, nil
}

// bothLiveAndDead returns ErrCorrupt if a key has both a record and a full grave.
func (c *integrityCheck) bothLiveAndDead(ctx context.Context, id token.ID) error {
	// A full grave never changes, and no record appears beside a full grave. So a record that is
	// there after the grave is damage.
	grave, err := c.store.readGrave(ctx, id)
	if err != nil || grave.record == nil {
		return err
	}
	_, err = c.store.get(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return nil // the key was purged after the snapshot
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: key %s is purged, and is still there", ErrCorrupt, id)
}

// compareOwners looks up each key with an owner in the owner index, and each entry of the owner
// index in the keys. While an entry does not match, other changes may change the key. So
// compareOwners reads again, and notes damage only if the record is the same before and after the
// index entry was read: every change of the index entry changes the record too.
func (c *integrityCheck) compareOwners(ctx context.Context) error {
	err := c.scan(ctx, keySpace, func(e backend.Entry) error {
		kr, err := parseKeyRecord(e)
		if err != nil || kr.record.Owner == "" {
			return err
		}
		key := ownerKey(kr.record.Owner, kr.id)
		there, err := c.has(ctx, key)
		if err != nil || there {
			return err
		}
		return c.checkOwner(ctx, kr.id, nil)
	})
	if err != nil {
		return err
	}
	return c.scan(ctx, ownerIndexSpace, func(e backend.Entry) error {
		id, err := parseOwnerKey(e)
		if err != nil {
			return err
		}
		return c.checkOwner(ctx, id, e.Key)
	})
}

// checkOwner checks that the owner index leads to a key, or, if entry is not nil, that the key has
// the owner of this entry.
func (c *integrityCheck) checkOwner(ctx context.Context, id token.ID, entry []byte) error {
	for range changeAttempts {
		owner, revision, err := c.ownerOf(ctx, id)
		if err != nil {
			return err
		}
		should := ownerKey(owner, id)
		if entry == nil && should == nil || entry != nil && string(should) == string(entry) {
			return nil
		}
		looked := entry
		if entry == nil {
			looked = should
		}
		there, err := c.has(ctx, looked)
		if err != nil || there == (entry == nil) {
			return err
		}
		_, now, err := c.ownerOf(ctx, id)
		switch {
		case err != nil:
			return err
		case now != revision: // another change has come in between
		case entry == nil:
			return c.damagedIndex("the owner index does not lead to key %s", id)
		default:
			return c.damagedIndex("the owner index leads to key %s, which does not exist or has "+
				"another owner", id)
		}
	}
	return nil // others keep changing the key
}

// damagedIndex returns ErrCorrupt for an entry of an index that is missing or wrong.
func (c *integrityCheck) damagedIndex(format string, args ...any) error {
	c.index = true
	return fmt.Errorf("%w: "+format, append([]any{ErrCorrupt}, args...)...)
}

// ownerOf returns the owner of a key, and the revision of the record. Without a record, the results
// are empty and 0.
func (c *integrityCheck) ownerOf(
	ctx context.Context, id token.ID,
) (owner string, revision uint64, err error) {
	kr, err := c.store.get(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return "", 0, nil
	}
	if err != nil {
		return "", 0, err
	}
	return kr.record.Owner, kr.revision, nil
}

// compareEvents looks up each event in the event index, and each entry of the event index in the
// events. The sweep removes an event and its index entry together, and no change adds either of
// them later. So compareEvents notes damage only if what it has found is still there after it has
// missed the other.
func (c *integrityCheck) compareEvents(ctx context.Context) error {
	s := c.store
	err := c.scan(ctx, eventSpace, func(e backend.Entry) error {
		event, err := parseEvent(e)
		if err != nil {
			return err
		}
		id, stamp := token.ID(event.KeyId), stampOf(e.Key)
		there, err := c.has(ctx, eventIndexKey(id, stamp))
		if err != nil || there {
			return err
		}
		if isFirst(event) {
			first, err := s.readFirstStamp(ctx, id)
			if err != nil || first == stamp {
				return err
			}
		}
		there, err = c.has(ctx, e.Key)
		if err != nil || !there {
			return err
		}
		return c.damagedIndex("the event index does not lead to the event of %s of key %s",
			fromNanos(stamp), id)
	})
	if err != nil {
		return err
	}
	return c.scan(ctx, eventIndexSpace, func(e backend.Entry) error {
		id, stamp, err := parseEventIndexKey(e)
		if err != nil {
			return err
		}
		f, err := s.eventOf(ctx, id, stamp)
		if err != nil || f.event != nil {
			return err
		}
		there, err := c.has(ctx, e.Key)
		if err != nil || !there {
			return err
		}
		return c.damagedIndex("the event index leads to an event of %s of key %s, which does "+
			"not exist", fromNanos(stamp), id)
	})
}

// findCreations looks up the event of the creation of each key whose record or grave should lead to
// the event. compareEvents cannot find that such an event is lost, because the event may have no
// index entry.
func (c *integrityCheck) findCreations(ctx context.Context) error {
	err := c.scan(ctx, graveSpace, func(e backend.Entry) error {
		grave, err := parseGrave(e)
		if err != nil || grave.record == nil {
			return err
		}
		return c.findCreation(ctx, grave)
	})
	if err != nil {
		return err
	}
	return c.scan(ctx, keySpace, func(e backend.Entry) error {
		kr, err := parseKeyRecord(e)
		if err != nil || kr.purged() {
			return err
		}
		return c.findCreation(ctx, kr)
	})
}

// findCreation looks up the event of the creation of a key. The record is the record of the key or
// of its grave. The key may change during the look-up, but only a sweep removes the event.
func (c *integrityCheck) findCreation(ctx context.Context, kr *keyRecord) error {
	s, first := c.store, firstStamp(kr.record)
	if !c.leads(kr) {
		return nil
	}
	found, err := s.eventOf(ctx, kr.id, first)
	isCreation := func(f foundEvent) bool { return f.event != nil && isFirst(f.event) }
	if err != nil || isCreation(found) {
		return err
	}
	if !kr.purged() {
		e, err := s.backend.Get(ctx, graveKey(kr.id))
		if err == nil && len(e.Value) == 0 {
			return nil // a Restore has added the key
		}
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
	}
	// If the clock was set back, the event has a later stamp, and the event index leads to the
	// event.
	indexed, damaged := false, error(nil)
	_, err = s.indexedEvents(ctx, kr.id, false, first, math.MaxInt64-1,
		func(f foundEvent, err error) bool {
			if err != nil {
				damaged = err
				return true
			}
			indexed = isCreation(f)
			return !indexed
		})
	if err == nil {
		err = damaged
	}
	if err != nil || indexed {
		return err
	}
	if err := c.readSince(ctx); err != nil || !c.leads(kr) {
		return err // a sweep has removed the event since
	}
	return fmt.Errorf("%w: the event of the creation of key %s is missing", ErrCorrupt, kr.id)
}

// scan calls check for each entry of a key space, and notes the damage that check returns. scan
// returns any other error of check.
func (c *integrityCheck) scan(
	ctx context.Context, space byte, check func(backend.Entry) error,
) error {
	s := c.store
	if len(c.damage) >= enough {
		return nil
	}
	from, to := spaceOf(space)
	for e, err := range s.backend.Scan(ctx, from, to) {
		if err == nil {
			err = check(e)
		}
		if errors.Is(err, ErrNotFound) {
			err = nil // the key is gone
		}
		if errors.Is(err, ErrCorrupt) {
			if !c.note(err) {
				return nil
			}
		} else if err != nil {
			return s.scanError(ctx, "check", err)
		}
	}
	return nil
}

// has reports whether the backend has an entry.
func (c *integrityCheck) has(ctx context.Context, key []byte) (bool, error) {
	_, err := c.store.backend.Get(ctx, key)
	if errors.Is(err, backend.ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}
