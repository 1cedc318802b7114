package keystore

import (
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A keyRecord is a record with the backend's ID and revision of the record.
type keyRecord struct {
	id       token.ID
	record   *record.Record
	revision uint64

	balance *backend.Change // what a change of the key writes to the balance; nil: nothing
}

// parseKeyRecord decodes the backend's entry of a key. If the record is damaged, parseKeyRecord
// returns the error and a keyRecord that has only the ID.
func parseKeyRecord(e backend.Entry) (*keyRecord, error) {
	return parseKeyRecordTo(new(record.Record), e)
}

// parseKeyRecordTo is parseKeyRecord with the memory of a record that is no longer needed.
func parseKeyRecordTo(r *record.Record, e backend.Entry) (*keyRecord, error) {
	if len(e.Key) != 1+len(token.ID{}) || e.Key[0] != keySpace {
		return nil, fmt.Errorf("%w: the storage key %x is not a key's", ErrCorrupt, e.Key)
	}
	id := token.ID(e.Key[1:])
	if err := record.DecodeTo(r, e.Value); err != nil {
		return &keyRecord{id: id}, fmt.Errorf("%w: key %s: %w", ErrCorrupt, id, err)
	}
	return &keyRecord{id: id, record: r, revision: e.Revision}, nil
}

// purged reports whether the key was purged, so that only the revision of the key remains.
func (kr *keyRecord) purged() bool { return kr.record.Status == record.Status_STATUS_PURGED }

func newRecord(spec Spec, prefix string, d hashing.Digest, now time.Time) *record.Record {
	r := &record.Record{
		Format:       record.Format,
		Status:       record.Status_STATUS_ACTIVE,
		DigestScheme: d.Scheme,
		Digest:       d.Sum,
		Prefix:       prefix,
		CreatedAt:    toNanos(now),
	}
	spec.writeTo(r)
	if spec.Credits != nil {
		r.CreditsRevision = 1 // the revision of a new key
	}
	return r
}

// These limits apply to a key that Restore takes from a backup. The limits leave space for every
// later change of the key: a key that cannot be revoked must not get into a store. No store
// writes a backup that is beyond the limits.
const (
	maxSavedRevision  = 1 << 62
	maxSavedRotations = 1 << 31
	// A record of maxRecordSize is smaller, even with a previous digest and two reasons.
	maxSavedSize = 24 << 10
)

// parseSavedRecord is parseKeyRecord for an entry of a backup. parseSavedRecord refuses entries
// beyond the limits.
func parseSavedRecord(e backend.Entry) (*keyRecord, error) {
	parse := parseKeyRecord
	if e.Key[0] == graveSpace {
		parse = parseGrave
	}
	kr, err := parse(e)
	if err == nil && kr.record == nil {
		err = damagedBackup("a purged key has no record")
	}
	if err != nil {
		return nil, err
	}
	r := kr.record
	if e.Revision > maxSavedRevision || r.Rotations > maxSavedRotations ||
		len(e.Value) > maxSavedSize ||
		len(r.RevokeReason) > maxReason || len(r.DisableReason) > maxReason {
		return nil, damagedBackup(fmt.Sprintf(
			"the revision, the number of rotations or a length of key %s is impossible", kr.id))
	}
	if kr.purged() {
		purge(r, fromNanos(r.PurgedAt)) // a grave keeps nothing else, whatever the backup says
	}
	return kr, nil
}
