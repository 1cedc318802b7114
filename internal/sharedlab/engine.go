package sharedlab

import (
	"context"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// An Engine is the running servers of a shared store. The chaos knows nothing else of an engine.
type Engine interface {
	// Name is the name of the engine in openers.
	Name() string
	// Addresses returns the host and port of each server. The addresses never change.
	Addresses() []string
	// Faults returns what the servers can suffer. The chaos injects one of these faults at a time,
	// on the goroutine of the test.
	Faults(t testing.TB) []Fault
}

// A Fault is something bad that happens to servers or to processes.
type Fault struct {
	Name string
	// Inject starts the fault, waits until ctx ends, and ends the fault. An error means that the
	// laboratory failed, and ends the test.
	Inject func(ctx context.Context) error
	// Loses says that the fault loses changes that were confirmed while Inject ran, such as the
	// restore of an old snapshot. Nothing is required of these changes.
	Loses bool
}

// openers open a store in a process, by the name of the engine. An opener gets an address for each
// server. The space separates stores on the same servers.
var openers = map[string]func(
	ctx context.Context, addresses []string, space string,
) (backend.Feeder, error){
	"etcd":     openEtcd,
	"postgres": openPostgres,
}

// openEtcd opens a store in etcd. The space is the prefix.
func openEtcd(
	ctx context.Context, addresses []string, space string,
) (backend.Feeder, error) {
	var urls []string
	for _, hostport := range addresses {
		urls = append(urls, "http://"+hostport)
	}
	client, err := clientv3.New(clientConfig(urls))
	if err != nil {
		return nil, err
	}
	b, err := etcdstore.Open(ctx, client, space, nil)
	if err != nil {
		_ = client.Close()
		return nil, err
	}
	return etcdHandle{b, client}, nil
}

// An etcdHandle is a Backend that closes its client.
type etcdHandle struct {
	*etcdstore.Backend
	client *clientv3.Client
}

// Close closes the Backend and the client.
func (h etcdHandle) Close() error {
	defer h.client.Close()
	return h.Backend.Close()
}

// clientConfig returns the settings that the documentation of etcdstore recommends.
func clientConfig(urls []string) clientv3.Config {
	return clientv3.Config{
		Endpoints: urls, DialKeepAliveTime: 10 * time.Second,
		DialKeepAliveTimeout: 3 * time.Second, PermitWithoutStream: true,
		DialTimeout: patience, Logger: zap.NewNop(),
	}
}
