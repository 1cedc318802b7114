package layout

import (
	"encoding/binary"
	"fmt"
)

// A Summary describes the store after a commit.
type Summary struct {
	Store   [16]byte // the identity of the store
	Seq     uint64   // the number of the commit, and its timestamp in Badger
	Entries uint64   // the number of entries
	Sum     uint64   // the sum of the checksums of the entries
}

// String describes the summary in error texts.
func (s Summary) String() string {
	return fmt.Sprintf("commit %d: %d entries, sum %016x", s.Seq, s.Entries, s.Sum)
}

// Append adds the summary to b. Badger keeps the same bytes under SummaryKey.
func (s Summary) Append(b []byte) []byte {
	b = append(b, s.Store[:]...)
	b = binary.BigEndian.AppendUint64(b, s.Seq)
	b = binary.BigEndian.AppendUint64(b, s.Entries)
	return binary.BigEndian.AppendUint64(b, s.Sum)
}

const summarySize = 16 + 3*8

// ParseSummary decodes a summary. ok is false if b has another length than a summary.
func ParseSummary(b []byte) (s Summary, ok bool) {
	if len(b) != summarySize {
		return Summary{}, false
	}
	copy(s.Store[:], b)
	s.Seq = binary.BigEndian.Uint64(b[16:])
	s.Entries = binary.BigEndian.Uint64(b[24:])
	s.Sum = binary.BigEndian.Uint64(b[32:])
	return s, true
}
