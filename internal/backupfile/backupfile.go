// Package backupfile reads and writes the file of a backup. A file is a stream of entries with a
// checksum, so that a reader finds every damage, and a cut at any place.
//
// The format:
//
//	magic     "grpc-api-key backup\n", and the number of the Form
//	frame...  a length as a varint, and that number of bytes: a record.Saved
//	end       a length of 0
//	trailer   the number of frames, 8 bytes, big-endian; SHA-256 of everything before the sum
//
// The invariants: the keys of the entries ascend, so no two entries have the same key, and no
// revision is 0. The package does not know what an entry means.
package backupfile

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Form is the number of a form. All forms have the same format. A version that does not know the
// entries of a form refuses the form.
type Form byte

const (
	FormKeys   Form = 1 // keys and their last uses
	FormChecks Form = 2 // check values of a Hasher too
	FormGraves Form = 3 // graves of purged keys too, which the other forms have among the keys
	// FormCredits has credits too, and may have check values and graves.
	FormCredits Form = 4
)

const magic = "grpc-api-key backup\n"

const (
	bufferSize = 64 << 10
	maxFrame   = backend.MaxKeySize + backend.MaxValueSize + 64
)

// A Writer writes a file.
type Writer struct {
	w      io.Writer
	sum    hash.Hash     // of all bytes written through out
	out    *bufio.Writer // writes to w and to sum, and keeps its first error for Flush
	frames uint64
	saved  record.Saved // the memory of each frame
}

// NewWriter begins a file.
func NewWriter(w io.Writer, form Form) *Writer {
	sum := sha256.New()
	out := bufio.NewWriterSize(io.MultiWriter(w, sum), bufferSize)
	out.WriteString(magic)
	out.WriteByte(byte(form))
	return &Writer{w: w, sum: sum, out: out}
}

// Write writes the next entry. The caller keeps the invariants. Write returns an error of the
// io.Writer unchanged. The file is then useless.
func (w *Writer) Write(e backend.Entry) error {
	w.saved.Key, w.saved.Value, w.saved.Revision = e.Key, e.Value, e.Revision
	size := proto.Size(&w.saved)
	frame := binary.AppendUvarint(w.out.AvailableBuffer(), uint64(size))
	frame, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(frame, &w.saved)
	if err != nil {
		return err
	}
	w.frames++
	_, err = w.out.Write(frame)
	return err
}

// Close ends the file, and does not close the io.Writer. Close returns an error of the io.Writer
// unchanged.
func (w *Writer) Close() error {
	w.out.WriteByte(0)
	w.out.Write(binary.BigEndian.AppendUint64(nil, w.frames))
	if err := w.out.Flush(); err != nil {
		return err
	}
	_, err := w.w.Write(w.sum.Sum(nil))
	return err
}

// A FormError means that a stream is not a backup, or has an unknown Form.
type FormError string

func (e FormError) Error() string { return string(e) }

// A DamagedError says what is damaged in a file.
type DamagedError string

func (e DamagedError) Error() string { return "the backup is damaged: " + string(e) }

// A Reader reads a file. The memory of a Reader is limited, whatever the stream contains.
type Reader struct {
	in     *bufio.Reader // the whole stream, including the checksum in the trailer
	sum    hash.Hash     // of all bytes that the Reader has taken from in
	frames int
	last   []byte // the key of the last entry
}

// NewReader reads the beginning of a file. The error is a FormError, or an error of the io.Reader,
// unchanged.
func NewReader(r io.Reader) (*Reader, error) {
	f := &Reader{in: bufio.NewReaderSize(r, bufferSize), sum: sha256.New()}
	head, err := f.take(len(magic) + 1)
	if err == errCut || err == nil && string(head[:len(magic)]) != magic {
		return nil, FormError("the stream is not a backup, or it is damaged at its very beginning")
	}
	if err != nil {
		return nil, err
	}
	if form := Form(head[len(magic)]); form < FormKeys || form > FormCredits {
		return nil, FormError(fmt.Sprintf("the backup has form %d, and this program knows "+
			"%d to %d: upgrade the program", form, FormKeys, FormCredits))
	}
	return f, nil
}

// Next returns the next entry. After the last entry, Next checks the trailer, and returns io.EOF if
// the file is whole. Any other error is a DamagedError, or an error of the io.Reader, unchanged. Do
// not call Next after an error. The entries are certain only after io.EOF.
func (r *Reader) Next() (backend.Entry, error) {
	size, err := r.size()
	if err != nil {
		return backend.Entry{}, err
	}
	if size == 0 {
		return backend.Entry{}, r.end()
	}
	frame, err := r.take(size)
	if err != nil {
		return backend.Entry{}, err
	}
	var e record.Saved
	if err := proto.Unmarshal(frame, &e); err != nil || len(e.Key) == 0 {
		return backend.Entry{}, DamagedError("an entry cannot be read")
	}
	if bytes.Compare(r.last, e.Key) >= 0 {
		return backend.Entry{}, DamagedError("its entries are not in order")
	}
	if e.Revision == 0 {
		return backend.Entry{}, DamagedError("it has an entry without a revision")
	}
	r.frames++
	r.last = e.Key
	return backend.Entry{Key: e.Key, Value: e.Value, Revision: e.Revision}, nil
}

// Frames returns the number of entries that Next has returned.
func (r *Reader) Frames() int { return r.frames }

// Sum returns a checksum of everything that was read. Two files with the same checksum at the end
// have the same content.
func (r *Reader) Sum() []byte { return r.sum.Sum(nil) }

// size reads the length of the next frame.
func (r *Reader) size() (int, error) {
	size := 0
	for shift := 0; shift <= 14 && size <= maxFrame; shift += 7 {
		b, err := r.take(1)
		if err != nil {
			return 0, err
		}
		size |= int(b[0]&0x7f) << shift
		if b[0] < 0x80 && size <= maxFrame {
			return size, nil
		}
	}
	return 0, DamagedError("an entry is too large")
}

// end checks the trailer. If the trailer matches the frames and ends the stream, end returns
// io.EOF.
func (r *Reader) end() error {
	count, err := r.take(8)
	if err != nil {
		return err
	}
	want := r.Sum()
	got, err := r.take(len(want))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) || binary.BigEndian.Uint64(count) != uint64(r.frames) {
		return DamagedError("its checksum is wrong")
	}
	if _, err := r.in.ReadByte(); err == nil {
		return DamagedError("something follows its end")
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return io.EOF
}

const errCut = DamagedError("it is cut off")

// take reads the next n bytes.
func (r *Reader) take(n int) ([]byte, error) {
	p := make([]byte, n)
	if _, err := io.ReadFull(r.in, p); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, errCut
		}
		return nil, err
	}
	r.sum.Write(p)
	return p, nil
}
