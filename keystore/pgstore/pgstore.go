package pgstore

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"

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
	sql          statements
	unreplicated bool
	log          logger

	done   context.Context // ends with Close
	cancel context.CancelFunc
	calls  sync.WaitGroup // the running calls and writers

	closing sync.Mutex // guards closed, and the Add of calls
	closed  bool

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

// begin counts a call, and returns a context that ends with the context of the caller and with
// Close. The caller of begin calls end when the call is over.
func (b *Backend) begin(ctx context.Context) (joined context.Context, end func(), err error) {
	joined, stop, err := b.join(ctx)
	if err != nil {
		return nil, nil, err
	}
	b.closing.Lock()
	defer b.closing.Unlock()
	if b.closed {
		stop()
		return nil, nil, backend.ErrClosed
	}
	b.calls.Add(1)
	return joined, func() { stop(); b.calls.Done() }, nil
}

// join returns a context that ends with the context of the caller and with Close. Close does not
// wait for a caller of join.
func (b *Backend) join(ctx context.Context) (joined context.Context, stop func(), err error) {
	if err := b.ended(ctx); err != nil {
		return nil, nil, err
	}
	joined, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(b.done, cancel)
	return joined, func() { unhook(); cancel() }, nil
}

// ended returns the error of a context that has ended, ErrClosed after Close, or nil.
func (b *Backend) ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if b.done.Err() != nil {
		return backend.ErrClosed
	}
	return nil
}

// Close makes the running calls and feeds return ErrClosed, and waits for the calls. A call of
// Apply that returns ErrClosed may have changed the entries. Close closes the connections that the
// Backend has opened, and does not close the pool of the caller.
func (b *Backend) Close() error {
	b.closing.Lock()
	b.closed = true
	b.closing.Unlock()
	b.cancel()
	b.calls.Wait()
	b.own.Close()
	return nil
}

// String returns a text that names the schema, without credentials.
func (b *Backend) String() string { return fmt.Sprintf("PostgreSQL schema %q", b.schema) }

// GoString keeps the pool, whose configuration has credentials, out of %#v.
func (b *Backend) GoString() string { return "pgstore.Backend{" + b.String() + "}" }

// A logger is a slog.Logger that may be nil. A logger may be called on a goroutine of the Backend,
// where a panic of a slog.Handler would end the process, so a logger drops the panic.
type logger struct{ to *slog.Logger }

func (l logger) log(level slog.Level, text string, args ...any) {
	if l.to == nil {
		return
	}
	defer func() { _ = recover() }()
	l.to.Log(context.Background(), level, text, args...)
}
