package pgstore_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

const (
	prunedAtOnce = 128
	maxOld       = 2 * prunedAtOnce // the largest number of old rows that stay
)

// fill makes n changes, each of an entry of its own, and many at the same time.
func fill(ctx context.Context, t *testing.T, b backend.Backend, prefix string, n int) {
	t.Helper()
	const callers = 32
	results := make(chan error, callers)
	for caller := range callers {
		go func() {
			var err error
			for i := caller; i < n && err == nil; i += callers {
				err = put(ctx, b, fmt.Sprint(prefix, i), 0)
			}
			results <- err
		}()
	}
	for range callers {
		require.NoError(t, <-results)
	}
}

// number returns the number that a query selects.
func number(t *testing.T, server *pglab.Server, query string) int {
	t.Helper()
	n, err := strconv.Atoi(server.Exec(t, query))
	require.NoError(t, err)
	return n
}

// age sets back the time of the rows up to a position, as if a time had passed.
func age(t *testing.T, server *pglab.Server, upTo backend.Position, by time.Duration) {
	t.Helper()
	server.Exec(t, fmt.Sprintf("begin; select from apikeys.head for update; update apikeys.log "+
		"set at = at - interval '%f seconds' where position <= %d; commit", by.Seconds(), upTo))
}

const (
	countRows = "select count(*) from apikeys.log"
	firstRow  = "select min(position) from apikeys.log"
	lastRow   = "select max(position) from apikeys.log"
)

// The log keeps each change for 10 minutes. Each change then removes a bounded number of old rows.
// A feed at the last position misses nothing, even if the position is old. A feed that is behind
// ends with ErrGap.
func TestLogIsPruned(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	reads, stopReads := context.WithCancel(ctx)
	defer stopReads()
	r := read(reads, b, 0)
	behind := r.next(t).Position
	const changes = 900
	fill(ctx, t, b, "k", changes)
	last := behind
	for range changes {
		last++
		require.Equal(t, last, r.next(t).Position)
	}
	age(t, server, last, 10*time.Minute-patience) // ctx ends before the rows are older
	fill(ctx, t, b, "young", maxOld)
	require.Equal(t, 1, number(t, server, firstRow), "no row is older than 10 minutes")
	for range maxOld {
		last++
		require.Equal(t, last, r.next(t).Position)
	}

	// Everything is old, also the last row.
	age(t, server, last, 11*time.Minute)
	before, n := number(t, server, countRows), uint64(0)
	for after := 0; after != before+1; n++ {
		if n > 0 {
			before = after
		}
		require.NoError(t, put(ctx, b, "next", n))
		after = number(t, server, countRows)
		require.GreaterOrEqual(t, after, before+1-prunedAtOnce)
		require.Equal(t, last+backend.Position(n+1), r.next(t).Position)
		require.Less(t, n, uint64(20), "each change removes %d rows", prunedAtOnce)
	}
	require.Equal(t, uint64(8+1), n, "removals, and the change that removed nothing")
	old := number(t, server, fmt.Sprintf(countRows+" where position <= %d", last))
	require.Less(t, old, maxOld)
	require.GreaterOrEqual(t, old, prunedAtOnce-int(n), "rows behind the last that is old")

	err := read(reads, b, last-maxOld).fails(t)
	require.ErrorIs(t, err, backend.ErrGap)
	require.ErrorContains(t, err, "the log begins at position")
	require.ErrorContains(t, err, "10m0s")
	require.Equal(t, last+1, read(reads, b, last).next(t).Position)
	require.Equal(t, last+backend.Position(n), read(reads, b, 0).next(t).Position)
	stopReads()

	// A clock that jumps forward, or a long pause: what is old is removed, and the size is bounded.
	for range 3 {
		fill(ctx, t, b, fmt.Sprint("more", n), 400)
		age(t, server, backend.Position(number(t, server, lastRow)), time.Hour)
		n++
	}
	fill(ctx, t, b, "last", 100)
	require.Less(t, number(t, server, countRows), maxOld+100+400)

	// A person has removed rows. The removal continues.
	server.Exec(t, "delete from apikeys.log where position < (select max(position) from apikeys.log)")
	fill(ctx, t, b, "again", 400)
	age(t, server, backend.Position(number(t, server, lastRow)), time.Hour)
	fill(ctx, t, b, "end", 100)
	require.Less(t, number(t, server, countRows), maxOld+100)
}

// While rows are removed, a feed that is in the span misses nothing, also if the feed is
// interrupted and continues.
func TestFeedWhileTheLogIsPruned(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	const rounds, changes = 40, 75
	start := make(chan backend.Position, 1)
	ended := make(chan error, 1)
	var mu sync.Mutex
	var at backend.Position // what the feed has read; guarded by mu
	go func() {
		ended <- func() error {
			var last backend.Position
			for seen := 0; seen < rounds*changes; {
				for batch, err := range b.Feed(ctx, nil, nil, last) {
					if err != nil {
						return fmt.Errorf("after position %d: %w", last, err)
					}
					if last == 0 {
						start <- batch.Position
					} else if batch.Position != last+1 {
						return fmt.Errorf("position %d follows %d", batch.Position, last)
					} else {
						seen++
					}
					last = batch.Position
					mu.Lock()
					at = last
					mu.Unlock()
					if seen == rounds*changes || seen%100 == 50 {
						break
					}
				}
			}
			return nil
		}()
	}()
	require.Equal(t, backend.Position(1), <-start)
	for round := range rounds {
		fill(ctx, t, b, fmt.Sprint("round", round, "."), changes)
		// For the feed, the rows before its position are old.
		mu.Lock()
		read := at
		mu.Unlock()
		age(t, server, read, 11*time.Minute)
	}
	select {
	case err := <-ended:
		require.NoError(t, err)
	case <-ctx.Done():
		require.NoError(t, errors.New("the feed yields nothing"))
	}
	require.Greater(t, number(t, server, firstRow), 1, "rows were removed while the feed ran")
	age(t, server, rounds*changes, 11*time.Minute)
	fill(ctx, t, b, "end", 100)
	require.Less(t, number(t, server, countRows), maxOld+100)
}

// A Backend that knows only that removed positions are replicated waits for the standby with its
// next read, and knows more afterwards.
func TestReadAfterTheLogIsPruned(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t)
	b := open(t, newPool(t, primary.URL()), "apikeys", nil)
	other := open(t, newPool(t, primary.URL()), "apikeys", nil)
	ctx := within(t, patience)
	require.NoError(t, put(ctx, b, "k", 0))
	fill(ctx, t, other, "other", 3*prunedAtOnce)
	age(t, primary, 3*prunedAtOnce, time.Hour)
	require.NoError(t, put(ctx, other, "last", 0))
	require.Greater(t, number(t, primary, firstRow), 2)

	require.NoError(t, standby.Pause())
	_, err := b.Get(within(t, 300*time.Millisecond), []byte("k"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.NoError(t, standby.Resume())
	for _, key := range []string{"k", "last"} {
		_, err = b.Get(ctx, []byte(key))
		require.NoError(t, err)
	}
	_, err = b.Get(ctx, []byte("none"))
	require.ErrorIs(t, err, backend.ErrNotFound)
	require.NoError(t, standby.Pause())
	_, err = b.Get(ctx, []byte("k"))
	require.NoError(t, err, "a read without a wait")
	require.NoError(t, standby.Resume())
}

// A row that another program has changed ends the feed with ErrGap. So a process with the feed
// forgets what it knows, and begins at the present.
func TestDamagedRowOfTheLog(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	b := open(t, newPool(t, server.URL()), "apikeys", alone)
	ctx := within(t, patience)
	reads, stop := context.WithCancel(ctx)
	start := read(reads, b, 0).next(t).Position
	require.NoError(t, put(ctx, b, "k", 0))
	require.NoError(t, put(ctx, b, "k", 1))
	server.Exec(t, fmt.Sprintf(`update apikeys.log set changes = substr(changes, 1, 5) `+
		`where position = %d`, start+2))
	r := read(reads, b, start)
	require.Equal(t, start+1, r.next(t).Position)
	err := r.fails(t)
	require.ErrorIs(t, err, backend.ErrGap)
	require.ErrorContains(t, err, "another program has changed the row")
	require.Equal(t, start+2, read(reads, b, 0).next(t).Position)
	stop()
}
