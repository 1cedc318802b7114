package survey_test

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/survey"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Whatever a log or a table holds, looking at it ends, without a panic.
func FuzzFiles(f *testing.F) {
	dir := f.TempDir()
	db, err := badgerdb.Open(dir, badgerdb.Options{})
	if errors.Is(err, errors.ErrUnsupported) {
		f.Skip("no directory can hold a store on a 32-bit system")
	}
	require.NoError(f, err)
	change := func(key, value string, expect uint64) backend.Change {
		return backend.Change{Key: []byte(key), Value: []byte(value), Expect: expect}
	}
	require.NoError(f, db.Apply(f.Context(), change("a", "1", 0), change("b", "2", 0)))
	require.NoError(f, db.Apply(f.Context(), change("a", "3", 1)))
	read := func(kind string) []byte {
		paths, err := badgerfile.FilesOf(dir, kind)
		require.NoError(f, err)
		require.NotEmpty(f, paths)
		data, err := os.ReadFile(paths[0])
		require.NoError(f, err)
		return data
	}
	f.Add(bytes.TrimRight(read(badgerfile.LogFiles), "\x00"))
	require.NoError(f, db.Close())
	f.Add(read(badgerfile.TableFiles))
	f.Add(make([]byte, 8)) // the checksum of an index without bytes is right
	f.Fuzz(func(t *testing.T, data []byte) {
		visit := func(uint64, []layout.Write) error { return nil }
		l, err := badgerfile.ParseLog(bytes.NewReader(data), visit)
		require.NoError(t, err)
		require.LessOrEqual(t, l.End, int64(max(len(data), badgerfile.LogHeaderSize)))
		_ = badgerfile.ReadTable("fuzz", data, func(table badgerfile.Table) error {
			_, _, err := survey.CheckTable(table)
			return err
		})
		// As if the checksum of a block were right.
		_ = badgerfile.Entries(data, func([]byte, uint64, []byte) {})
	})
}
