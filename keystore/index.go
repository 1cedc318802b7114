package keystore

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The store keeps two indexes in the backend: the keys by owner, and the events by key. An index
// entry is a storage key without a value. Each index entry is written and deleted in the same Apply
// as the record or the event that the index entry leads to. So every backend has the indexes, and
// no crash separates an index from its records.
//
// The invariants:
//
//  1. A key that has an owner and is not purged has exactly one entry in the owner index, under the
//     hash of its owner. There are no other entries in the owner index.
//  2. An event has exactly one entry in the event index, with one exception, and there are no other
//     entries in the event index. The exception is the event of the creation or of the import of a
//     key, if its stamp is the firstStamp of the record of the key, or of the grave. The record
//     leads to this event, and the event need not have an entry. The exception halves the space
//     that the indexes of a new key take.
//
// A reader finds a candidate through an index, and decides by the record or the event. So a reader
// reads a little more if two owners have the same hash. A reader skips an index entry whose record
// is gone by now, or whose record has another owner by now.

// An indexCheck tells a reader of an index whether the index was complete at each moment since
// checkIndexes. The reader asks after it has read a part of the index, and before it uses the part.
// In a store of one process, the indexes are complete, because Open builds them, and the indexCheck
// is nil.
//
// In a store of several processes, a rebuild begins while no other process is a member. But a
// process that was suspended, and was evicted, may wake up during the rebuild, and would miss keys
// and events. The rebuild writes its phase and its beginning before it removes the first entry.
type indexCheck struct {
	store *Store
	began int64 // when the indexes were begun
}

// checkIndexes returns an indexCheck, or ErrUnavailable if the indexes are not complete.
func (s *Store) checkIndexes(ctx context.Context) (*indexCheck, error) {
	if s.processes == nil {
		return nil, nil
	}
	c := &indexCheck{store: s}
	e, err := c.readState(ctx)
	if err != nil {
		return nil, err
	}
	c.began, err = indexesBegan(e)
	return c, err
}

// complete returns ErrUnavailable if the index was incomplete at some moment.
func (c *indexCheck) complete(ctx context.Context) error {
	if c == nil {
		return nil
	}
	e, err := c.readState(ctx)
	if err != nil {
		return err
	}
	return c.completeBy(e)
}

// completeBy is complete for a caller that has read the state after its part of the index: see
// readState.
func (c *indexCheck) completeBy(e backend.Entry) error {
	began, err := indexesBegan(e)
	if err == nil && began != c.began {
		err = wrapErr("read an index", errRebuilt)
	}
	return err
}

// readState returns the entry of the state, with revision 0 if the store has no state yet.
func (c *indexCheck) readState(ctx context.Context) (backend.Entry, error) {
	ctx, cancel := c.store.limitedRead(ctx)
	defer cancel()
	e, err := c.store.backend.Get(ctx, stateKey)
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return e, c.store.scanError(ctx, "read an index", err)
	}
	return e, nil
}

// indexesBegan returns when the present indexes were begun, or ErrUnavailable if they are not
// complete.
func indexesBegan(e backend.Entry) (int64, error) {
	if e.Revision == 0 {
		return 0, nil // no index was ever built: all keys were created with their index entries
	}
	state, err := parseState(e)
	if err != nil {
		return 0, wrapErr("read an index", err)
	}
	if state.index.phase != phaseDone {
		err = wrapErr("read an index", errRebuilt)
	}
	return state.index.since, err
}

var errRebuilt = errors.New("another process builds the indexes of the store: try again later")

// ownerHash is how many bytes of the SHA-256 of an owner the owner index has.
const ownerHash = 8

// ownerPrefix returns how the storage keys of an owner begin in the owner index. An ID follows.
func ownerPrefix(owner string) []byte {
	sum := sha256.Sum256([]byte(owner))
	b := append(make([]byte, 0, 1+ownerHash+len(token.ID{})), ownerIndexSpace)
	return append(b, sum[:ownerHash]...)
}

// ownerKey returns the storage key of a key in the owner index, or nil if the owner is empty.
func ownerKey(owner string, id token.ID) []byte {
	if owner == "" {
		return nil
	}
	return append(ownerPrefix(owner), id[:]...)
}

// parseOwnerKey returns the ID in a storage key of the owner index.
func parseOwnerKey(e backend.Entry) (token.ID, error) {
	if len(e.Key) != 1+ownerHash+len(token.ID{}) || e.Key[0] != ownerIndexSpace ||
		len(e.Value) > 0 {
		return token.ID{}, fmt.Errorf("%w: the storage key %x is not in the form of the "+
			"owner index",
			ErrCorrupt, e.Key)
	}
	return token.ID(e.Key[1+ownerHash:]), nil
}

// eventIndexKey returns the storage key of an event in the event index.
func eventIndexKey(id token.ID, stamp int64) []byte {
	b := append(append(make([]byte, 0, 1+len(id)+8), eventIndexSpace), id[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(stamp))
}

// parseEventIndexKey returns the ID and the stamp in a storage key of the event index.
func parseEventIndexKey(e backend.Entry) (id token.ID, stamp int64, err error) {
	if len(e.Key) != 1+len(id)+8 || e.Key[0] != eventIndexSpace || len(e.Value) > 0 {
		return id, 0, fmt.Errorf("%w: the storage key %x is not in the form of the event index",
			ErrCorrupt, e.Key)
	}
	return token.ID(e.Key[1:]), int64(binary.BigEndian.Uint64(e.Key[1+len(id):])), nil
}

// firstStamp returns the stamp of the first event of a key, if the record leads to this event: see
// invariant 2. The record of a full grave has the stamp as CreatedAt.
func firstStamp(r *record.Record) int64 { return cmp.Or(r.GetImportedAt(), r.GetCreatedAt()) }

// isFirst reports whether the record of a key may lead to the event.
func isFirst(e *record.Event) bool {
	return e.Action == record.Action_ACTION_CREATE || e.Action == record.Action_ACTION_IMPORT
}

// indexed returns the storage key of the record or of the event that an index entry leads to, or
// nil if the storage key is not in an index. No index entry is added before its record or event.
func indexed(key []byte) []byte {
	e := backend.Entry{Key: key}
	switch key[0] {
	case ownerIndexSpace:
		if id, err := parseOwnerKey(e); err == nil {
			return storageKey(id)
		}
	case eventIndexSpace:
		if _, stamp, err := parseEventIndexKey(e); err == nil {
			return eventKey(stamp)
		}
	}
	return nil
}

// appendOwnerChanges appends the changes of the owner index for a key whose owner changes. An empty
// owner is a key without an owner, or no key.
func appendOwnerChanges(
	changes []backend.Change, id token.ID, before, after string,
) []backend.Change {
	if before == after {
		return changes
	}
	old, now := ownerKey(before, id), ownerKey(after, id)
	if string(old) == string(now) {
		return changes // the owners have the same hash
	}
	if old != nil {
		changes = append(changes, backend.Change{Key: old, Expect: 1, Delete: true})
	}
	if now != nil {
		changes = append(changes, backend.Change{Key: now})
	}
	return changes
}

// mendOwners adapts the changes of the owner index to the backend, after a conflict, and reports
// whether any was adapted. The record of a key guards the index entries of the key against other
// changes. So if the backend lacks an entry that a change deletes, or has an entry that a change
// adds, the index is damaged, or the changes will conflict again. Without mendOwners, a key with a
// damaged index could never be purged or given another owner.
func (s *Store) mendOwners(ctx context.Context, p *prepared) (mended bool, err error) {
	var kept []backend.Change
	for _, c := range p.keyChanges {
		if c.Key[0] == ownerIndexSpace {
			e, err := s.backend.Get(ctx, c.Key)
			if err != nil && !errors.Is(err, backend.ErrNotFound) {
				return false, s.scanError(ctx, "read the owner index", err)
			}
			mended = mended || e.Revision != c.Expect
			if e.Revision != c.Expect && c.Delete == (e.Revision == 0) {
				continue // the backend is already as the change would make the backend
			}
			c.Expect = e.Revision
		}
		kept = append(kept, c)
	}
	p.keyChanges = kept
	return mended, nil
}
