package badgerfile

import (
	"encoding/binary"
	"os"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/dgraph-io/badger/v4/pb"
	"google.golang.org/protobuf/proto"
)

// A ManifestTable is a table that a manifest names.
type ManifestTable struct {
	Name  string
	Level int
	Plain bool // the table is neither compressed nor encrypted
}

// ReadManifest returns the tables that a manifest names, in no order.
func ReadManifest(f *os.File) ([]ManifestTable, error) {
	manifest, _, err := badger.ReplayManifestFile(f, 0, badger.Options{})
	if err != nil {
		return nil, err
	}
	var tables []ManifestTable
	for id, t := range manifest.Tables {
		plain := t.Compression == options.None && t.KeyID == 0
		tables = append(tables, ManifestTable{TableName(id), int(t.Level), plain})
	}
	return tables, nil
}

// MayDelete reports whether records of a manifest delete a table. Records that are not whole may
// delete a table. A record is:
//
//	length uint32, checksum uint32, pb.ManifestChangeSet
func MayDelete(records []byte) bool {
	for rest := records; len(rest) > 0; {
		const header = 8 // length and checksum
		if len(rest) < header {
			return true
		}
		n := uint64(binary.BigEndian.Uint32(rest))
		if rest = rest[header:]; n > uint64(len(rest)) {
			return true
		}
		var set pb.ManifestChangeSet
		if proto.Unmarshal(rest[:n], &set) != nil {
			return true
		}
		for _, change := range set.Changes {
			if change.Op == pb.ManifestChange_DELETE {
				return true
			}
		}
		rest = rest[n:]
	}
	return false
}
