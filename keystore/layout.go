package keystore

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The layout of the backend, in the order of the storage keys. The first byte of a storage key is
// its key space.
//
//	'e' stamp[8]           a record.Event; the stamp is the time of the event in nanoseconds since
//	                       the Unix epoch, or a little later
//	'g' id[16]             the grave of a key: the record.Record of a purged key, or nothing: see
//	                       graveyard.go
//	'h' scheme             a check value of the Hasher: the digest of a fixed text
//	'j' id[16]             the record.Balance of a key that has, or had, credits: see balance.go
//	'k' id[16]             the record.Record of a key that is not purged
//	's'                    the swept mark, a stamp: see sweep.go
//	'm'                    the header of the membership table: see package cluster
//	'm' member[16]         the member record of a process that has the store open
//	'n' member[16]         nothing: the guard entry of the process
//	'u' id[16]             the minute of the key's last use since the Unix epoch, as a varint
//	'w'                    the state of the whole store: see storeState
//	'x' id[16] stamp[8]    nothing: the event with this stamp is an event of the key; see index.go
//	'y' hash[8] id[16]     nothing: the owner of the key has this hash; see index.go
//
// All numbers are big-endian. UUIDv7s sort by creation, and so do the keys. The key spaces that
// Backup reads lie together, before the indexes.
const (
	eventSpace      = 'e'
	graveSpace      = 'g'
	checkSpace      = 'h'
	creditSpace     = 'j'
	keySpace        = 'k'
	sweptSpace      = 's'
	memberSpace     = 'm'
	usageSpace      = 'u'
	stateSpace      = 'w'
	eventIndexSpace = 'x'
	ownerIndexSpace = 'y'
)

// spaceOf returns the range of the storage keys of a key space: from <= key < to.
func spaceOf(space byte) (from, to []byte) { return []byte{space}, []byte{space + 1} }

func eventKey(stamp int64) []byte {
	return binary.BigEndian.AppendUint64([]byte{eventSpace}, uint64(stamp))
}

func stampOf(key []byte) int64 { return int64(binary.BigEndian.Uint64(key[1:])) }

func checkKey(scheme string) []byte { return append([]byte{checkSpace}, scheme...) }

func storageKey(id token.ID) []byte {
	return append(append(make([]byte, 0, 1+len(id)), keySpace), id[:]...)
}

func usageKey(id token.ID) []byte {
	return append(append(make([]byte, 0, 1+len(id)), usageSpace), id[:]...)
}

func toNanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// checkEntry parses an entry of any kind.
func checkEntry(e backend.Entry) (err error) {
	switch e.Key[0] {
	case keySpace:
		_, err = parseKeyRecord(e)
	case eventSpace:
		_, err = parseEvent(e)
	case usageSpace:
		_, err = parseUsage(e)
	case creditSpace:
		_, err = parseBalance(e)
	case checkSpace:
		_, err = parseCheck(e)
	case stateSpace:
		_, err = parseState(e)
	case memberSpace:
		if len(e.Key) == 1 {
			_, err = record.DecodeMemberTable(e.Value)
		} else {
			_, err = record.DecodeMember(e.Value)
		}
		if err != nil {
			err = fmt.Errorf("%w: the storage key %x of the membership table: %w", ErrCorrupt,
				e.Key, err)
		}
	case sweptSpace:
		_, err = parseSwept(e)
	case graveSpace:
		_, err = parseGrave(e)
	case ownerIndexSpace:
		_, err = parseOwnerKey(e)
	case eventIndexSpace:
		_, _, err = parseEventIndexKey(e)
	}
	return err
}
