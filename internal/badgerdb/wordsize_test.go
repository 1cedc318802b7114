package badgerdb

import (
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"path/filepath"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"github.com/stretchr/testify/require"
)

// On a 32-bit system a store is refused, and nothing is made or changed.
func TestWordSizeIsRefused(t *testing.T) {
	if bits.UintSize == 64 {
		t.Skip("GOARCH=386 go test runs this")
	}
	dir := filepath.Join(t.TempDir(), "store")
	_, err := Open(dir, Options{})
	require.ErrorIs(t, err, errors.ErrUnsupported)
	require.ErrorContains(t, err, "32-bit")
	_, err = os.Stat(dir)
	require.ErrorIs(t, err, fs.ErrNotExist)
}

// What that is for. When this test fails under GOARCH=386, because Badger keeps what it is given
// there too, Open need not refuse any more.
func TestWordSizeDamagesTables(t *testing.T) {
	dir := t.TempDir()
	bare := &DB{dir: dir, space: newSpaceGuard(dir, usualMemtable, 0)}
	options := bare.options(Options{}).WithLogger(nil)
	db, err := badger.OpenManaged(options)
	require.NoError(t, err)
	key := func(i int) []byte { return fmt.Appendf(nil, "k%08d", i) }
	const keys = 5 * usualMemtable >> 14 // one memtable of them
	for i := range keys {
		txn := db.NewTransactionAt(uint64(i), true)
		require.NoError(t, txn.Set(key(i), make([]byte, 3<<10)))
		require.NoError(t, txn.CommitAt(uint64(i+1), nil))
	}
	require.NoError(t, db.Close())
	require.NotEmpty(t, names(t, dir))
	db, err = badger.OpenManaged(options)
	require.NoError(t, err)
	defer db.Close()
	lost := 0
	for i := range keys {
		func() {
			defer func() {
				if recover() != nil {
					lost++
				}
			}()
			txn := db.NewTransactionAt(keys, false)
			defer txn.Discard()
			if _, err := txn.Get(key(i)); err != nil {
				lost++
			}
		}()
	}
	t.Logf("%d of %d entries are lost", lost, keys)
	if bits.UintSize == 64 {
		require.Zero(t, lost)
	} else {
		require.Positive(t, lost)
	}
}
