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

// childOf makes each entry "c" + name the child of the entry "p" + name.
func childOf(key []byte) []byte {
	if key[0] != 'c' {
		return nil
	}
	return append([]byte("p"), key[1:]...)
}

// The committer looks up no child of a parent that comes after all other parents. The answers are
// those of a backend that looks up every key: parents are added in any order, with their child or
// before it, and children are deleted and added again.
func TestChildrenOfNewParentsAreAbsent(t *testing.T) {
	for seed := range uint64(5) {
		dir := t.TempDir()
		db, err := Open(dir, Options{Parent: childOf})
		require.NoError(t, err)
		model := memory.New()
		r := rand.New(rand.NewPCG(seed, 2))
		apply := func(changes ...backend.Change) {
			require.Equal(t, model.Apply(t.Context(), changes...),
				unwrapped(db.Apply(t.Context(), changes...)))
		}
		for n := range 400 {
			if n%150 == 149 {
				require.NoError(t, db.Close())
				db, err = Open(dir, Options{Parent: childOf})
				require.NoError(t, err)
			}
			name := []byte{byte(n / 3), byte(r.IntN(3))}
			if r.IntN(4) == 0 {
				name[0] = byte(r.IntN(n/3 + 1))
			}
			parent := backend.Change{Key: append([]byte("p"), name...)}
			child := backend.Change{Key: append([]byte("c"), name...)}
			if _, err := model.Get(t.Context(), parent.Key); err == nil {
				e, _ := model.Get(t.Context(), child.Key)
				child.Expect = e.Revision
				child.Delete = e.Revision > 0 && r.IntN(2) == 0
				if r.IntN(8) == 0 {
					child.Expect, child.Delete = r.Uint64N(3), false
				}
				apply(child)
			} else if r.IntN(4) == 0 {
				apply(parent)
			} else {
				apply(child, parent)
			}
		}
		require.NoError(t, db.Check(t.Context()))
		require.NoError(t, db.Close())
	}
}

// Many callers add the same new parent with the same child. One of them does, even if the callers
// share a commit.
func TestOneOfManyAddsANewChild(t *testing.T) {
	db, err := Open(t.TempDir(), Options{Parent: childOf})
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	for n := range 50 {
		var added atomic.Int32
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				err := db.Apply(t.Context(), backend.Change{Key: fmt.Appendf(nil, "c%03d", n)},
					backend.Change{Key: fmt.Appendf(nil, "p%03d", n)})
				switch {
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

// A child without a parent, as damage may leave it, can be deleted. To add a child whose parent is
// new, the committer does not read the child.
func TestChildWithoutItsParent(t *testing.T) {
	db, err := Open(t.TempDir(), Options{Parent: childOf})
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	require.NoError(t, db.Apply(t.Context(), backend.Change{Key: []byte("c1")}))
	g := db.newGroupState(nil)
	defer g.txn.Discard()
	f, err := g.look(backend.Change{Key: []byte("c1")})
	require.NoError(t, err)
	require.Zero(t, f)
	require.NoError(t,
		db.Apply(t.Context(), backend.Change{Key: []byte("c1"), Expect: 1, Delete: true}))
	require.NoError(t, db.Check(t.Context()))
}
