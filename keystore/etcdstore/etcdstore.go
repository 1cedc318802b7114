package etcdstore

import (
	"context"
	"fmt"
	"log/slog"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Options are the settings of a Backend. A nil *Options means the zero Options.
type Options struct {
	// QuotaBytes is the quota of etcd's database in bytes: the value of --quota-backend-bytes of
	// the servers. 0 means the quota that the servers report, which etcd does since version 3.6; a
	// server that reports no quota counts as a server with etcd's default, 2 GiB. A negative value
	// means that the servers have no quota.
	QuotaBytes int64
	// Logger receives the log messages. Nil means that nothing is logged.
	Logger *slog.Logger
}

// A Backend keeps the entries of one store in etcd. The methods are safe for concurrent use.
type Backend struct {
	client *clientv3.Client
	kv     clientv3.KV
	watch  pb.WatchClient
	prefix string // as the caller of Open wrote the prefix, for messages
	base   string // the prefix of the keys in etcd: see baseOf
	log    logger
	quota  quota

	done   context.Context // ends with Close
	cancel context.CancelFunc
	calls  sync.WaitGroup // the running calls, and the goroutine that watches the quota

	closing sync.Mutex // guards closed, and the Add of calls
	closed  bool

	history history
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
// Apply that returns ErrClosed may have changed the entries. Close does not close the client.
func (b *Backend) Close() error {
	b.closing.Lock()
	b.closed = true
	b.closing.Unlock()
	b.cancel()
	b.calls.Wait()
	return nil
}

// String returns a text that names the prefix, without credentials.
func (b *Backend) String() string { return fmt.Sprintf("etcd prefix %q", b.prefix) }

// GoString keeps the client, whose configuration has credentials, out of %#v.
func (b *Backend) GoString() string { return "etcdstore.Backend{" + b.String() + "}" }

// baseOf returns the prefix of the keys in etcd. The NUL byte ends the prefix of the caller, which
// has no NUL byte. So no base is a prefix of another base, and two stores share no key, even if
// their prefixes are "/a" and "/ab". The entry with the storage key k has the key base+k in etcd.
// The key base alone is the marker of the store.
func baseOf(prefix string) string { return prefix + "\x00" }

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
