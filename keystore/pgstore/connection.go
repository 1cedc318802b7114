package pgstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

const (
	// maxOwn is the largest number of own connections, without those of feeds.
	maxOwn = 8
	// minVersion is the first version of PostgreSQL that the store accepts, as the server writes
	// the number.
	minVersion = 140000
	// maxAttempts is the number of connections that a call tries. Each connection of the pool may
	// be broken, because the server has restarted, and one more is new.
	maxAttempts = maxOwn + 1
	// resetPause is the shortest time between two resets of a pool.
	resetPause = 5 * time.Second
	// closeTimeout bounds the end of a connection, which tells the server that the connection ends.
	closeTimeout = time.Second
)

// newOwnPool returns a pool for the writes, feeds and snapshots. The pool of the caller cannot
// serve these:
//
//   - A commit may succeed with a warning that the commit is perhaps on no standby. Only the
//     OnNotice of the configuration of a connection sees the warning.
//   - A statement timeout must not end the wait for the standby.
//   - A heartbeat must not wait for a connection of an exhausted pool.
func (b *Backend) newOwnPool() (*pgxpool.Pool, error) {
	c := b.pool.Config()
	c.MaxConns, c.MinConns, c.MinIdleConns = maxOwn, 0, 0
	c.PrepareConn = func(context.Context, *pgx.Conn) (bool, error) { return true, nil }
	c.AfterRelease, c.BeforeClose = nil, nil
	notice := c.ConnConfig.OnNotice
	c.ConnConfig.OnNotice = func(conn *pgconn.PgConn, n *pgconn.Notice) {
		if n.SeverityUnlocalized == "WARNING" {
			stateOf(conn).warning = n.Message
		}
		if notice != nil {
			notice(conn, n)
		}
	}
	c.ConnConfig.OnNotification = func(conn *pgconn.PgConn, _ *pgconn.Notification) {
		stateOf(conn).notified = true
	}
	after := c.AfterConnect
	c.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		if after != nil {
			if err := after(ctx, conn); err != nil {
				return err
			}
		}
		return b.setUp(ctx, conn)
	}
	return pgxpool.NewWithConfig(context.Background(), c)
}

// A resetter closes the connections of a pool that are not in use, because a connection seems to
// lead to a server that was replaced. A server that is only slow, or a pool that leads to the same
// server again, does not lose its connections all the time.
type resetter struct {
	pool *pgxpool.Pool

	mu   sync.Mutex
	last time.Time // guarded by mu
}

// reset reports whether it has closed the connections.
func (r *resetter) reset() bool {
	r.mu.Lock()
	due := time.Since(r.last) > resetPause
	if due {
		r.last = time.Now()
	}
	r.mu.Unlock()
	if due {
		r.pool.Reset()
	}
	return due
}

// isBehind notes that a read has reached a server without changes that a feed has delivered. Other
// connections of the pool may lead to the same server. Or else the feed has remained on a primary
// that was deposed: such a primary shows changes that are on no standby once the wait for the
// standby is canceled. So the feeds end too, and continue with other connections, which find out
// whether these changes are lost.
func (b *Backend) isBehind() {
	b.reads.reset()
	if b.feeds.reset() {
		b.moves.Add(1)
	}
}

func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	_ = conn.Close(ctx)
}

// A connState is what an own connection has received from the server. Only the goroutine that uses
// the connection uses its connState.
type connState struct {
	warning  string // of the last statement; "": none
	notified bool
}

func stateOf(conn *pgconn.PgConn) *connState {
	data := conn.CustomData()
	s, ok := data["pgstore"].(*connState)
	if !ok {
		s = new(connState)
		data["pgstore"] = s
	}
	return s
}

// setUp changes the settings of an own connection, and returns the state of the server. A setting
// that the server does not know is left out. Nothing is changed unless the statement runs in the
// process of the server with the number %d: a pooler may lend the process to others.
//
//   - The warning about the wait for a standby must arrive.
//   - apply needs that each of its statements sees the commits before the statement.
//   - A timeout in the wait for a standby would make the change visible without the standby.
const setUp = `
with settings as materialized (
	select set_config(s.name, c.value, false)
	from (values
		('client_min_messages', 'warning'),
		('default_transaction_isolation', 'read committed'),
		('statement_timeout', '0'),
		('transaction_timeout', '0'),
		('lock_timeout', '0'),
		('idle_in_transaction_session_timeout', '0'),
		('idle_session_timeout', '0')
	) c(name, value) join pg_settings s on s.name = c.name
	where pg_backend_pid() = %d
)
select (select count(*) from settings) > 0, pg_backend_pid(),
	current_setting('server_version_num')::int, current_setting('server_version'),
	pg_is_in_recovery(), current_setting('fsync'),
	current_setting('synchronous_standby_names'), current_setting('synchronous_commit')`

// oneTrip runs a statement in one round trip. For a query in the simple protocol, pgx would require
// client_encoding UTF8 and standard_conforming_strings, which the role or the database may set
// otherwise. A database whose encoding is not UTF8 has another client_encoding by default.
const oneTrip = pgx.QueryExecModeExec

// setUp prepares a new connection, and returns an error if the server cannot serve the store.
func (b *Backend) setUp(ctx context.Context, conn *pgx.Conn) error {
	var number int
	var process uint32
	var version, fsync, standbys, commit string
	var set, standby bool
	try := func(expected uint32) error {
		return conn.QueryRow(ctx, fmt.Sprintf(setUp, expected), oneTrip).
			Scan(&set, &process, &number, &version, &standby, &fsync, &standbys, &commit)
	}
	err := try(conn.PgConn().PID())
	if err == nil && !set {
		if err = b.checkPooler(ctx, conn); err == nil {
			err = try(process)
		}
		if err == nil && !set {
			err = b.poolerError()
		}
	}
	switch {
	case err != nil:
		return err
	case number < minVersion:
		return b.refuse("the server has version %s of PostgreSQL: the store needs version %d or "+
			"later: update PostgreSQL", version, minVersion/10000)
	case standby:
		return errStandby
	case commit == "off":
		return b.refuse("synchronous_commit is off, so a crash of the server loses the last " +
			"changes: set synchronous_commit to on, for example with \"alter role ROLE set " +
			"synchronous_commit = on\"")
	case !b.unreplicated && standbys == "":
		return b.refuse("synchronous_standby_names is empty: %s", adviceUnreplicated)
	case !b.unreplicated && commit == "local":
		return b.refuse("synchronous_commit is %s: %s", commit, adviceUnreplicated)
	}
	if fsync != "on" {
		b.log.Log(slog.LevelWarn, "fsync is off: a crash of the server's machine loses changes and "+
			"damages the database", "schema", b.schema)
	}
	return nil
}

const (
	// poolerTimeout is how long a pooler may let a connection wait for a process of the server.
	poolerTimeout = 5 * time.Second
	// poolerRounds is the number of attempts to see that a pooler lends a process of the server to
	// another connection.
	poolerRounds = 20
)

// checkPooler returns an error if a pooler is between the store and the server, such as PgBouncer,
// and each transaction of a connection may run in another process of the server. Then LISTEN and
// the settings of a connection have no effect, or have an effect on other programs.
//
// In each round, the connection makes a transaction, another connection begins one, and the
// connection makes one more. If both transactions of the connection run in the same process, and
// the other transaction in another one, the pooler may have done this by chance, and the next round
// follows.
func (b *Backend) checkPooler(ctx context.Context, conn *pgx.Conn) error {
	process := func(c *pgx.Conn) (number uint32, err error) {
		err = c.QueryRow(ctx, "select pg_backend_pid()", oneTrip).Scan(&number)
		return number, err
	}
	other, err := pgx.ConnectConfig(ctx, conn.Config())
	if err != nil {
		return err
	}
	defer closeConn(other)
	for range poolerRounds {
		first, err := process(conn)
		if err != nil {
			return err
		}
		if err := b.beginPooled(ctx, other); err != nil {
			return err
		}
		between, err := process(other)
		if err != nil {
			return err
		}
		second, err := process(conn)
		if err != nil {
			return err
		}
		if between == first || second != first {
			return b.poolerError()
		}
		if _, err := other.Exec(ctx, "commit", pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
	}
	return nil
}

// beginPooled begins a transaction on a connection to a pooler.
func (b *Backend) beginPooled(ctx context.Context, conn *pgx.Conn) error {
	limited, cancel := context.WithTimeout(ctx, poolerTimeout)
	defer cancel()
	_, err := conn.Exec(limited, "begin", pgx.QueryExecModeSimpleProtocol)
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "statement pooling mode"):
		return b.poolerError()
	case ctx.Err() == nil && limited.Err() != nil:
		return b.refuse("a pooler, such as PgBouncer, gives the store no second connection: raise "+
			"default_pool_size in pgbouncer.ini: each process of the store has up to %d "+
			"connections, and those of its pool", maxOwn+2) // a feed, and one that is checked
	}
	return err
}

func (b *Backend) poolerError() error {
	return b.refuse("the connection leads through a pooler, such as PgBouncer, that lends each " +
		"transaction another connection of the server: LISTEN and the settings of a connection do " +
		"not last there: set pool_mode = session in pgbouncer.ini for the user or the database, " +
		"or connect to PostgreSQL without the pooler")
}

// errStandby is the error of an own connection to a standby. After a failover, the same connection
// string may lead to a primary.
var errStandby = fmt.Errorf("the server is a standby (hot standby): %s", adviceStandby)

// isUnreachable reports whether an error says that there is no server, or no primary, at present.
func isUnreachable(err error) bool {
	var n net.Error
	var c *pgconn.ConnectError
	text := err.Error()
	switch {
	case strings.Contains(text, "tls:"), strings.Contains(text, "refused TLS"):
		return false
	case errors.Is(err, errStandby), pgconn.SafeToRetry(err), pgconn.Timeout(err):
		return true
	case errors.As(err, &n):
		return true
	}
	return errors.As(err, &c) && codeOf(err) == ""
}
