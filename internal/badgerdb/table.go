package badgerdb

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
)

// A table of Badger's, NNNNNN.sst, as badger v4 writes it without compression and encryption (table/builder.go there):
//
//	blocks    entries, offset of each entry uint32, number of entries uint32, checksum, length of the checksum uint32
//	index     a flatbuffer: where the blocks are, and the highest version
//
// Offsets and what is before a key are in the order of bytes of the machine, the rest is big-endian.
//
//	length of the index uint32, checksum of the index, length of that checksum uint32
//
// Badger's own reader ends the process where the end of a table is damaged, and takes a block that is damaged for one that
// has not what is looked for. So tables are checked here before Badger opens them, all of each.
type tableFile struct {
	data  []byte
	index *fb.TableIndex
}

// withTable calls use with a table whose index is whole. The table is good until use returns. A *fs.PathError says that
// the file could not be read, and any other error what is wrong with it.
func withTable(path string, use func(t tableFile) error) error {
	data, unmap, err := mapFile(path)
	if err != nil {
		return err
	}
	defer unmap()
	return readTable(path, data, use)
}

// readTable is withTable for what the file holds. An index with the right checksum may still be none, as where all is zero,
// and a flatbuffer is read without care.
func readTable(path string, data []byte, use func(t tableFile) error) (err error) {
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

func parseTable(data []byte) (t tableFile, err error) {
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

// blocks calls visit for each block: with its number, and its entries or what is wrong with it.
func (t tableFile) blocks(visit func(i int, block []byte, damage error)) {
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

// check returns what is wrong with the table, the highest version in it, and the newest head, if it has one.
func (t tableFile) check() (version uint64, newest head, err error) {
	var o fb.BlockOffset
	t.blocks(func(i int, block []byte, damage error) {
		if damage == nil && i+1 < t.index.OffsetsLength() && t.index.Offsets(&o, i+1) &&
			string(y.ParseKey(o.KeyBytes())) < string(headKey) {
			return // the heads are further behind
		}
		if damage == nil {
			damage = entries(block, func(key []byte, _ uint64, value []byte) {
				if h, ok := parseHead(value); ok && string(key) == string(headKey) && h.seq > newest.seq {
					newest = h
				}
			})
		}
		err = cmp.Or(err, damage)
	})
	return t.index.MaxVersion(), newest, err
}

// entries calls visit for each entry of a block that has passed its checksum. The slices are good until it returns.
func entries(block []byte, visit func(key []byte, version uint64, value []byte)) error {
	const header = 4 // length of what the key shares with the first one, and of the rest, uint16 each
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

// cutSized returns what stands before a length at the end of b, in that length.
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

// cutChecksum takes a checksum from the end of b.
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
		return nil, nil, false // y.VerifyChecksum panics
	}
	return b[:len(b)-4-len(text)], sum, true
}

// cutOffsets takes the offsets of the entries from the end of a block.
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
