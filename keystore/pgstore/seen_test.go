package pgstore_test

import (
	"context"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// A recorder is a tracer that keeps the statements that read entries. A feed has the tracer of the
// pool too, and reads the log at any time.
type recorder struct {
	mu         sync.Mutex // guards statements
	statements []string
}

func (r *recorder) TraceQueryStart(
	ctx context.Context, _ *pgx.Conn, q pgx.TraceQueryStartData,
) context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	if strings.Contains(q.SQL, ".entry") {
		r.statements = append(r.statements, q.SQL)
	}
	return ctx
}

func (*recorder) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// take returns one letter for each statement since the last take: L for one that reads the log, and
// E for one that reads only the entry.
func (r *recorder) take() (letters string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.statements {
		if strings.Contains(s, ".log") {
			letters += "L"
		} else {
			letters += "E"
		}
	}
	r.statements = nil
	return letters
}

// newSingle returns a pool of one connection. A Backend has connections of its own too.
func newSingle(t *testing.T, url string, change func(*pgxpool.Config)) *pgxpool.Pool {
	c, err := pgxpool.ParseConfig(url)
	require.NoError(t, err)
	c.MaxConns = 1
	change(c)
	pool, err := pgxpool.NewWithConfig(context.Background(), c)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return pool
}

// stepwise reads a feed of all keys. The feed delivers a change only while the test calls next, and
// next returns the position of the change.
func stepwise(
	ctx context.Context, t *testing.T, b *pgstore.Backend,
) (next func() backend.Position) {
	changes, resume := make(chan backend.Position), make(chan struct{}, 1)
	go func() {
		for batch, err := range b.Feed(ctx, nil, nil, 0) {
			if err != nil {
				return // also at the end of the test
			}
			select {
			case changes <- batch.Position:
			case <-ctx.Done():
				return
			}
			select {
			case <-resume:
			case <-ctx.Done():
				return
			}
		}
	}()
	began := false
	return func() (at backend.Position) {
		t.Helper()
		if began {
			resume <- struct{}{}
		}
		began = true
		select {
		case at = <-changes:
		case <-ctx.Done():
			require.Fail(t, "the feed yields nothing")
		}
		return at
	}
}

// A Get reads the log if its connection has not shown the present view, and not again before there
// is another view.
func TestGetReadsTheLogOnceForEachView(t *testing.T) {
	t.Parallel()
	primary, _ := startPair(t)
	for name, o := range map[string]*pgstore.Options{"replicated": nil, "unreplicated": alone} {
		t.Run(name, func(t *testing.T) {
			var r recorder
			pool := newSingle(t, primary.URL(), func(c *pgxpool.Config) { c.ConnConfig.Tracer = &r })
			schema := newSchema()
			b, other := open(t, pool, schema, o), open(t, pool, newSchema(), o)
			ctx := within(t, patience)
			get := func(b *pgstore.Backend, revision uint64) string {
				t.Helper()
				r.take()
				e, err := b.Get(ctx, []byte("k"))
				require.NoError(t, err)
				require.Equal(t, revision, e.Revision)
				return r.take()
			}
			require.NoError(t, put(ctx, b, "k", 0))
			require.NoError(t, put(ctx, other, "k", 0))
			require.Equal(t, "L", get(b, 1))
			require.Equal(t, "E", get(b, 1))
			require.Equal(t, "L", get(other, 1), "the other schema has another log")
			require.Equal(t, "E", get(other, 1))
			require.Equal(t, "E", get(b, 1))
			require.NoError(t, put(ctx, b, "k", 1))
			require.Equal(t, "L", get(b, 2), "there is another view")
			require.Equal(t, "E", get(b, 2))
			pool.Reset()
			require.Equal(t, "L", get(b, 2), "the connection is new")
			require.Equal(t, "E", get(b, 2))

			process := open(t, newPool(t, primary.URL()), schema, o)
			next := stepwise(ctx, t, b)
			at := next()
			require.NoError(t, put(ctx, process, "other", 0))
			require.Greater(t, next(), at)
			require.Equal(t, "L", get(b, 2), "the feed has delivered a change of another process")
			require.Equal(t, "E", get(b, 2))

			require.NoError(t, put(ctx, process, "k", 2))
			if got := get(b, 3); o == nil {
				require.Regexp(t, "^EL", got, "the entry is newer than the mark")
			} else {
				require.Equal(t, "E", got)
			}
			require.Greater(t, next(), at)
			get(b, 3) // the wait for the standby has made another view
			require.Equal(t, "E", get(b, 3))
			_, err := b.Get(ctx, []byte("missing"))
			require.ErrorIs(t, err, backend.ErrNotFound)
			require.Regexp(t, "^E", r.take())
		})
	}
}

// A switched is a connection whose other end can be replaced, as a pooler does that lends each
// statement another connection.
type switched struct{ net.Conn }

// A connection that leads to another server than before shows no entry from before what the feed
// has delivered, although the connection has shown the mark on the server before.
func TestServerChangesBehindAConnection(t *testing.T) {
	t.Parallel()
	for name, replace := range map[string]func(*testing.T, *pglab.Server) *pglab.Server{
		"a standby that is late": func(t *testing.T, primary *pglab.Server) *pglab.Server {
			standby := primary.Standby(t, "b")
			standby.Await(t, "select count(*) from apikeys.entry", "1")
			standby.Exec(t, "select pg_wal_replay_pause()")
			standby.Await(t, "select pg_get_wal_replay_pause_state()", "paused")
			return standby
		},
		"a restored server": func(t *testing.T, primary *pglab.Server) *pglab.Server {
			restored := pglab.New(t, pglab.Config{NoSync: true})
			restored.Backup(t, primary)
			require.NoError(t, restored.Start())
			return restored
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			primary := pglab.Start(t, pglab.Config{NoSync: true})
			pool := newSingle(t, primary.URL(), func(c *pgxpool.Config) {
				// No statement has a name, which another server would not know.
				c.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
				dial := c.ConnConfig.DialFunc
				c.ConnConfig.DialFunc = func(
					ctx context.Context, network, addr string,
				) (net.Conn, error) {
					conn, err := dial(ctx, network, addr)
					return &switched{conn}, err
				}
			})
			b := open(t, pool, "apikeys", alone)
			ctx := within(t, patience)
			require.NoError(t, put(ctx, b, "k", 0))
			other := replace(t, primary)
			r := read(ctx, b, 0)
			at := r.next(t).Position
			require.NoError(t, put(ctx, b, "k", 1))
			require.Greater(t, r.next(t).Position, at)
			for range 2 { // the second Get does not read the log
				e, err := b.Get(ctx, []byte("k"))
				require.NoError(t, err)
				require.Equal(t, uint64(2), e.Revision)
			}

			unpooled, err := pgconn.Connect(ctx, other.URL())
			require.NoError(t, err)
			hijacked, err := unpooled.Hijack()
			require.NoError(t, err)
			conn, err := pool.Acquire(ctx)
			require.NoError(t, err)
			end := conn.Conn().PgConn().Conn().(*switched)
			require.NoError(t, end.Conn.Close())
			end.Conn = hijacked.Conn
			conn.Release()
			_, err = b.Get(ctx, []byte("k"))
			require.ErrorContains(t, err, "server")
			e, err := b.Get(ctx, []byte("k"))
			require.NoError(t, err, "a new connection leads to the primary")
			require.Equal(t, uint64(2), e.Revision)
		})
	}
}
