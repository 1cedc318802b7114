package badgerdb

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The committer looks up no key that comes after all keys with the same first byte. The answers
// are those of a backend that looks up every key: with new and deleted entries at the end, between
// other first bytes, and after the store was opened again.
func TestKeysBeyondTheEndAreAbsent(t *testing.T) {
	for seed := range uint64(5) {
		dir := t.TempDir()
		db, model := open(t, dir), memory.New()
		r := rand.New(rand.NewPCG(seed, 1))
		firsts := []byte{0, 'v', 'w', 'x', 0xfe, 0xff}
		revisions := make(map[string]uint64)
		for n := range 600 {
			if n%150 == 149 {
				require.NoError(t, db.Close())
				db = open(t, dir)
			}
			key := []byte{firsts[r.IntN(len(firsts))]}
			switch r.IntN(3) {
			case 0: // the shortest key of the first byte
			case 1:
				key = append(key, byte(n/3), byte(n))
			default:
				key = append(key, byte(r.IntN(200)))
			}
			c := backend.Change{Key: key, Expect: revisions[string(key)]}
			if r.IntN(8) == 0 {
				c.Expect = r.Uint64N(3)
			}
			c.Delete = c.Expect > 0 && r.IntN(3) == 0
			err := db.Apply(t.Context(), c)
			require.Equal(t, model.Apply(t.Context(), c), unwrapped(err), "%d: %x", n, key)
			switch {
			case err != nil:
			case c.Delete:
				delete(revisions, string(key))
			default:
				revisions[string(key)] = c.Expect + 1
			}
		}
		require.NoError(t, db.Check(t.Context()))
		require.NoError(t, db.Close())
	}
}

func unwrapped(err error) error {
	if errors.Is(err, backend.ErrConflict) {
		return backend.ErrConflict
	}
	return err
}

// Many callers add the same new key. One of them does, even if the callers share a commit.
func TestOneOfManyAddsANewKey(t *testing.T) {
	db := open(t, t.TempDir())
	defer func() { require.NoError(t, db.Close()) }()
	for n := range 50 {
		var added atomic.Int32
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				key := fmt.Appendf(nil, "k%03d", n)
				switch err := db.Apply(t.Context(), backend.Change{Key: key}); {
				case err == nil:
					added.Add(1)
				case !errors.Is(err, backend.ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		require.EqualValues(t, 1, added.Load())
	}
	require.NoError(t, db.Check(t.Context()))
}
