package pgstore_test

import (
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Calls of Apply that run at the same time share few commits. Each call has its position, and a
// call that conflicts does not disturb the others.
func TestCallsShareACommit(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	require.NoError(t, put(ctx, b, "guard", 0))
	require.NoError(t, put(ctx, b, "shared", 0))
	r := read(ctx, b, 0)
	start := r.next(t).Position
	other, err := pgx.Connect(ctx, server.URL())
	require.NoError(t, err)
	defer other.Close(ctx)
	tx, err := other.Begin(ctx)
	require.NoError(t, err)
	_, err = tx.Exec(ctx, "select from apikeys.head for update")
	require.NoError(t, err)

	// While another program holds the lock, calls come: some conflict because they expect a wrong
	// revision, and of those that change the same entry, one is made. The first two groups have one
	// call each, and the other calls wait for a group.
	const calls = 40
	results := make(chan error, calls)
	for n := range calls {
		changes := []backend.Change{{Key: fmt.Append(nil, n), Value: []byte("v")},
			{Key: []byte("guard"), Expect: 1, Check: true}}
		switch n % 4 {
		case 1:
			changes[0].Expect = 7
		case 2:
			changes[1].Expect = 2
		case 3:
			changes = append(changes, backend.Change{Key: []byte("shared"), Expect: 1})
		}
		go func() { results <- b.Apply(ctx, changes...) }()
		if n < 2 {
			server.Await(t, "select count(*) from pg_stat_activity where wait_event_type = 'Lock'",
				strconv.Itoa(n+1))
		}
	}
	require.Eventually(t, func() bool { return b.Queue() == calls-2 }, patience, time.Millisecond)
	require.NoError(t, tx.Rollback(ctx))
	made, conflicts := 0, 0
	for range calls {
		switch err := <-results; err {
		case nil:
			made++
		case backend.ErrConflict:
			conflicts++
		default:
			require.NoError(t, err)
		}
	}
	require.Equal(t, calls/4+1, made)
	require.Equal(t, calls-made, conflicts)
	for n := range made {
		batch := r.next(t)
		require.Equal(t, start+backend.Position(n+1), batch.Position, "no holes")
		number, err := strconv.Atoi(string(batch.Changes[0].Key))
		if err != nil { // the entry "shared" may come first
			number, err = strconv.Atoi(string(batch.Changes[1].Key))
		}
		require.NoError(t, err)
		require.Contains(t, []int{0, 3}, number%4)
	}
	// The conflicts of one entry take a group each.
	transactions, err := strconv.Atoi(server.Exec(t, fmt.Sprintf(
		"select count(distinct xmin::text) from apikeys.log where position > %d", start)))
	require.NoError(t, err)
	require.LessOrEqual(t, transactions, 6, "%d changes", made)
}
