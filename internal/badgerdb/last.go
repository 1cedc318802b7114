package badgerdb

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
)

// lastName is the name of the file LAST; see last.
const lastName = "LAST"

// A last is the file LAST next to Badger's files. LAST stores the two newest commits a second time.
//
// Badger truncates its log at a damaged place, deletes the tables that a damaged manifest does not
// name, and opens without a report. So each commit goes to Badger and to LAST at the same time, and
// is acknowledged when both are durable. Open compares Badger with LAST:
//
//   - Badger has the commits of LAST: all is well.
//   - Badger lacks one of the two commits: Open makes the commit again. Badger's log was cut off
//     during the write, or has been damaged at its very end.
//   - Badger lacks more: acknowledged commits are lost, and Open refuses.
//   - Badger has one commit more than LAST: the commit was not acknowledged yet, or its copy is
//     damaged.
//   - Badger has more commits than that: LAST is an old file, or damaged, and Open refuses.
//
// A commit overwrites the commit before the last. So one of the two slots is whole at any moment,
// whatever happens to the write. The layout of a slot; integers are big-endian:
//
//	magic    [8]byte
//	store    [16]byte  random, drawn when the store was created
//	seq      uint64    the number of the commit, and its timestamp in Badger
//	entries  uint64    the number of entries after the commit
//	sum      uint64    the sum of the checksums of these entries
//	length   uint32    the length of the writes, without the hash
//	          for each write: length of key uint16, length of value uint32, key, value, in the
//	          form that Badger gets
//	hash     [32]byte  SHA-256 of everything before the hash
type last struct {
	file *os.File
}

const (
	slotMagic  = "apikeys1"
	slotHeader = len(slotMagic) + 16 + 8 + 8 + 8 + 4
	// The two slots are slotSize apart. slotSize is larger than any commit: a group, and one
	// request that did not fit into the group.
	slotSize = 704 << 10
)

// A slot is one of the two commits: the state of the store after the commit, and the writes of the
// commit. The writes are left out if they were no longer known when the slot was written. A commit
// without writes cannot be made again.
type slot struct {
	layout.Summary
	writes []layout.Write
}

func (s slot) encode() []byte {
	length := 0
	for _, w := range s.writes {
		length += 6 + len(w.Key) + len(w.Value)
	}
	b := append(make([]byte, 0, slotHeader+length+sha256.Size), slotMagic...)
	b = s.Summary.Append(b)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	for _, w := range s.writes {
		b = binary.BigEndian.AppendUint16(b, uint16(len(w.Key)))
		b = binary.BigEndian.AppendUint32(b, uint32(len(w.Value)))
		b = append(append(b, w.Key...), w.Value...)
	}
	hash := sha256.Sum256(b)
	return append(b, hash[:]...)
}

// decodeSlot returns the slot at the beginning of b, and false if the slot is not whole.
func decodeSlot(b []byte) (slot, bool) {
	if len(b) < slotHeader+sha256.Size || string(b[:len(slotMagic)]) != slotMagic {
		return slot{}, false
	}
	end := uint64(slotHeader) + uint64(binary.BigEndian.Uint32(b[slotHeader-4:]))
	if end+sha256.Size > uint64(len(b)) || sha256.Sum256(b[:end]) != [sha256.Size]byte(b[end:end+sha256.Size]) {
		return slot{}, false
	}
	var s slot
	s.Summary, _ = layout.ParseSummary(b[len(slotMagic) : slotHeader-4])
	for rest := b[slotHeader:end]; len(rest) > 0; {
		if len(rest) < 6 {
			return slot{}, false
		}
		key, value := uint64(binary.BigEndian.Uint16(rest)), uint64(binary.BigEndian.Uint32(rest[2:]))
		if rest = rest[6:]; key+value > uint64(len(rest)) {
			return slot{}, false
		}
		w := layout.Write{Key: rest[:key:key], Value: rest[key : key+value : key+value]}
		s.writes = append(s.writes, w)
		rest = rest[key+value:]
	}
	return s, true
}

// openLast opens the file. The error matches fs.ErrNotExist if the file does not exist.
func openLast(dir string) (*last, error) {
	f, err := os.OpenFile(filepath.Join(dir, lastName), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	// A process that was killed may have left a commit in the file that is not on the disk yet. The
	// next commit overwrites the other slot. So the first commit must be synced before.
	if err := f.Sync(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &last{f}, nil
}

// close closes the file. close does nothing if l is nil.
func (l *last) close() error {
	if l == nil {
		return nil
	}
	return l.file.Close()
}

// beginLast creates the file of a new store, and returns commit 0.
func beginLast(dir string) (*last, slot, error) {
	var s slot
	_, _ = rand.Read(s.Store[:]) // Read never fails
	f, err := os.OpenFile(filepath.Join(dir, lastName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, slot{}, err
	}
	l := &last{f}
	l.reserve()
	if err := errors.Join(l.write(s), f.Sync(), fsys.SyncDir(dir)); err != nil {
		return nil, slot{}, errors.Join(err, l.close())
	}
	return l, s, nil
}

// reserve allocates the full space of the file. A copy of the file may lack space.
func (l *last) reserve() bool { return fsys.Allocate(l.file, 2*slotSize) }

// write makes a commit durable in its slot.
func (l *last) write(s slot) error {
	if _, err := l.file.WriteAt(s.encode(), int64(s.Seq%2)*slotSize); err != nil {
		return err
	}
	return fsys.Datasync(l.file)
}

// A lastKind classifies a file LAST.
type lastKind int

const (
	lastBlank   lastKind = iota // the first commit was not written: the store was never open
	lastOurs                    // a store wrote the file, whether or not a commit is whole
	lastUnknown                 // the file shows no sign of a store
)

// slots returns the whole commits, the older commit first, and the kind of the file.
func (l *last) slots() (slots []slot, kind lastKind, err error) {
	kind = lastBlank
	buf := make([]byte, slotSize)
	for i := range 2 {
		n, err := l.file.ReadAt(buf, int64(i)*slotSize)
		if err != nil && err != io.EOF {
			return nil, 0, err
		}
		switch {
		case bytes.HasPrefix(buf[:n], []byte(slotMagic)):
			kind = lastOurs
		case kind == lastBlank && !(i == 0 && isBlank(buf[:n])) && n > 0:
			kind = lastUnknown
		}
		if s, ok := decodeSlot(buf[:n]); ok && s.Seq%2 == uint64(i) {
			for j := range s.writes { // copy out of buf
				w := &s.writes[j]
				w.Key, w.Value = append([]byte(nil), w.Key...), append([]byte(nil), w.Value...)
			}
			slots = append(slots, s)
		}
	}
	if len(slots) == 2 && slots[0].Seq > slots[1].Seq {
		slots[0], slots[1] = slots[1], slots[0]
	}
	return slots, kind, nil
}

// isBlank reports whether data is what a crash leaves while the first commit is being written.
func isBlank(data []byte) bool {
	return len(data) <= slotHeader+sha256.Size && len(bytes.Trim(data, "\x00")) == 0
}

// newestIn returns the summary of the newest commit in the file LAST of a directory. newestIn returns
// the zero summary if LAST does not exist, or holds no whole commit.
func newestIn(dir string) (layout.Summary, error) {
	f, err := os.Open(filepath.Join(dir, lastName))
	if errors.Is(err, fs.ErrNotExist) {
		return layout.Summary{}, nil
	}
	if err != nil {
		return layout.Summary{}, err
	}
	defer f.Close()
	slots, _, err := (&last{f}).slots()
	if err != nil || len(slots) == 0 {
		return layout.Summary{}, err
	}
	return slots[len(slots)-1].Summary, nil
}

var errNoSlots = errors.New(lastName + " holds no whole commit")
