package pgstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// startPair starts a primary that waits for a standby with each commit.
func startPair(t testing.TB) (primary, standby *pglab.Server) {
	t.Helper()
	primary = pglab.Start(t, pglab.Config{NoSync: true})
	standby = primary.Standby(t, "b")
	primary.Replicate(t, "b")
	return primary, standby
}

// both returns a connection string that leads to the primary, whichever of the servers it is.
func both(first, second *pglab.Server) string {
	return pglab.URL(first.Addr()+","+second.Addr(), "target_session_attrs", "read-write",
		"connect_timeout", "2")
}

// A journal is the log of a Backend.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

func (j *journal) logger() *slog.Logger { return slog.New(slog.NewTextHandler(j, nil)) }

// put writes the next revision of an entry.
func put(ctx context.Context, b backend.Backend, key string, expect uint64) error {
	return b.Apply(ctx, backend.Change{Key: []byte(key), Value: []byte("v"), Expect: expect})
}

// within returns a context that ends after d.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// Open refuses a server whose commits could be lost in a failover, unless the caller allows it.
func TestOpenRequiresReplication(t *testing.T) {
	t.Parallel()
	primary := pglab.Start(t, pglab.Config{NoSync: true})
	refused(t, newPool(t, primary.URL()), "apikeys", nil, "synchronous_standby_names is empty",
		"Options.Unreplicated")
	remotetest.UseEachMethod(t, open(t, newPool(t, primary.URL()), "apikeys", alone))

	primary.Standby(t, "b")
	primary.Replicate(t, "b")
	remotetest.UseEachMethod(t, open(t, newPool(t, primary.URL()), "apikeys", nil))
	for _, level := range []string{"on", "remote_apply", "remote_write"} {
		remotetest.UseEachMethod(t, open(t, newPool(t, primary.URL("synchronous_commit", level)), "apikeys", nil))
	}
	local := newPool(t, primary.URL("synchronous_commit", "local"))
	refused(t, local, "apikeys", nil, "synchronous_commit is local")
	remotetest.UseEachMethod(t, open(t, local, "apikeys", alone))
	off := newPool(t, primary.URL("synchronous_commit", "off"))
	refused(t, off, "apikeys", nil, "synchronous_commit is off")
	refused(t, off, "apikeys", alone, "synchronous_commit is off")
}

// While a person has switched synchronous replication off, every change fails.
func TestReplicationIsSwitchedOff(t *testing.T) {
	t.Parallel()
	primary, _ := startPair(t)
	b := open(t, newPool(t, primary.URL()), "apikeys", nil)
	ctx := within(t, patience)
	require.NoError(t, put(ctx, b, "k", 0))
	primary.Replicate(t, "")
	err := put(ctx, b, "k", 1)
	require.ErrorContains(t, err, "set synchronous_standby_names")
	e, err := b.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, uint64(1), e.Revision, "nothing was changed")
	primary.Replicate(t, "b")
	require.NoError(t, put(ctx, b, "k", 1))
}

// A standby that does not answer delays each change, and no change is confirmed without the
// standby.
func TestSlowStandby(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t)
	b := open(t, newPool(t, primary.URL()), "apikeys", nil)
	ctx := within(t, patience)
	require.NoError(t, put(ctx, b, "k", 0))

	require.NoError(t, standby.Pause())
	require.ErrorIs(t, put(within(t, 300*time.Millisecond), b, "k", 1), context.DeadlineExceeded)
	done := make(chan error, 1)
	go func() { done <- put(ctx, b, "other", 0) }()
	const waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' " +
		"and query like '%apply%'"
	primary.Await(t, waits, "1")
	select {
	case err := <-done:
		require.Fail(t, "a change was confirmed without the standby", err)
	default:
	}
	require.NoError(t, standby.Resume())
	require.NoError(t, <-done)

	// PostgreSQL reports a commit whose wait for the standby was canceled as a success, with a
	// warning.
	require.NoError(t, standby.Pause())
	go func() { done <- put(ctx, b, "doubtful", 0) }()
	primary.Await(t, waits, "1")
	primary.Exec(t, "select pg_cancel_backend(pid) from pg_stat_activity "+
		"where wait_event = 'SyncRep'")
	err := <-done
	require.ErrorContains(t, err, "the outcome is unknown")
	require.ErrorContains(t, err, "canceling wait for synchronous replication")
	require.NotErrorIs(t, err, backend.ErrConflict)

	// The primary shows the change, and no read returns it before the standby has it.
	limited := within(t, 300*time.Millisecond)
	_, err = b.Get(limited, []byte("doubtful"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	for _, scan := range []func(context.Context, []byte, []byte) iter.Seq2[backend.Entry, error]{
		b.Scan, b.ScanDown, b.Snapshot,
	} {
		for _, err := range scan(within(t, 100*time.Millisecond), nil, nil) {
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
	}
	_, err = b.Get(ctx, []byte("k"))
	require.NoError(t, err, "an earlier change is not delayed")
	require.NoError(t, standby.Resume())
	e, err := b.Get(ctx, []byte("doubtful"))
	require.NoError(t, err)
	require.Equal(t, uint64(1), e.Revision)
	require.NoError(t, put(ctx, b, "k2", 0), "the next change has no warning")
}

// The old primary shows a change that its standby never received, and the standby was promoted. A
// pool that still has a connection to the old primary does not return the change, neither a write
// nor a deletion.
func TestChangeOfADeposedPrimary(t *testing.T) {
	t.Parallel()
	old, standby := startPair(t)
	pool := newPool(t, both(standby, old))
	b := open(t, pool, "apikeys", nil)
	last := open(t, newPool(t, old.URL()), "apikeys", nil)
	ctx := within(t, 2*patience)
	require.NoError(t, put(ctx, b, "written", 0))
	require.NoError(t, put(ctx, b, "deleted", 0))
	require.NoError(t, put(ctx, b, "same", 0))
	held, err := pool.Acquire(ctx) // stays open
	require.NoError(t, err)
	var port string
	err = held.QueryRow(ctx, "show port").Scan(&port)
	held.Release()
	require.NoError(t, err)
	require.Equal(t, fmt.Sprint(old.Port), port)

	standby.Promote(t)
	standby.Standby(t, "b2")
	standby.Replicate(t, "b2")
	impatient, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		done <- last.Apply(impatient,
			backend.Change{Key: []byte("written"), Value: []byte("lost"), Expect: 1},
			backend.Change{Key: []byte("deleted"), Expect: 1, Delete: true})
	}()
	old.Await(t, "select count(*) from pg_stat_activity where wait_event = 'SyncRep'", "1")
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	old.Await(t, "select count(*) from apikeys.entry where key = 'deleted'", "0")

	for _, key := range []string{"written", "deleted"} {
		var e backend.Entry
		var err error
		require.Eventually(t, func() bool {
			e, err = b.Get(within(t, 5*time.Second), []byte(key))
			return err == nil || errors.Is(err, backend.ErrNotFound)
		}, patience, time.Millisecond, key)
		require.NoError(t, err, "a lost deletion was shown")
		require.Equal(t, "v", string(e.Value), "a lost change was shown")
	}
	n := 0
	for e, err := range b.Scan(ctx, nil, nil) {
		require.NoError(t, err)
		require.Equal(t, "v", string(e.Value))
		n++
	}
	require.Equal(t, 3, n)
	old.Crash()
}

// A feed has remained on a deposed primary, and has delivered a change that the standby never
// received. Reads reach the new primary, which does not have this change. The feed ends, and the
// next feed notices that the change is lost. So the reads continue although the old primary lives.
func TestFeedOfADeposedPrimary(t *testing.T) {
	t.Parallel()
	old, standby := startPair(t)
	pool := newPool(t, both(standby, old))
	b := open(t, pool, "apikeys", nil)
	last := open(t, newPool(t, old.URL()), "apikeys", nil)
	ctx := within(t, 2*patience)
	require.NoError(t, put(ctx, b, "kept", 0))
	feed := read(ctx, b, 0)
	feed.next(t)

	standby.Promote(t)
	standby.Standby(t, "b2")
	standby.Replicate(t, "b2")
	impatient, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- put(impatient, last, "lost", 0) }()
	old.Await(t, "select count(*) from pg_stat_activity where wait_event = 'SyncRep'", "1")
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
	lost := feed.next(t)
	require.Equal(t, "lost", string(lost.Changes[0].Key), "the feed is on the old primary")

	pool.Reset()
	_, err := b.Get(ctx, []byte("kept"))
	require.ErrorContains(t, err, "the server has the changes up to position")
	require.NotErrorIs(t, feed.fails(t), backend.ErrGap)
	require.ErrorIs(t, read(ctx, b, lost.Position).fails(t), backend.ErrGap)
	_, err = b.Get(ctx, []byte("kept"))
	require.NoError(t, err)
	read(ctx, b, 0).next(t)
	old.Crash()
}

// A store that still reaches a deposed primary does not report a missing entry: the new primary may
// have the entry.
func TestMissingEntryOnADeposedPrimary(t *testing.T) {
	t.Parallel()
	old, standby := startPair(t)
	left := open(t, newPool(t, old.URL()), "apikeys", nil)
	ctx := within(t, 2*patience)
	_, err := left.Get(ctx, []byte("k"))
	require.ErrorIs(t, err, backend.ErrNotFound)
	require.NoError(t, put(ctx, left, "old", 0))
	keys := [][]byte{[]byte("old"), []byte("k")}
	entries, err := left.GetAll(ctx, keys)
	require.NoError(t, err)
	require.Equal(t, []uint64{1, 0}, revisions(entries))

	standby.Promote(t)
	standby.Standby(t, "b2")
	standby.Replicate(t, "b2")
	moved := open(t, newPool(t, standby.URL()), "apikeys", nil)
	require.NoError(t, put(ctx, moved, "k", 0))
	_, err = left.Get(within(t, 300*time.Millisecond), []byte("k"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = left.GetAll(within(t, 300*time.Millisecond), keys)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	entries, err = moved.GetAll(ctx, keys)
	require.NoError(t, err)
	require.Equal(t, []uint64{1, 1}, revisions(entries))
	_, err = moved.Get(ctx, []byte("other"))
	require.ErrorIs(t, err, backend.ErrNotFound)
	old.Crash()
}

func revisions(entries []backend.Entry) (all []uint64) {
	for _, e := range entries {
		all = append(all, e.Revision)
	}
	return all
}

// An entry is missing when a read looks, and exists when the commit that follows looks. The read
// returns the entry, and each caller gets bytes of its own. Close ends a read that waits.
func TestEntryThatIsMissingAtFirst(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t)
	b := open(t, newPool(t, primary.URL()), "apikeys", nil)
	ctx := within(t, 2*patience)
	require.NoError(t, put(ctx, b, "old", 0))
	require.NoError(t, standby.Pause())
	done := make(chan error, 1)
	go func() {
		_, err := b.Get(ctx, []byte("missing"))
		done <- err
	}()
	primary.Await(t, "select count(*) from pg_stat_activity where wait_event = 'SyncRep'", "1")
	// The next reads wait for the end of this question.
	keys := [][]byte{[]byte("new"), []byte("old"), []byte("new"), []byte("missing")}
	found := make(chan []backend.Entry, 2)
	read := func() {
		entries, err := b.GetAll(ctx, keys)
		if err != nil {
			done <- err
		}
		found <- entries
	}
	go read()
	go read()
	require.Eventually(t, func() bool { return b.AskNext() == 2*3 }, patience, time.Millisecond)
	primary.Exec(t, "set synchronous_commit = local; "+
		"insert into apikeys.entry values ('new', 'v', 1, 2)")
	require.NoError(t, standby.Resume())
	require.ErrorIs(t, <-done, backend.ErrNotFound)
	first, second := <-found, <-found
	require.Equal(t, []uint64{1, 1, 1, 0}, revisions(first))
	require.Equal(t, first, second)
	first[0].Value[0], first[0].Key[0] = 'x', 'x'
	require.Equal(t, "v", string(first[2].Value))
	require.Equal(t, "v", string(second[0].Value))
	require.Equal(t, "new", string(first[2].Key))

	require.NoError(t, standby.Pause())
	for _, get := range []func() error{
		func() error { _, err := b.Get(ctx, []byte("missing")); return err },
		func() error { _, err := b.GetAll(ctx, keys); return err },
	} {
		go func() { done <- get() }()
	}
	require.Eventually(t, func() bool { return b.AskNext() > 0 }, patience, time.Millisecond)
	require.NoError(t, b.Close())
	require.ErrorIs(t, <-done, backend.ErrClosed)
	require.ErrorIs(t, <-done, backend.ErrClosed)
	require.NoError(t, standby.Resume())
}

// Reads of many missing entries share a commit, so callers that guess keys cost little. A caller
// that leaves delays no other caller.
func TestManyMissingEntries(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t)
	b := open(t, newPool(t, primary.URL()), "apikeys", nil)
	ctx := within(t, 2*patience)
	require.NoError(t, put(ctx, b, "k", 0))
	require.NoError(t, standby.Pause())
	const readers = 200
	done := make(chan error, readers)
	for n := range readers {
		go func() {
			_, err := b.Get(ctx, fmt.Append(nil, "missing ", n))
			done <- err
		}()
	}
	const waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'"
	primary.Await(t, waits, "1")
	_, err := b.Get(within(t, 300*time.Millisecond), []byte("missing"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	_, err = b.Get(ctx, []byte("k"))
	require.NoError(t, err, "an entry that exists is not delayed")
	require.Equal(t, "1", primary.Exec(t, waits), "%d reads have several commits", readers)
	require.NoError(t, standby.Resume())
	for range readers {
		require.ErrorIs(t, <-done, backend.ErrNotFound)
	}
}

// A reader reads a feed of all keys.
type reader struct {
	batches chan backend.Batch
	err     chan error
}

func read(ctx context.Context, b backend.Feeder, after backend.Position) *reader {
	r := &reader{make(chan backend.Batch, 1000), make(chan error, 1)}
	go func() {
		for batch, err := range b.Feed(ctx, nil, nil, after) {
			if err != nil {
				r.err <- err
				return
			}
			r.batches <- batch
		}
	}()
	return r
}

func (r *reader) next(t *testing.T) backend.Batch {
	t.Helper()
	select {
	case batch := <-r.batches:
		return batch
	case err := <-r.err:
		require.NoError(t, err)
	case <-time.After(patience):
		require.Fail(t, "the feed yields nothing")
	}
	return backend.Batch{}
}

func (r *reader) fails(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.err:
		return err
	case <-time.After(patience):
		require.Fail(t, "the feed does not end")
	}
	return nil
}

// A tracer calls a function once, after a statement has run and before the caller sees the result.
type tracer struct {
	statement string // how the statement begins
	run       func()
	once      sync.Once
}

type statementKey struct{}

func (*tracer) TraceQueryStart(
	ctx context.Context, _ *pgx.Conn, q pgx.TraceQueryStartData,
) context.Context {
	return context.WithValue(ctx, statementKey{}, q.SQL)
}

func (r *tracer) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) {
	if strings.HasPrefix(ctx.Value(statementKey{}).(string), r.statement) {
		r.once.Do(r.run)
	}
}

// A read that confirms is not refused because a feed delivers a change after the snapshot of the
// read was made.
func TestChangeDuringAConfirmedRead(t *testing.T) {
	t.Parallel()
	primary, _ := startPair(t)
	ctx := within(t, patience)
	c, err := pgxpool.ParseConfig(primary.URL())
	require.NoError(t, err)
	hook := &tracer{statement: "select position, tag, current_setting"}
	c.ConnConfig.Tracer = hook
	pool, err := pgxpool.NewWithConfig(ctx, c)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	b := open(t, pool, "apikeys", nil)
	feed := read(ctx, b, 0)
	feed.next(t)
	ran := false
	hook.run = func() {
		ran = true
		require.NoError(t, put(ctx, b, "other", 0))
		feed.next(t) // delivered
	}
	_, err = b.Get(ctx, []byte("missing")) // confirms that there is no entry
	require.ErrorIs(t, err, backend.ErrNotFound)
	require.True(t, ran)
}

// A standby is promoted without the last changes, which Unreplicated allows. A feed that has
// yielded one of these changes ends with ErrGap, whether or not other changes have the positions.
func TestPromotionThatLosesChanges(t *testing.T) {
	t.Parallel()
	for _, overtaken := range []bool{false, true} {
		t.Run(fmt.Sprint("overtaken ", overtaken), func(t *testing.T) {
			t.Parallel()
			primary := pglab.Start(t, pglab.Config{NoSync: true})
			standby := primary.Standby(t, "b")
			var j journal
			b := open(t, newPool(t, both(primary, standby)), "apikeys",
				&pgstore.Options{Unreplicated: true, Logger: j.logger()})
			ctx := within(t, 2*patience)
			r := read(ctx, b, 0)
			r.next(t)
			require.NoError(t, put(ctx, b, "kept", 0))
			r.next(t)
			primary.Await(t, "select count(*) from pg_stat_replication "+
				"where replay_lsn = pg_current_wal_lsn()", "1")
			standby.Stop()
			require.NoError(t, put(ctx, b, "lost", 0))
			last := r.next(t).Position
			primary.Crash()
			require.NotErrorIs(t, r.fails(t), backend.ErrGap, "the connection has ended")
			require.NoError(t, standby.Start())
			standby.Promote(t)

			if overtaken {
				for n := range uint64(3) {
					require.Eventually(t, func() bool { return put(ctx, b, "new", n) == nil },
						patience, 10*time.Millisecond)
				}
			}
			// Until the feed has noticed, a read refuses the older state.
			if _, err := b.Get(ctx, []byte("lost")); !overtaken {
				require.ErrorContains(t, err, "the server has the changes up to position")
			}
			require.NotContains(t, j.String(), "level=ERROR")
			require.ErrorIs(t, read(ctx, b, last).fails(t), backend.ErrGap)
			require.Contains(t, j.String(), "level=ERROR")
			require.Contains(t, j.String(), "revoked keys may be active again")

			_, err := b.Get(ctx, []byte("lost"))
			require.ErrorIs(t, err, backend.ErrNotFound)
			r = read(ctx, b, 0)
			start := r.next(t)
			require.Empty(t, start.Changes)
			require.NoError(t, put(ctx, b, "kept", 1))
			require.Greater(t, r.next(t).Position, start.Position)
		})
	}
}

// A promotion of the synchronous standby loses nothing: the feed continues without a gap on the new
// primary.
func TestPromotion(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t)
	b := open(t, newPool(t, both(primary, standby)), "apikeys", nil)
	ctx := within(t, 2*patience)
	r := read(ctx, b, 0)
	last := r.next(t).Position
	for n := range uint64(20) {
		require.NoError(t, put(ctx, b, "k", n))
		last = r.next(t).Position
	}
	primary.Crash()
	require.NotErrorIs(t, r.fails(t), backend.ErrGap)
	standby.Promote(t)
	err := errors.New("not tried")
	require.Eventually(t, func() bool {
		err = put(ctx, b, "k", 20)
		return err != nil && bytes.Contains([]byte(err.Error()), []byte("synchronous_standby_names"))
	}, patience, 10*time.Millisecond, "%v", err)
	// The new primary gets a standby of its own. Before, it confirms nothing.
	standby.Standby(t, "c")
	standby.Replicate(t, "c")
	require.NoError(t, put(ctx, b, "k", 20))
	r = read(ctx, b, last)
	batch := r.next(t)
	require.Equal(t, uint64(21), batch.Changes[0].Revision)
	require.Equal(t, last+1, batch.Position)
	e, err := b.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, uint64(21), e.Revision)
}

// A pool that leads to a standby is refused, also while the store is open.
func TestPoolThatReachesAStandby(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t)
	open(t, newPool(t, primary.URL()), "apikeys", nil)
	_, err := pgstore.Open(within(t, 3*time.Second), newPool(t, standby.URL()), "apikeys", nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "target_session_attrs=read-write")
}
