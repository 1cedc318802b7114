package pgstore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
)

const (
	// openTimeout bounds Open if the context has no deadline.
	openTimeout = 10 * time.Second
	// openPause is the time between two attempts to reach the server.
	openPause = 100 * time.Millisecond
)

// Open opens the store in a schema of a database, and makes the schema and its tables if the
// database has none. If the role may not make the tables, Open returns an error, and the owner of
// the database runs the SQL of Schema. Open waits for the server until ctx ends; if ctx has no
// deadline, for at most 10 s. Open does not wait for a problem that waiting cannot solve, such as a
// wrong password.
//
// Choose a schema that belongs to the store alone, such as "apikeys". The name has 1 to 63 bytes,
// and may be any name that PostgreSQL accepts.
//
// The pool stays the caller's: close the pool after the Backend. Reads use the pool. For writes and
// feeds, the Backend opens up to 8 other connections, with the configuration of the pool; each
// running Feed has one more. So neither a pool that is exhausted nor a statement timeout delays a
// revocation. A nil *Options means the zero Options.
//
// Several Backends may have the same schema, in one process or in many. The Backend is a
// backend.Feeder, a backend.DownScanner and a backend.AllGetter.
func Open(
	ctx context.Context, pool *pgxpool.Pool, schema string, opts *Options,
) (*Backend, error) {
	if opts == nil {
		opts = &Options{}
	}
	if pool == nil {
		return nil, errors.New("pgstore: open: the pool is nil: make the pool with pgxpool.New")
	}
	if err := checkSchema(schema); err != nil {
		return nil, fmt.Errorf("pgstore: open: %w", err)
	}
	b := &Backend{pool: pool, schema: schema, seenKey: "pgstore " + schema,
		sql: newStatements(schema), unreplicated: opts.Unreplicated,
		log: remote.Logger{To: opts.Logger}, calls: remote.NewCalls()}
	var err error
	if b.own, err = b.newOwnPool(); err != nil {
		return nil, b.explain("open", err)
	}
	b.reads.pool, b.writes.pool, b.feeds.pool = b.pool, b.own, b.own
	if err := b.open(ctx); err != nil {
		b.calls.Close()
		b.own.Close()
		return nil, err
	}
	return b, nil
}

func (b *Backend) open(ctx context.Context) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, openTimeout)
		defer cancel()
	}
	var last error
	for {
		err := b.openSchema(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil {
			last = err
		}
		if ctx.Err() == nil && isWorthWaiting(err) {
			remote.Sleep(ctx, openPause)
		}
		switch {
		case ctx.Err() == nil && isWorthWaiting(err):
		case ctx.Err() == nil:
			return b.explain("open", err)
		case last != nil:
			return &remote.Error{Text: b.explain("open", last).Error(),
				Err: errors.Join(ctx.Err(), last)}
		default:
			return fmt.Errorf("pgstore: open: the server does not answer: check the connection "+
				"string and the network: %w", ctx.Err())
		}
	}
}

// isWorthWaiting reports whether a server with this error may answer later.
func isWorthWaiting(err error) bool {
	switch codeOf(err) {
	case "":
		return isUnreachable(err)
	case codeCannotConnect, codeAdminShutdown, codeCrashShutdown, codeTooManyConns, codeReadOnly:
		return true
	}
	return false
}

// openSchema checks the tables of the store, and makes the tables if the schema has no tables yet.
func (b *Backend) openSchema(ctx context.Context) error {
	conn, err := b.own.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	var found int
	err = conn.QueryRow(ctx, b.sql.version).Scan(&found)
	switch codeOf(err) {
	case codeNoTable, codeNoSchema:
		found, err = 0, nil
	case codeNoColumn:
		return b.foreignError("head")
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return b.hiddenError()
	}
	if err != nil {
		return err
	}
	if found > format {
		return b.laterError()
	}
	if found < format {
		if err := b.migrate(ctx, conn, found == 0); err != nil {
			return err
		}
	}
	var enough, hidden bool
	if err := conn.QueryRow(ctx, b.sql.rights).Scan(&enough, &hidden); err != nil {
		return err
	}
	if hidden {
		return b.hiddenError()
	}
	if !enough {
		return b.refuse("the role has too few rights in the schema %q: %s", b.schema, b.grants())
	}
	return nil
}

// migrate makes the tables of the store, or brings the tables of an earlier version up to date.
func (b *Backend) migrate(ctx context.Context, conn *pgxpool.Conn, isNew bool) error {
	_, err := conn.Exec(ctx, b.sql.migrate)
	switch codeOf(err) {
	case codeNoRight:
		return b.refuse("the schema %q has no store, and the role may not make the tables: let the "+
			"owner of the database run the SQL of pgstore.Schema(%[1]q), and then %s: %v",
			b.schema, b.grants(), err)
	case codeDuplicateTable, codeNoColumn:
		return b.foreignError(err.Error())
	case codeLater:
		return b.laterError()
	}
	if err == nil && isNew {
		b.log.Log(slog.LevelInfo, "made a new store in PostgreSQL", "schema", b.schema)
	}
	return err
}

// refuse returns an error of Open that says what to do.
func (b *Backend) refuse(text string, args ...any) error {
	return &remote.Error{Text: "pgstore: open: " + fmt.Sprintf(text, args...)}
}

func (b *Backend) foreignError(what string) error {
	return b.refuse("the schema %q holds tables of something else (%s): choose a schema that is "+
		"the store's own", b.schema, what)
}

// hiddenError is for a role that would read a store with entries as a store without entries.
func (b *Backend) hiddenError() error {
	return b.refuse("row-level security hides the rows of the schema %q from the role, or another "+
		"program has deleted the row of the table head: for each table of the schema, run: alter "+
		"table NAME disable row level security", b.schema)
}

func (b *Backend) laterError() error {
	return b.refuse("a later version has made the tables of the schema %q: update this program",
		b.schema)
}
