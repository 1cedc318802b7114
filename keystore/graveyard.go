package keystore

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The graveyard is the key space of the graves. A purged key has no record in the key space, so
// that no list and no count reads the key again. A grave keeps what remains of the key: the ID, the
// revision, the time of the purge, and the time of the creation or of the import. A grave stays
// forever, so that Restore cannot bring the key back.
//
// A grave is full or empty. A full grave is the record of a purged key. An empty grave belongs to a
// key that Restore has added, and says nothing else.
//
// The invariants:
//
//  1. No key has both a record and a full grave. A full grave never changes. So a purged key stays
//     purged.
//  2. Purge, Restore and Import are the only changes that delete a record, or add a record of an ID
//     that may have existed before. In the same Apply, each of these changes writes the grave, with
//     the revision of the grave that the change has read. No change deletes a grave. An Import that
//     has found no grave writes none, and checks that there is still none: see Change.Check.
//  3. No event of a key follows the event that filled its grave. So a full grave needs no stamp of
//     the last event, as the record of a key in a store of several processes does.
//
// Invariant 3 follows from invariant 1: a key with a full grave has no record, only Restore and
// Import change a key without a record, and both leave a full grave alone. Invariant 1 follows from
// invariant 2. Suppose that Restore finds neither a record nor a grave. Then another Restore adds
// the key, and a Purge removes the key. Now the backend again has no record, and the revision of
// the record alone would not show that time has passed. But the revision of the grave does: the
// first Restore expects no grave, and gets ErrConflict. For this reason, a Restore that adds a key
// writes an empty grave, and all entries of the graveyard stay. The Check of an Import finds the
// grave of the Purge, too. An empty grave also says that the record does not lead to the first
// event of the key: see index.go. Create writes no grave, because no change can have used the ID of
// the new key before.

func graveKey(id token.ID) []byte {
	return append(append(make([]byte, 0, 1+len(id)), graveSpace), id[:]...)
}

// parseGrave decodes an entry of the graveyard. The record is nil if the grave is empty. If the
// grave is damaged, parseGrave returns the error and a keyRecord that has only the ID.
func parseGrave(e backend.Entry) (*keyRecord, error) {
	if len(e.Key) != 1+len(token.ID{}) || e.Key[0] != graveSpace {
		return nil, fmt.Errorf("%w: the storage key %x is not in the form of a grave", ErrCorrupt,
			e.Key)
	}
	kr := &keyRecord{id: token.ID(e.Key[1:]), revision: e.Revision}
	if len(e.Value) == 0 {
		return kr, nil
	}
	r, err := record.Decode(e.Value)
	if err == nil && r.Status != record.Status_STATUS_PURGED {
		err = errors.New("the grave holds a key that is not purged")
	}
	if err != nil {
		return &keyRecord{id: kr.id}, fmt.Errorf("%w: purged key %s: %w", ErrCorrupt, kr.id, err)
	}
	kr.record = r
	return kr, nil
}

// readGrave returns the grave of a key. The record is nil if the grave is empty, or if there is no
// grave. The revision is 0 if there is no grave.
func (s *Store) readGrave(ctx context.Context, id token.ID) (*keyRecord, error) {
	e, err := s.backend.Get(ctx, graveKey(id))
	if errors.Is(err, backend.ErrNotFound) {
		return &keyRecord{id: id}, nil
	}
	if err != nil {
		return nil, s.scanError(ctx, "read a grave", err)
	}
	return parseGrave(e)
}

// purge turns the record of a key into the record of its grave.
func purge(r *record.Record, at time.Time) {
	first := firstStamp(r)
	r.Reset()
	r.Status, r.PurgedAt, r.CreatedAt = record.Status_STATUS_PURGED, toNanos(at), first
}
