package badgerfile

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"runtime/debug"

	"google.golang.org/protobuf/proto"

	"github.com/dgraph-io/badger/v4/fb"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
)

// A Table is a table of Badger, NNNNNN.sst, as badger v4 writes tables without compression and
// encryption (table/builder.go in Badger):
//
//	blocks    entries, offset of each entry uint32, number of entries uint32, checksum,
//	          length of the checksum uint32
//	index     a flatbuffer: the positions of the blocks, and the highest version
//
// After the index come
//
//	length of the index uint32, checksum of the index, length of the checksum uint32
//
// Offsets, and the header before a key, are in the byte order of the machine. The other integers
// are big-endian.
//
// Badger's reader ends the process if the end of a table is damaged. Badger's reader treats a
// damaged block like a block without the key. So a store checks the whole of every table before
// Badger opens the table.
type Table struct {
	data  []byte
	index *fb.TableIndex
}

// WithTable calls use with the table in a file, if the index of the table is whole. The table is
// valid until use returns. A *fs.PathError means that the file could not be read. Any other error
// means that the table is damaged, and describes the damage.
func WithTable(path string, use func(t Table) error) error {
	data, unmap, err := fsys.MapFile(path)
	if err != nil {
		return err
	}
	defer unmap()
	return ReadTable(path, data, use)
}

// ReadTable is WithTable for the content of a file. An index with the right checksum may still be
// invalid, for example if all bytes are zero. The flatbuffer package reads without checks, so
// ReadTable turns a panic into an error. A read fault of the disk becomes a *fs.PathError.
func ReadTable(path string, data []byte, use func(t Table) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch recover().(type) {
		case nil:
		case interface{ Addr() uintptr }:
			err = &fs.PathError{Op: "read", Path: path, Err: errors.New("the disk gave an error")}
		default:
			err = errors.New("the index leads nowhere")
		}
	}()
	t, err := parseTable(data)
	if err != nil {
		return err
	}
	return use(t)
}

func parseTable(data []byte) (t Table, err error) {
	t.data = data
	rest, sum, ok := cutChecksum(t.data)
	if !ok {
		return t, fmt.Errorf("the end, from byte %d, is damaged", len(t.data))
	}
	index, ok := cutSized(rest)
	if !ok {
		return t, fmt.Errorf("the end, from byte %d, is damaged", len(rest))
	}
	if y.VerifyChecksum(index, sum) != nil {
		return t, fmt.Errorf("the index, from byte %d, is damaged", len(rest)-4-len(index))
	}
	t.index = fb.GetRootAsTableIndex(index, 0)
	return t, nil
}

// Blocks calls visit for each block, with the number of the block and either the entries or the
// damage.
func (t Table) Blocks(visit func(i int, block []byte, damage error)) {
	var o fb.BlockOffset
	for i := range t.index.OffsetsLength() {
		if !t.index.Offsets(&o, i) {
			visit(i, nil, fmt.Errorf("block %d is not in the index", i))
			continue
		}
		from, to := uint64(o.Offset()), uint64(o.Offset())+uint64(o.Len())
		if to > uint64(len(t.data)) {
			visit(i, nil, fmt.Errorf("the file ends before block %d", i))
			continue
		}
		body, sum, ok := cutChecksum(t.data[from:to])
		if !ok || y.VerifyChecksum(body, sum) != nil {
			visit(i, nil, fmt.Errorf("the block from byte %d to %d is damaged", from, to))
			continue
		}
		visit(i, body, nil)
	}
}

// EachVersion calls visit for each entry in the whole blocks of a table. If a block is damaged,
// EachVersion continues with the next block, and returns the first damage at the end.
func EachVersion(path string, visit func(key []byte, version uint64)) error {
	return WithTable(path, func(t Table) (err error) {
		t.Blocks(func(_ int, block []byte, damage error) {
			if damage == nil {
				damage = Entries(block, func(key []byte, version uint64, _ []byte) {
					visit(key, version)
				})
			}
			err = cmp.Or(err, damage)
		})
		return err
	})
}

// FirstKey returns the first key of a block. ok is false if there is no such block.
func (t Table) FirstKey(block int) (key []byte, ok bool) {
	var o fb.BlockOffset
	if block >= t.index.OffsetsLength() || !t.index.Offsets(&o, block) {
		return nil, false
	}
	return y.ParseKey(o.KeyBytes()), true
}

// MaxVersion returns the highest version in the table, as the index says.
func (t Table) MaxVersion() uint64 { return t.index.MaxVersion() }

// Entries calls visit for each entry of a block. The checksum of the block must be right. The
// slices are valid until visit returns.
func Entries(block []byte, visit func(key []byte, version uint64, value []byte)) error {
	// The header has two uint16: the length of the prefix that the key shares with the first key of
	// the block, and the length of the rest of the key.
	const header = 4
	offsets, ok := cutOffsets(block)
	if !ok {
		return fmt.Errorf("a block has no entries")
	}
	n := len(offsets) / 4
	data := block[:len(block)-4-len(offsets)]
	var first, key []byte
	for i := range n {
		from, to := uint64(binary.NativeEndian.Uint32(offsets[4*i:])), uint64(len(data))
		if i+1 < n {
			to = uint64(binary.NativeEndian.Uint32(offsets[4*i+4:]))
		}
		if from+header > to || to > uint64(len(data)) {
			return fmt.Errorf("an entry is outside of its block")
		}
		e := data[from:to]
		shared, rest := int(binary.NativeEndian.Uint16(e)), int(binary.NativeEndian.Uint16(e[2:]))
		if e = e[header:]; rest > len(e) || shared > len(first) {
			return fmt.Errorf("a key is outside of its block")
		}
		key = append(append(key[:0], first[:shared]...), e[:rest]...)
		if i == 0 {
			first = append([]byte(nil), key...)
		}
		if len(key) < 8 {
			return fmt.Errorf("a key has no version")
		}
		const metas = 2
		if e = e[rest:]; len(e) < metas {
			return fmt.Errorf("a value is outside of its block")
		}
		_, expiry := binary.Uvarint(e[metas:])
		if expiry <= 0 {
			return fmt.Errorf("a value has no expiry")
		}
		visit(y.ParseKey(key), y.ParseTs(key), e[metas+expiry:])
	}
	return nil
}

// cutSized reads a length n from the last 4 bytes of b, and returns the n bytes before the length.
// ok is false if b is too short.
func cutSized(b []byte) (sized []byte, ok bool) {
	if len(b) < 4 {
		return nil, false
	}
	rest, n := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if uint64(n) > uint64(len(rest)) {
		return nil, false
	}
	return rest[len(rest)-int(n):], true
}

// cutChecksum parses the checksum at the end of b, and returns the bytes before the checksum. ok is
// false if there is no valid checksum.
func cutChecksum(b []byte) (rest []byte, sum *pb.Checksum, ok bool) {
	text, ok := cutSized(b)
	if !ok {
		return nil, nil, false
	}
	sum = new(pb.Checksum)
	if proto.Unmarshal(text, sum) != nil {
		return nil, nil, false
	}
	if sum.Algo != pb.Checksum_CRC32C && sum.Algo != pb.Checksum_XXHash64 {
		return nil, nil, false // y.VerifyChecksum would panic
	}
	return b[:len(b)-4-len(text)], sum, true
}

// cutOffsets returns the offsets of the entries from the end of a block. ok is false if the number
// of entries is 0, or does not fit into the block.
func cutOffsets(b []byte) (offsets []byte, ok bool) {
	if len(b) < 4 {
		return nil, false
	}
	rest, n := b[:len(b)-4], uint64(binary.BigEndian.Uint32(b[len(b)-4:]))*4
	if n == 0 || n > uint64(len(rest)) {
		return nil, false
	}
	return rest[len(rest)-int(n):], true
}
