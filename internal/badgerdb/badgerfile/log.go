package badgerfile

import (
	"bufio"
	"encoding/binary"
	"hash/crc32"
	"io"
	"os"
	"strconv"

	"github.com/dgraph-io/badger/v4/y"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
)

// Badger's write-ahead log, NNNNN.mem, as badger v4 writes it (memtable.go and structs.go there):
//
//	header    id of the encryption key uint64, 0 for none; initialization vector [12]byte
//	entries   meta uint8, user meta uint8, length of key uvarint, length of value uvarint,
//	          expiry uvarint, key with its version, value, CRC-32C of the entry, big-endian
//
// The CRC covers the entry up to the CRC. Every entry of a transaction has the bit logTxn. The
// last entry, after the entries of the transaction, has the bit logFinTxn. The value of the last
// entry is the version of the transaction in decimal. The file is allocated beforehand: zeroes
// follow the last entry.
const (
	LogHeaderSize = 20 // the length of the header
	logTxn        = 1 << 6
	logFinTxn     = 1 << 7

	// The store writes no entry with a longer key or value.
	maxLogKey   = 1 << 10
	maxLogValue = 64 << 10
	maxLogEntry = 2 + 3*binary.MaxVarintLen64 + maxLogKey + maxLogValue + crc32.Size
)

// perNode is the average number of bytes that an entry takes in a memtable, without its key and
// value: a node of Badger's skip list (29), the version (8), and the fields before the value (3).
const perNode = 29 + 8 + 3

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A logEntry is one entry of a log. The slices are valid until the next entry is read.
type logEntry struct {
	meta       byte
	key, value []byte // the key with its version
}

// A Log describes the content of a log.
type Log struct {
	Name        string
	First, Last uint64 // the versions of the first and last transaction; 0: no transaction
	End         int64  // the offset after the last transaction
	Memory      int64  // about the number of bytes that the entries take in a memtable
	Gap         uint64 // the first version that is missing in the middle; 0: no version is missing
	Torn        bool   // bytes that are no transaction follow the last transaction
}

// ReadLog reads a log as Badger does, up to the first bytes that are not a whole transaction.
// ReadLog calls visit with the version and the entries of each whole transaction. visit may be nil.
func ReadLog(
	path string, visit func(version uint64, writes []layout.Write) error,
) (l Log, err error) {
	f, err := os.Open(path)
	if err != nil {
		return Log{}, err
	}
	defer f.Close()
	return ParseLog(f, visit)
}

// ParseLog is ReadLog for the content of a file.
func ParseLog(
	file io.Reader, visit func(version uint64, writes []layout.Write) error,
) (l Log, err error) {
	r := bufio.NewReaderSize(file, maxLogEntry)
	l.End = LogHeaderSize
	header, err := r.Peek(LogHeaderSize)
	if err != nil || binary.BigEndian.Uint64(header) != 0 {
		l.Torn = len(header) > 0
		if err == io.EOF {
			err = nil
		}
		return l, err
	}
	_, _ = r.Discard(LogHeaderSize)
	var writes []layout.Write
	version, offset := uint64(0), l.End
	for {
		e, size, err := nextLogEntry(r)
		if err != nil {
			return l, err
		}
		if size == 0 {
			l.Torn = version != 0 || e.meta != 0
			return l, nil
		}
		offset += size
		switch {
		case e.meta&logTxn != 0:
			v := y.ParseTs(e.key)
			if version != 0 && v != version {
				l.Torn = true
				return l, nil
			}
			version = v
			writes = append(writes, layout.Write{
				Key:   append([]byte(nil), y.ParseKey(e.key)...),
				Value: append([]byte(nil), e.value...),
			})
		case e.meta&logFinTxn != 0:
			v, err := strconv.ParseUint(string(e.value), 10, 64)
			if err != nil || v != version || version == 0 {
				l.Torn = true
				return l, nil
			}
			if l.First == 0 {
				l.First = version
			} else if version != l.Last+1 && l.Gap == 0 {
				l.Gap = l.Last + 1
			}
			l.Last, l.End = version, offset
			for _, w := range writes {
				l.Memory += int64(perNode + len(w.Key) + len(w.Value))
			}
			if visit != nil {
				if err := visit(version, writes); err != nil {
					return l, err
				}
			}
			writes, version = nil, 0
		default: // the store writes only in transactions
			l.Torn = true
			return l, nil
		}
	}
}

// nextLogEntry reads one entry. If there is no entry, size is 0. Then meta is 0 if zeroes follow,
// or nothing follows; otherwise meta is not 0.
func nextLogEntry(r *bufio.Reader) (e logEntry, size int64, err error) {
	none := logEntry{meta: 0xff}
	b, err := r.Peek(2 + 3*binary.MaxVarintLen64)
	if err != nil && err != io.EOF {
		return none, 0, err
	}
	if len(b) < 2 {
		return logEntry{}, 0, nil
	}
	i := 2
	var lengths [3]uint64 // the length of the key, the length of the value, and the expiry
	for j := range lengths {
		v, n := binary.Uvarint(b[i:])
		if n <= 0 {
			return none, 0, nil
		}
		lengths[j] = v
		i += n
	}
	if lengths[0] == 0 {
		if b[0] == 0 && b[1] == 0 && lengths[1] == 0 {
			return logEntry{}, 0, nil
		}
		return none, 0, nil
	}
	if lengths[0] < 8 || lengths[0] > maxLogKey || lengths[1] > maxLogValue {
		return none, 0, nil
	}
	key, value := i+int(lengths[0]), i+int(lengths[0]+lengths[1])
	b, err = r.Peek(value + crc32.Size)
	if err == io.EOF {
		return none, 0, nil
	}
	if err != nil {
		return none, 0, err
	}
	if crc32.Checksum(b[:value], castagnoli) != binary.BigEndian.Uint32(b[value:]) {
		return none, 0, nil
	}
	e = logEntry{b[0], b[i:key], b[key:value]}
	n, err := r.Discard(value + crc32.Size) // the slices stay valid
	return e, int64(n), err
}
