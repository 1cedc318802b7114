package pgstore

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Every call comes into one group. In a group, no two calls write the same key, none writes a key
// that another checks, and the limits hold.
func TestGroups(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	for range 500 {
		m := &committer{writers: 1}
		calls := 1 + random.IntN(200)
		for range calls {
			c := &call{result: make(chan error, 1)}
			for _, key := range random.Perm(30)[:1+random.IntN(4)] {
				c.changes = append(c.changes, backend.Change{Key: fmt.Append(nil, key),
					Check: len(c.changes) > 0 && random.IntN(2) == 0})
			}
			if random.IntN(50) == 0 { // a large call
				for n := range backend.MaxChanges {
					c.changes = append(c.changes, backend.Change{Key: fmt.Append(nil, "large", n)})
				}
			}
			m.queue = append(m.queue, c)
		}
		seen := make(map[*call]bool)
		for g := m.next(nil); g != nil; g = m.next(nil) {
			require.NotEmpty(t, g.calls)
			require.LessOrEqual(t, len(g.calls), maxGroup)
			require.Equal(t, len(g.calls), g.waiting)
			writer, users, size := make(map[string]*call), make(map[string][]*call), 0
			for _, c := range g.calls {
				require.False(t, seen[c])
				seen[c] = true
				require.Same(t, g, c.group)
				size += len(c.changes)
				for _, change := range c.changes {
					users[string(change.Key)] = append(users[string(change.Key)], c)
					if !change.Check {
						require.Nil(t, writer[string(change.Key)])
						writer[string(change.Key)] = c
					}
				}
			}
			for key, c := range writer {
				require.Equal(t, []*call{c}, users[key], "key %s", key)
			}
			require.True(t, len(g.calls) == 1 || size <= maxGroupChanges)
		}
		require.Len(t, seen, calls)
		require.Zero(t, m.writers)
	}
}

// Each call of a group gets its result.
func TestFinish(t *testing.T) {
	results := func(failed []int32, err error) (got []error) {
		m, g := &committer{writers: 1}, &group{}
		for range 3 {
			g.calls = append(g.calls, &call{result: make(chan error, 1)})
		}
		require.False(t, m.finish(g, failed, err))
		for _, c := range g.calls {
			got = append(got, <-c.result)
		}
		return got
	}
	broken := errors.New("broken")
	require.Equal(t, []error{nil, nil, nil}, results(nil, nil))
	require.Equal(t, []error{nil, backend.ErrConflict, nil}, results([]int32{2}, nil))
	require.Equal(t, []error{broken, broken, broken}, results(nil, broken))
	all := []error{backend.ErrConflict, backend.ErrConflict, backend.ErrConflict}
	require.Equal(t, all, results(nil, &pgconn.PgError{Code: codeConflict}))
}
