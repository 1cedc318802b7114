package pgstore

import (
	"encoding/binary"
	"errors"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A row of the log has the entries that one Apply has changed, one after the other: the length of
// the key as a varint, the key, the revision in 8 bytes, the length of the value as a varint, and
// the value. A deleted entry has revision 0 and no value. PostgreSQL does not look into a row, so a
// change costs the server a copy of its bytes.

// appendRow returns the row of the log for the changes of one Apply, and whether one of the changes
// deletes an entry.
func appendRow(changes []backend.Change) (row []byte, deletes bool) {
	const most = 2*binary.MaxVarintLen32 + 8
	size := 0
	for i := range changes {
		size += most + len(changes[i].Key) + len(changes[i].Value)
	}
	row = make([]byte, 0, size)
	for i := range changes {
		c := &changes[i]
		if c.Check {
			continue
		}
		revision := uint64(0)
		if c.Delete {
			deletes = true
		} else {
			revision = c.NewRevision()
		}
		row = binary.AppendUvarint(row, uint64(len(c.Key)))
		row = append(row, c.Key...)
		row = binary.BigEndian.AppendUint64(row, revision)
		row = binary.AppendUvarint(row, uint64(len(c.Value)))
		row = append(row, c.Value...)
	}
	return row, deletes
}

var errRow = errors.New("a row of the log is damaged: another program has changed the row")

// parseRow returns the entries of a row of the log whose keys are in the range. If to is nil, there
// is no upper end. The entries use the memory of the row.
func parseRow(row, from, to []byte) (entries []backend.Entry, err error) {
	part := func() (part []byte, ok bool) {
		n, size := binary.Uvarint(row)
		if size <= 0 || n > uint64(len(row)-size) {
			return nil, false
		}
		part, row = row[size:size+int(n):size+int(n)], row[size+int(n):]
		return part, true
	}
	for len(row) > 0 {
		key, ok := part()
		if !ok || len(row) < 8 {
			return nil, errRow
		}
		revision := binary.BigEndian.Uint64(row)
		row = row[8:]
		value, ok := part()
		if !ok {
			return nil, errRow
		}
		if string(key) < string(from) || to != nil && string(key) >= string(to) {
			continue
		}
		entries = append(entries, backend.Entry{Key: key, Value: value, Revision: revision})
	}
	return entries, nil
}
