package backupfile

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func file(t testing.TB, form Form, entries ...backend.Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b, form)
	for _, e := range entries {
		require.NoError(t, w.Write(e))
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// read reads to the end of a stream, or to an error. The error is nil if the file is whole.
func read(r io.Reader) ([]backend.Entry, error) {
	f, err := NewReader(r)
	if err != nil {
		return nil, err
	}
	var entries []backend.Entry
	for {
		e, err := f.Next()
		if err == io.EOF {
			if f.Frames() != len(entries) {
				return nil, fmt.Errorf("%d frames, but %d entries", f.Frames(), len(entries))
			}
			return entries, nil
		}
		if err != nil {
			return entries, err
		}
		entries = append(entries, e)
	}
}

// same reports whether entries are equal. A nil value and an empty value are equal.
func same(a, b []backend.Entry) bool {
	return slices.EqualFunc(a, b, func(a, b backend.Entry) bool {
		return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Value, b.Value) &&
			a.Revision == b.Revision
	})
}

// seal appends a trailer to frames after the magic, as if a Writer had written the frames.
func seal(frames []byte, count int) []byte {
	b := append([]byte(magic), byte(FormKeys))
	b = append(b, frames...)
	b = append(b, 0)
	b = binary.BigEndian.AppendUint64(b, uint64(count))
	sum := sha256.Sum256(b)
	return append(b, sum[:]...)
}

func frame(t testing.TB, e backend.Entry) []byte {
	t.Helper()
	b, err := proto.Marshal(&record.Saved{Key: e.Key, Value: e.Value, Revision: e.Revision})
	require.NoError(t, err)
	return append(binary.AppendUvarint(nil, uint64(len(b))), b...)
}

func someEntries() []backend.Entry {
	return []backend.Entry{
		{Key: []byte("a"), Value: []byte("the first value"), Revision: 1},
		{Key: []byte("b"), Revision: math.MaxUint64},
		{Key: bytes.Repeat([]byte("k"), backend.MaxKeySize),
			Value: bytes.Repeat([]byte("v"), backend.MaxValueSize), Revision: math.MaxUint64},
	}
}

func TestWhatIsWrittenIsRead(t *testing.T) {
	for _, form := range []Form{FormKeys, FormChecks, FormGraves, FormCredits} {
		for n := range len(someEntries()) + 1 {
			want := someEntries()[:n]
			b := file(t, form, want...)
			for name, r := range map[string]io.Reader{
				"whole":   bytes.NewReader(b),
				"bytes":   iotest.OneByteReader(bytes.NewReader(b)),
				"halves":  iotest.HalfReader(bytes.NewReader(b)),
				"end too": iotest.DataErrReader(bytes.NewReader(b)),
			} {
				got, err := read(r)
				require.NoError(t, err, name)
				require.True(t, same(want, got), name)
			}
		}
	}
}

// Files that earlier versions wrote must stay readable, so the bytes must not change.
func TestTheBytesOfAFile(t *testing.T) {
	b := file(t, FormChecks, backend.Entry{Key: []byte("key"), Value: []byte("value"), Revision: 7})
	sum := sha256.Sum256(b[:len(b)-sha256.Size])
	want := hex.EncodeToString([]byte("grpc-api-key backup\n")) + "02" +
		"0e" + "0a03" + hex.EncodeToString([]byte("key")) +
		"1205" + hex.EncodeToString([]byte("value")) + "1807" +
		"00" + "0000000000000001" + hex.EncodeToString(sum[:])
	require.Equal(t, want, hex.EncodeToString(b))
}

// The checksum at the end tells files apart, and is the same for the same content.
func TestSum(t *testing.T) {
	sum := func(b []byte) []byte {
		f, err := NewReader(bytes.NewReader(b))
		require.NoError(t, err)
		for err == nil {
			_, err = f.Next()
		}
		require.Equal(t, io.EOF, err)
		return f.Sum()
	}
	a, b := file(t, FormKeys, someEntries()...), file(t, FormKeys, someEntries()[:2]...)
	require.Equal(t, sum(a), sum(a))
	require.NotEqual(t, sum(a), sum(b))
}

func TestEveryDamageIsFound(t *testing.T) {
	whole := file(t, FormKeys, someEntries()[:2]...)
	refused := func(b []byte) {
		t.Helper()
		_, err := read(bytes.NewReader(b))
		require.Error(t, err)
		if !errors.As(err, new(FormError)) {
			require.ErrorAs(t, err, new(DamagedError))
		}
	}
	for at := range whole {
		refused(whole[:at])
		for bit := range 8 {
			b := bytes.Clone(whole)
			b[at] ^= 1 << bit
			refused(b)
		}
	}
	refused(append(bytes.Clone(whole), 0))
	refused(append(bytes.Clone(whole), whole...))
}

// Files with the right checksum that no Writer has written.
func TestImpossibleFiles(t *testing.T) {
	a, b := someEntries()[0], someEntries()[1]
	for want, b := range map[string][]byte{
		"an entry is too large":               seal([]byte{0xff, 0xff, 0x7f}, 0),
		"an entry is too large, for a varint": seal(bytes.Repeat([]byte{0xff}, 20), 0),
		"an entry cannot be read":             seal([]byte{2, 0xff, 0xff}, 1),
		"an entry cannot be read, keyless":    seal(frame(t, backend.Entry{Revision: 1}), 1),
		"its entries are not in order":        seal(append(frame(t, b), frame(t, a)...), 2),
		"its entries are not in order, twice": seal(append(frame(t, a), frame(t, a)...), 2),
		"it has an entry without a revision":  seal(frame(t, backend.Entry{Key: []byte("a")}), 1),
		"its checksum is wrong":               seal(frame(t, a), 2),
		"it is cut off":                       seal(nil, 0)[:40],
		"something follows its end":           append(seal(nil, 0), 0),
	} {
		what, _, _ := strings.Cut(want, ",")
		_, err := read(bytes.NewReader(b))
		require.Equal(t, DamagedError(what), err, want)
		require.Equal(t, "the backup is damaged: "+what, err.Error())
	}
}

func TestWhatIsNoBackup(t *testing.T) {
	for _, b := range []string{"", "hello", magic, strings.ToUpper(magic) + "\x01"} {
		_, err := NewReader(strings.NewReader(b))
		require.ErrorAs(t, err, new(FormError))
		require.ErrorContains(t, err, "not a backup")
	}
	for _, form := range []Form{0, 5, 255} {
		_, err := NewReader(bytes.NewReader(file(t, form)))
		require.ErrorAs(t, err, new(FormError))
		require.ErrorContains(t, err, "upgrade")
	}
}

// Errors of the stream are returned unchanged, wherever they happen.
func TestErrorsOfTheStream(t *testing.T) {
	boom := errors.New("boom")
	whole := file(t, FormKeys, someEntries()[:2]...)
	for at := range len(whole) + 1 {
		_, err := read(io.MultiReader(bytes.NewReader(whole[:at]), iotest.ErrReader(boom)))
		require.Equal(t, boom, err)
	}
	big := make([]backend.Entry, 20) // more than the buffer holds
	for i := range big {
		big[i] = backend.Entry{Key: []byte{'a' + byte(i)}, Value: make([]byte, 10_000), Revision: 1}
	}
	whole = file(t, FormKeys, big...)
	for range 100 {
		w := NewWriter(&limited{left: rand.IntN(len(whole)), err: boom}, FormKeys)
		var err error
		for i := 0; err == nil && i < len(big); i++ {
			err = w.Write(big[i])
		}
		if err == nil {
			err = w.Close()
		}
		require.Equal(t, boom, err)
	}
}

// A limited writer fails after a number of bytes.
type limited struct {
	left int
	err  error
}

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.left {
		return 0, l.err
	}
	l.left -= len(p)
	return len(p), nil
}

// No stream makes a Reader take much memory: a length is refused before the memory is taken.
func TestMemoryIsLimited(t *testing.T) {
	for size, want := range map[uint64]DamagedError{
		maxFrame:       "an entry cannot be read",
		maxFrame + 1:   "an entry is too large",
		1<<21 - 1:      "an entry is too large",
		math.MaxInt64:  "an entry is too large",
		math.MaxUint64: "an entry is too large",
	} {
		head := binary.AppendUvarint(append([]byte(magic), byte(FormKeys)), size)
		stream := &endless{head: head}
		_, err := read(stream)
		require.Equal(t, want, err)
		require.LessOrEqual(t, stream.read, 2*bufferSize)
	}
}

// An endless stream has zeros after its head.
type endless struct {
	head []byte
	read int
}

func (e *endless) Read(p []byte) (int, error) {
	clear(p)
	n := copy(p, e.head)
	e.head = e.head[n:]
	e.read += len(p)
	return len(p), nil
}

// Any input gives the entries of a file, or an error: never a panic, and never more memory than a
// few times the size of the input. The fuzzer cannot find a SHA-256, so the test also reads the
// input as frames with the right trailer.
func FuzzBackupFile(f *testing.F) {
	whole := file(f, FormKeys, someEntries()[:2]...) // small, so that the fuzzer is fast
	f.Add(whole)
	f.Add(whole[len(magic)+1 : len(whole)-1-8-sha256.Size]) // the frames
	f.Add(file(f, FormChecks))
	f.Add(file(f, Form(9)))
	f.Add([]byte(magic + "\x01\xff\xff\x7f"))
	f.Fuzz(func(t *testing.T, data []byte) {
		check(t, data)
		frames, err := read(bytes.NewReader(append([]byte(magic+"\x01"), data...)))
		if err == DamagedError("it is cut off") {
			check(t, seal(data, len(frames)))
		}
	})
}

// check requires that a stream is refused, or has entries that a Writer can write again.
func check(t *testing.T, stream []byte) {
	entries, err := read(bytes.NewReader(stream))
	size := 0
	for _, e := range entries {
		require.LessOrEqual(t, len(e.Key)+len(e.Value), maxFrame)
		size += len(e.Key) + len(e.Value)
	}
	require.LessOrEqual(t, size, len(stream))
	if err != nil {
		if !errors.As(err, new(FormError)) {
			require.ErrorAs(t, err, new(DamagedError))
		}
		return
	}
	again, err := read(bytes.NewReader(file(t, FormKeys, entries...)))
	require.NoError(t, err)
	require.True(t, same(entries, again))
}
