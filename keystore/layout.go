package keystore

import (
	"encoding/binary"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The layout of the backend:
//
//	'e' stamp[8]   a record.Event; the stamp is the time of the event in nanoseconds since the
//	               Unix epoch, or a little later
//	'h' scheme     a check value of the Hasher: the digest of a fixed text
//	'k' id[16]     a record.Record
//	'u' id[16]     the minute of the key's last use since the Unix epoch, as a varint
//	'w'            the time since when all uses are known, in nanoseconds since the Unix epoch,
//	               in 8 bytes; and a byte: 1 if every later use is written and no store is open,
//	               or else 0
//
// All numbers are big-endian. UUIDv7s sort by creation, and so do the keys.
const (
	eventSpace = 'e'
	checkSpace = 'h'
	keySpace   = 'k'
	usageSpace = 'u'
)

// usageStateKey is the storage key of the usageState.
var usageStateKey = []byte{'w'}

func eventKey(stamp int64) []byte {
	return binary.BigEndian.AppendUint64([]byte{eventSpace}, uint64(stamp))
}

func stampOf(key []byte) int64 { return int64(binary.BigEndian.Uint64(key[1:])) }

func checkKey(scheme string) []byte { return append([]byte{checkSpace}, scheme...) }

func storageKey(id token.ID) []byte {
	return append(append(make([]byte, 0, 1+len(id)), keySpace), id[:]...)
}

func usageKey(id token.ID) []byte { return append([]byte{usageSpace}, id[:]...) }

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
	case checkSpace:
		_, err = parseCheck(e)
	case usageStateKey[0]:
		_, err = parseUsageState(e)
	}
	return err
}
