package layout

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The layout of the entries in Badger:
//
//	key    'e' key                       Badger reserves names in "!badger!" for itself
//	value  revision[8] checksum[8] value, or nothing: the entry has been deleted
//	key    SummaryKey
//	value  the summary: see Summary.Append
//
// The checksum is the beginning of the SHA-256 of the revision, the length of the key, the key, and
// the value. So the checksum detects an entry that was damaged on the disk, or that is stored under
// another key.
const (
	KeyPrefix   = 'e'
	entryHeader = 16
)

// SummaryKey is the key of the summary.
var SummaryKey = []byte("h")

// StoredKey returns the stored form of an entry's key.
func StoredKey(key []byte) []byte {
	return append(append(make([]byte, 0, 1+len(key)), KeyPrefix), key...)
}

// StoredWrite returns the stored form of a change, and the checksum of the entry. For a deletion,
// the value is nil, and the checksum is 0. The key and the value share an allocation.
func StoredWrite(c backend.Change) (Write, uint64) {
	if c.Delete {
		return Write{Key: StoredKey(c.Key)}, 0
	}
	sum := Checksum(c.Key, c.NewRevision(), c.Value)
	key := 1 + len(c.Key)
	b := append(make([]byte, 0, key+entryHeader+len(c.Value)), KeyPrefix)
	b = append(b, c.Key...)
	b = binary.BigEndian.AppendUint64(b, c.NewRevision())
	b = append(binary.BigEndian.AppendUint64(b, sum), c.Value...)
	return Write{Key: b[:key:key], Value: b[key:]}, sum
}

// Checksum returns the checksum of an entry.
func Checksum(key []byte, revision uint64, value []byte) uint64 {
	var buf [512]byte // on the stack; large enough for most entries
	b := binary.BigEndian.AppendUint64(buf[:0], revision)
	b = append(binary.BigEndian.AppendUint16(b, uint16(len(key))), key...)
	hash := sha256.Sum256(append(b, value...))
	return binary.BigEndian.Uint64(hash[:])
}

// ErrDamaged means that an entry does not have the checksum with which the entry was written.
var ErrDamaged = errors.New("it is not what was written")

// A Write is an entry in the form that Badger gets.
type Write struct{ Key, Value []byte }

// ParseEntry decodes an entry from Badger's key and value, and returns the checksum too. The entry
// may keep key and value. ErrNotFound means that the entry is deleted.
func ParseEntry(key, value []byte) (e backend.Entry, sum uint64, err error) {
	key = key[1:]
	if len(value) == 0 {
		return backend.Entry{}, 0, backend.ErrNotFound
	}
	if len(value) < entryHeader {
		return backend.Entry{}, 0, damagedError(key)
	}
	revision := binary.BigEndian.Uint64(value)
	e = backend.Entry{Key: key, Value: value[entryHeader:], Revision: revision}
	sum = binary.BigEndian.Uint64(value[8:])
	if sum != Checksum(e.Key, e.Revision, e.Value) {
		return backend.Entry{}, 0, damagedError(key)
	}
	return e, sum, nil
}

func damagedError(key []byte) error {
	return fmt.Errorf("%w: entry %x: %w", backend.ErrCorrupt, key, ErrDamaged)
}
