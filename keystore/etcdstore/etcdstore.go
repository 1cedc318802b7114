package etcdstore

import (
	"fmt"
	"log/slog"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
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
	log    remote.Logger
	quota  quota

	calls *remote.Calls

	history history
}

var (
	_ backend.Feeder      = (*Backend)(nil)
	_ backend.DownScanner = (*Backend)(nil)
	_ backend.AllGetter   = (*Backend)(nil)
)

// Close makes the running calls and feeds return ErrClosed, and waits for the calls. A call of
// Apply that returns ErrClosed may have changed the entries. Close does not close the client.
func (b *Backend) Close() error {
	b.calls.Close()
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
