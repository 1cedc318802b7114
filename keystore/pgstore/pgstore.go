package pgstore

import (
	"fmt"
	"log/slog"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Options are the settings of a Backend. A nil *Options means the zero Options.
type Options struct {
	// Unreplicated allows a server without synchronous replication. The guarantees of the store
	// then hold for as long as this server lives: if a standby replaces the server, revocations
	// that have returned may be lost, and processes that still reach the old server continue to
	// admit keys that are revoked on the new server.
	Unreplicated bool
	// Logger receives the log messages. Nil means that nothing is logged.
	Logger *slog.Logger
}

// A Backend keeps the entries of one store in PostgreSQL. The methods are safe for concurrent use.
type Backend struct {
	pool         *pgxpool.Pool // of the caller: for Get and the scans
	own          *pgxpool.Pool // for Apply, Feed and Snapshot; see newOwnPool
	schema       string        // as the caller of Open wrote the name, for messages
	seenKey      string        // see seenBy
	sql          statements
	unreplicated bool
	log          remote.Logger

	calls *remote.Calls

	reads, writes resetter      // of pool and of own
	feeds         resetter      // of own
	moves         atomic.Uint64 // a feed with an earlier number ends

	committer committer
	absence   absence
	history   history
}

var (
	_ backend.Feeder      = (*Backend)(nil)
	_ backend.DownScanner = (*Backend)(nil)
	_ backend.AllGetter   = (*Backend)(nil)
)

// Close makes the running calls and feeds return ErrClosed, and waits for the calls. A call of
// Apply that returns ErrClosed may have changed the entries. Close closes the connections that the
// Backend has opened, and does not close the pool of the caller.
func (b *Backend) Close() error {
	b.calls.Close()
	b.own.Close()
	return nil
}

// String returns a text that names the schema, without credentials.
func (b *Backend) String() string { return fmt.Sprintf("PostgreSQL schema %q", b.schema) }

// GoString keeps the pool, whose configuration has credentials, out of %#v.
func (b *Backend) GoString() string { return "pgstore.Backend{" + b.String() + "}" }
