package sharedlab

import (
	"context"
	"flag"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

var onlyEngine = flag.String("engine", "", "the only engine of the chaos and of the tests of "+
	"credits: etcd or postgres; if empty, both, one after the other")

func TestMain(m *testing.M) {
	RunChild()
	goleak.VerifyTestMain(m)
}

var prefixes atomic.Int64

// newPrefix returns a prefix that no other test uses.
func newPrefix() string { return fmt.Sprintf("/test/%d/", prefixes.Add(1)) }

func open(t testing.TB, client *clientv3.Client, prefix string) *etcdstore.Backend {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := etcdstore.Open(ctx, client, prefix, nil)
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func TestConformance(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	backendtest.Run(t, func(t *testing.T) backend.Backend { return open(t, client, newPrefix()) })
}

// An engine is a prefix of a lab. Each handle has a client of its own, as each process has.
type engine struct {
	t       *testing.T
	lab     *Etcd
	prefix  string
	clients []*clientv3.Client
	next    atomic.Int64
}

func (e *engine) Open() backend.Feeder {
	return open(e.t, e.clients[e.next.Add(1)%int64(len(e.clients))], e.prefix)
}

// Trim compacts everything. etcd keeps the change at the compacted revision, so this change is one
// of another prefix.
func (e *engine) Trim() {
	ctx := context.Background()
	r, err := e.clients[0].Put(ctx, "/other", "")
	require.NoError(e.t, err)
	_, err = e.clients[0].Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical())
	require.NoError(e.t, err)
}

// Save returns a function that restores etcd from a snapshot, with another cluster ID. TestRestore
// has the same cluster ID too.
func (e *engine) Save() (restore func()) {
	file := e.lab.Snapshot(e.t)
	return func() { e.lab.Restore(e.t, file, "another") }
}

func TestFeedConformance(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	clients := []*clientv3.Client{l.Client(t), l.Client(t), l.Client(t)}
	backendtest.RunFeed(t, func(t *testing.T) backendtest.Engine {
		return &engine{t: t, lab: l, prefix: newPrefix(), clients: clients}
	})
}
