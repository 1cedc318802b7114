package badgerdb

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// lastName is the file that a last is kept in.
const lastName = "LAST"

// A last is the file LAST beside Badger's: the two newest commits, kept a second time.
//
// Badger cuts its log where that is damaged, deletes the tables that a damaged manifest does not name, and opens without
// a word. So each commit goes to Badger and here at once, and is acknowledged when both are durable. Open compares:
//
//   - Badger has what is here: all is well.
//   - Badger lacks one of these two commits: it is made again. Badger's log was cut off while it was written, or has been
//     damaged at its very end.
//   - Badger lacks more: what was acknowledged is lost, and Open refuses.
//   - Badger has one commit more than is here: it was not acknowledged yet, or its copy is damaged.
//   - Badger has more than that: this file is an old one, or damaged, and Open refuses.
//
// A commit is written over the one before the last, so that one of the two slots is whole at any moment, whatever
// becomes of the write. The layout of a slot; integers are big-endian:
//
//	magic    [8]byte
//	store    [16]byte  drawn when the store was made
//	seq      uint64    the number of the commit, and its timestamp in Badger
//	entries  uint64    how many entries there are after it
//	sum      uint64    the sum of their checksums
//	length   uint32    of what follows, without the hash
//	          for each write: length of key uint16, length of value uint32, key, value, as Badger is given them
//	hash     [32]byte  SHA-256 of all that
type last struct {
	file *os.File
}

const (
	slotMagic  = "apikeys1"
	slotHeader = len(slotMagic) + 16 + 8 + 8 + 8 + 4
	// Two slots, this far apart, are larger than any commit: a group and one request that did not fit into it.
	slotSize = 704 << 10
)

// A head says what the store is after a commit.
type head struct {
	store   [16]byte
	seq     uint64
	entries uint64
	sum     uint64
}

// A slot is one of the two commits: what it made of the store, and what it wrote. That is left out where it was not known
// any more when the slot was written: such a commit cannot be made again.
type slot struct {
	head
	writes []write
}

// A write is an entry as Badger is given it.
type write struct{ key, value []byte }

func (h head) String() string {
	return fmt.Sprintf("commit %d: %d entries, sum %016x", h.seq, h.entries, h.sum)
}

// append adds the head to b. It is also what Badger keeps under headKey.
func (h head) append(b []byte) []byte {
	b = append(b, h.store[:]...)
	b = binary.BigEndian.AppendUint64(b, h.seq)
	b = binary.BigEndian.AppendUint64(b, h.entries)
	return binary.BigEndian.AppendUint64(b, h.sum)
}

const headSize = 16 + 3*8

func parseHead(b []byte) (h head, ok bool) {
	if len(b) != headSize {
		return head{}, false
	}
	copy(h.store[:], b)
	h.seq = binary.BigEndian.Uint64(b[16:])
	h.entries = binary.BigEndian.Uint64(b[24:])
	h.sum = binary.BigEndian.Uint64(b[32:])
	return h, true
}

func (s slot) encode() []byte {
	length := 0
	for _, w := range s.writes {
		length += 6 + len(w.key) + len(w.value)
	}
	b := append(make([]byte, 0, slotHeader+length+sha256.Size), slotMagic...)
	b = s.head.append(b)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	for _, w := range s.writes {
		b = binary.BigEndian.AppendUint16(b, uint16(len(w.key)))
		b = binary.BigEndian.AppendUint32(b, uint32(len(w.value)))
		b = append(append(b, w.key...), w.value...)
	}
	hash := sha256.Sum256(b)
	return append(b, hash[:]...)
}

// decodeSlot returns the slot that b begins with, and false if it is not whole.
func decodeSlot(b []byte) (slot, bool) {
	if len(b) < slotHeader+sha256.Size || string(b[:len(slotMagic)]) != slotMagic {
		return slot{}, false
	}
	end := uint64(slotHeader) + uint64(binary.BigEndian.Uint32(b[slotHeader-4:]))
	if end+sha256.Size > uint64(len(b)) || sha256.Sum256(b[:end]) != [sha256.Size]byte(b[end:end+sha256.Size]) {
		return slot{}, false
	}
	var s slot
	s.head, _ = parseHead(b[len(slotMagic) : slotHeader-4])
	for rest := b[slotHeader:end]; len(rest) > 0; {
		if len(rest) < 6 {
			return slot{}, false
		}
		key, value := uint64(binary.BigEndian.Uint16(rest)), uint64(binary.BigEndian.Uint32(rest[2:]))
		if rest = rest[6:]; key+value > uint64(len(rest)) {
			return slot{}, false
		}
		s.writes = append(s.writes, write{rest[:key:key], rest[key : key+value : key+value]})
		rest = rest[key+value:]
	}
	return s, true
}

// openLast opens the file. The error matches fs.ErrNotExist where there is none.
func openLast(dir string) (*last, error) {
	f, err := os.OpenFile(filepath.Join(dir, lastName), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	// A process that was killed may have left a commit here that is not on the disk yet, while the next one goes over the
	// other slot.
	if err := f.Sync(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &last{f}, nil
}

// close closes the file, if there is one.
func (l *last) close() error {
	if l == nil {
		return nil
	}
	return l.file.Close()
}

// beginLast makes the file of a new store, and returns commit 0.
func beginLast(dir string) (*last, slot, error) {
	var s slot
	_, _ = rand.Read(s.store[:]) // it never fails
	f, err := os.OpenFile(filepath.Join(dir, lastName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, slot{}, err
	}
	l := &last{f}
	l.reserve()
	if err := errors.Join(l.write(s), f.Sync(), syncDir(dir)); err != nil {
		return nil, slot{}, errors.Join(err, l.close())
	}
	return l, s, nil
}

// reserve gives it all of its space, which a copy of the file may not have.
func (l *last) reserve() bool { return allocate(l.file, 2*slotSize) }

// write makes a commit durable in its slot.
func (l *last) write(s slot) error {
	if _, err := l.file.WriteAt(s.encode(), int64(s.seq%2)*slotSize); err != nil {
		return err
	}
	return datasync(l.file)
}

// What a file LAST is.
type lastKind int

const (
	lastBlank   lastKind = iota // its first commit was not written: the store was never open
	lastOurs                    // a store wrote it, whether or not a commit is whole
	lastUnknown                 // it shows no sign of a store
)

// slots returns the commits that are whole, the older one first, and what the file is.
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
		if s, ok := decodeSlot(buf[:n]); ok && s.seq%2 == uint64(i) {
			for j := range s.writes { // out of buf
				w := &s.writes[j]
				w.key, w.value = append([]byte(nil), w.key...), append([]byte(nil), w.value...)
			}
			slots = append(slots, s)
		}
	}
	if len(slots) == 2 && slots[0].seq > slots[1].seq {
		slots[0], slots[1] = slots[1], slots[0]
	}
	return slots, kind, nil
}

// isBlank reports whether a file is what a crash leaves while its first commit is being written.
func isBlank(data []byte) bool {
	return len(data) <= slotHeader+sha256.Size && len(bytes.Trim(data, "\x00")) == 0
}

// newestIn returns the head of the newest commit in a directory's file LAST; the zero head if there
// is none.
func newestIn(dir string) (head, error) {
	f, err := os.Open(filepath.Join(dir, lastName))
	if errors.Is(err, fs.ErrNotExist) {
		return head{}, nil
	}
	if err != nil {
		return head{}, err
	}
	defer f.Close()
	slots, _, err := (&last{f}).slots()
	if err != nil || len(slots) == 0 {
		return head{}, err
	}
	return slots[len(slots)-1].head, nil
}

var errNoSlots = errors.New(lastName + " holds no whole commit")
