// Package commitfile keeps the file LAST, which stores the two newest commits a second time, next
// to Badger. The comment on File says why, and what Open does with the two commits.
//
// Package commitfile reads and writes one file. The package does not know Badger's files, and does
// not compare the two commits with Badger: package survey does. A commit is a summary and some
// writes to the package, whatever the writes mean.
package commitfile

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

// Name is the name of the file LAST; see File.
const Name = "LAST"

// A File is the file LAST next to Badger's files. LAST stores the two newest commits a second time.
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
type File struct {
	file *os.File
}

const (
	// Magic begins each slot.
	Magic      = "apikeys1"
	headerSize = len(Magic) + 16 + 8 + 8 + 8 + 4
	// The two slots are SlotSize apart. SlotSize is larger than any commit: a group, and one
	// request that did not fit into the group.
	SlotSize = 704 << 10
)

// A Record is the content of a slot: the state of the store after a commit, and the writes of the
// commit. The writes are left out if they were no longer known when the record was written. A
// commit without writes cannot be made again.
type Record struct {
	layout.Summary
	Writes []layout.Write
}

func (r Record) encode() []byte {
	length := 0
	for _, w := range r.Writes {
		length += 6 + len(w.Key) + len(w.Value)
	}
	b := append(make([]byte, 0, headerSize+length+sha256.Size), Magic...)
	b = r.Summary.Append(b)
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	for _, w := range r.Writes {
		b = binary.BigEndian.AppendUint16(b, uint16(len(w.Key)))
		b = binary.BigEndian.AppendUint32(b, uint32(len(w.Value)))
		b = append(append(b, w.Key...), w.Value...)
	}
	hash := sha256.Sum256(b)
	return append(b, hash[:]...)
}

// decodeRecord returns the record at the beginning of b, and false if the record is not whole.
func decodeRecord(b []byte) (Record, bool) {
	if len(b) < headerSize+sha256.Size || string(b[:len(Magic)]) != Magic {
		return Record{}, false
	}
	end := uint64(headerSize) + uint64(binary.BigEndian.Uint32(b[headerSize-4:]))
	if end+sha256.Size > uint64(len(b)) ||
		sha256.Sum256(b[:end]) != [sha256.Size]byte(b[end:end+sha256.Size]) {
		return Record{}, false
	}
	var r Record
	r.Summary, _ = layout.ParseSummary(b[len(Magic) : headerSize-4])
	for rest := b[headerSize:end]; len(rest) > 0; {
		if len(rest) < 6 {
			return Record{}, false
		}
		key := uint64(binary.BigEndian.Uint16(rest))
		value := uint64(binary.BigEndian.Uint32(rest[2:]))
		if rest = rest[6:]; key+value > uint64(len(rest)) {
			return Record{}, false
		}
		w := layout.Write{Key: rest[:key:key], Value: rest[key : key+value : key+value]}
		r.Writes = append(r.Writes, w)
		rest = rest[key+value:]
	}
	return r, true
}

// Open opens the file. The error matches fs.ErrNotExist if the file does not exist.
func Open(dir string) (*File, error) {
	f, err := os.OpenFile(filepath.Join(dir, Name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	// A process that was killed may have left a commit in the file that is not on the disk yet. The
	// next commit overwrites the other slot. So the first commit must be synced before.
	if err := f.Sync(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &File{f}, nil
}

// Close closes the file. Close does nothing if f is nil.
func (f *File) Close() error {
	if f == nil {
		return nil
	}
	return f.file.Close()
}

// Create creates the file of a new store, and returns commit 0.
func Create(dir string) (*File, Record, error) {
	var r Record
	_, _ = rand.Read(r.Store[:]) // Read never fails
	f, err := os.OpenFile(filepath.Join(dir, Name), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, Record{}, err
	}
	c := &File{f}
	c.Preallocate()
	if err := errors.Join(c.Write(r), f.Sync(), fsys.SyncDir(dir)); err != nil {
		return nil, Record{}, errors.Join(err, c.Close())
	}
	return c, r, nil
}

// CreateWith creates the file of a recovered store, with one commit. The error matches
// fs.ErrExist if the file exists.
func CreateWith(dir string, r Record) error {
	f, err := os.OpenFile(filepath.Join(dir, Name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return errors.Join((&File{f}).Write(r), f.Close())
}

// Stat describes the open file, even if the file was removed from its directory.
func (f *File) Stat() (os.FileInfo, error) { return f.file.Stat() }

// Preallocate allocates the full space of the file. False means that the file does not have all of
// the space: see fsys.Allocate. A copy of the file may lack space.
func (f *File) Preallocate() bool { return fsys.Allocate(f.file, 2*SlotSize) }

// Write makes a commit durable in its slot.
func (f *File) Write(r Record) error {
	if _, err := f.file.WriteAt(r.encode(), int64(r.Seq%2)*SlotSize); err != nil {
		return err
	}
	return fsys.Datasync(f.file)
}

// A Kind classifies a file LAST.
type Kind int

const (
	Blank   Kind = iota // the first commit was not written: the store was never open
	Ours                // a store wrote the file, whether or not a commit is whole
	Unknown             // the file shows no sign of a store
)

// Records returns the whole commits, the older commit first, and the kind of the file.
func (f *File) Records() (records []Record, kind Kind, err error) {
	kind = Blank
	buf := make([]byte, SlotSize)
	for i := range 2 {
		n, err := f.file.ReadAt(buf, int64(i)*SlotSize)
		if err != nil && err != io.EOF {
			return nil, 0, err
		}
		switch {
		case bytes.HasPrefix(buf[:n], []byte(Magic)):
			kind = Ours
		case kind == Blank && !(i == 0 && isBlank(buf[:n])) && n > 0:
			kind = Unknown
		}
		if r, ok := decodeRecord(buf[:n]); ok && r.Seq%2 == uint64(i) {
			for j := range r.Writes { // copy out of buf
				w := &r.Writes[j]
				w.Key, w.Value = append([]byte(nil), w.Key...), append([]byte(nil), w.Value...)
			}
			records = append(records, r)
		}
	}
	if len(records) == 2 && records[0].Seq > records[1].Seq {
		records[0], records[1] = records[1], records[0]
	}
	return records, kind, nil
}

// isBlank reports whether data is what a crash leaves while the first commit is being written.
func isBlank(data []byte) bool {
	return len(data) <= headerSize+sha256.Size && len(bytes.Trim(data, "\x00")) == 0
}

// Newest returns the summary of the newest commit in the file LAST of a directory. Newest returns
// the zero summary if LAST does not exist, or holds no whole commit.
func Newest(dir string) (layout.Summary, error) {
	f, err := os.Open(filepath.Join(dir, Name))
	if errors.Is(err, fs.ErrNotExist) {
		return layout.Summary{}, nil
	}
	if err != nil {
		return layout.Summary{}, err
	}
	defer f.Close()
	records, _, err := (&File{f}).Records()
	if err != nil || len(records) == 0 {
		return layout.Summary{}, err
	}
	return records[len(records)-1].Summary, nil
}

// ErrNoRecord means that no slot of the file is whole.
var ErrNoRecord = errors.New(Name + " holds no whole commit")
