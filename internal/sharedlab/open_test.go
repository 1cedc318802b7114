package sharedlab

import (
	"context"
	"fmt"
	"net"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

func endpoints(urls ...string) func(*clientv3.Config) {
	return func(c *clientv3.Config) { c.Endpoints = urls }
}

// late requires that Open waits for the endpoint until the context ends, and says what is wrong.
func late(t *testing.T, client *clientv3.Client, says ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, err := etcdstore.Open(ctx, client, "/p/", nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	for _, text := range says {
		require.ErrorContains(t, err, text)
	}
}

func TestOpenWithoutEtcd(t *testing.T) {
	t.Parallel()
	l := &Etcd{}
	const closed = "127.0.0.1:1" // a port that the system gives to no other test
	client := l.Client(t, endpoints("http://app:hunter2@"+closed))
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	_, err := etcdstore.Open(ctx, client, "/p/", nil)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorContains(t, err, "http://"+closed+": ")
	require.ErrorContains(t, err, "check the endpoint")
	require.NotContains(t, err.Error(), "hunter2")

	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never answers
	require.NoError(t, err)
	defer silent.Close()
	late(t, l.Client(t, endpoints("http://"+silent.Addr().String())), silent.Addr().String(),
		"no answer: check the endpoint")

	web := httptest.NewServer(nil)
	defer web.Close()
	refused(t, l.Client(t, endpoints(web.URL)), "/p/", web.URL)

	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	other := grpc.NewServer()
	go func() { _ = other.Serve(listener) }()
	defer other.Stop()
	refused(t, l.Client(t, endpoints("http://"+listener.Addr().String())), "/p/",
		"not a client URL of an etcd server")

	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = etcdstore.Open(cancelled, client, "/p/", nil)
	require.ErrorIs(t, err, context.Canceled)
	refused(t, nil, "/p/", "clientv3.New")
	refused(t, clientv3.NewCtxClient(context.Background()), "/p/", "clientv3.New")
}

func TestOpen(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	ctx := context.Background()

	// One endpoint that does not answer is no reason to refuse.
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer silent.Close()
	remotetest.UseEachMethod(t, open(t, l.Client(t, endpoints(l.Endpoints()[0], "http://"+silent.Addr().String())),
		newPrefix()))

	refused(t, client, "", "the prefix is empty")
	refused(t, client, string(make([]byte, 257)), "257 bytes")
	refused(t, client, "/a\x00/", "NUL")

	put := func(key, value string) {
		_, err := client.Put(ctx, key, value)
		require.NoError(t, err)
	}
	put("/registry/pods/default/web", "a pod")
	refused(t, client, "/registry/", "something else", "/registry/pods/default/web")
	refused(t, client, "/reg", "something else")
	put("/taken", "")
	refused(t, client, "/taken", "something else")
	put("/strange\x00", "another program's marker")
	refused(t, client, "/strange", "something else")
	put("/later\x00", "github.com/grpc-api-key/grpc-api-key/keystore/etcdstore format 2")
	refused(t, client, "/later", "a later version")

	// A server that is too old: the answer of the real server, with another version.
	version := ""
	old := l.Client(t, func(c *clientv3.Config) {
		c.DialOptions = append(c.DialOptions, grpc.WithChainUnaryInterceptor(func(
			ctx context.Context, method string, req, reply any, cc *grpc.ClientConn,
			invoker grpc.UnaryInvoker, opts ...grpc.CallOption,
		) error {
			err := invoker(ctx, method, req, reply, cc, opts...)
			if s, ok := reply.(*pb.StatusResponse); ok {
				s.Version = version
			}
			return err
		}))
	})
	version = "3.5.17"
	refused(t, old, newPrefix(), l.Endpoints()[0], "version 3.5.17", "3.5.18 or later")
	version = "3.5.18"
	remotetest.UseEachMethod(t, open(t, old, newPrefix()))
}

func TestOpenWithFewOperations(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true, MaxTxnOps: 100})
	refused(t, l.Client(t), "/p/", "--max-txn-ops")
}

// Two stores share nothing, even if the prefix of one begins with the prefix of the other.
func TestPrefixes(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	prefixes := []string{"/a/b", "/ab", "/a", "/a/", "/", "/b"} // in the order of Open
	keys := []string{"\x00", "/", "/b", "b", "b\x00k", "k", "\xff"}
	var stores []*etcdstore.Backend
	var feeds []chan backend.Batch
	for _, prefix := range prefixes {
		b := open(t, l.Client(t), prefix)
		stores = append(stores, b)
		batches := make(chan backend.Batch, 100)
		started := make(chan struct{})
		go func() {
			for batch, err := range b.Feed(ctx, nil, nil, 0) {
				if err != nil {
					return
				}
				if len(batch.Changes) == 0 {
					close(started)
				}
				batches <- batch
			}
		}()
		<-started
		feeds = append(feeds, batches)
	}
	for i, b := range stores {
		for _, key := range keys {
			require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte(key),
				Value: []byte(prefixes[i])}))
		}
	}
	for i, b := range stores {
		want := func(e backend.Entry, n int) {
			require.Equal(t, backend.Entry{Key: []byte(keys[n]), Value: []byte(prefixes[i]),
				Revision: 1}, e)
		}
		n := 0
		for e, err := range b.Scan(ctx, nil, nil) {
			require.NoError(t, err)
			want(e, n)
			n++
		}
		require.Equal(t, len(keys), n)
		for e, err := range b.ScanDown(ctx, nil, nil) {
			require.NoError(t, err)
			n--
			want(e, n)
		}
		require.Zero(t, n)
		require.Empty(t, (<-feeds[i]).Changes)
		for n := range keys {
			batch := <-feeds[i]
			require.Len(t, batch.Changes, 1)
			want(batch.Changes[0], n)
		}
		require.Empty(t, feeds[i])
		_, err := b.Get(ctx, nil)
		require.ErrorIs(t, err, backend.ErrNotFound, "the marker is no entry")
	}
	for _, b := range stores {
		require.NoError(t, b.Close())
	}
}

// A page of a scan may be dense or sparse, and keys may have a long prefix in common.
func TestScans(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	b := open(t, l.Client(t), newPrefix())
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var keys []string
	for n := range 700 {
		keys = append(keys, fmt.Sprintf("dense%04d", n))
	}
	for n := range 40 {
		keys = append(keys, fmt.Sprintf("sparse%c%032d", 'A'+n, n))
	}
	zeros := "zeros"
	for range backend.MaxKeySize - len(zeros) {
		keys = append(keys, zeros)
		zeros += "\x00"
	}
	for from := 0; from < len(keys); from += backend.MaxChanges {
		var changes []backend.Change
		for _, key := range keys[from:min(from+backend.MaxChanges, len(keys))] {
			changes = append(changes, backend.Change{Key: []byte(key)})
		}
		require.NoError(t, b.Apply(ctx, changes...))
	}
	for _, bounds := range [][2]int{{0, len(keys)}, {100, 600}, {650, 900}, {699, 701}, {5, 5}} {
		n := bounds[1]
		var to []byte
		if n < len(keys) {
			to = []byte(keys[n])
		}
		up := bounds[0]
		for e, err := range b.Scan(ctx, []byte(keys[up]), to) {
			require.NoError(t, err)
			require.Equal(t, keys[up], string(e.Key))
			up++
		}
		require.Equal(t, n, up)
		for e, err := range b.ScanDown(ctx, []byte(keys[bounds[0]]), to) {
			require.NoError(t, err)
			n--
			require.Equal(t, keys[n], string(e.Key))
		}
		require.Equal(t, bounds[0], n)
	}
}

// The servers are lost between Open and New. New gives up after Options.Timeout, and says why.
func TestNewWithoutServers(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	b := open(t, l.Client(t), newPrefix())
	l.Members[0].Kill()
	s, err := keystore.New(b, &keystore.Options{Freshness: 400 * time.Millisecond,
		Timeout: time.Second})
	require.Nil(t, s)
	require.ErrorIs(t, err, keystore.ErrUnavailable)
	require.ErrorContains(t, err, "a majority of the members")
}
