package interceptor_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/stats"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A replica is one of two servers that clients may call.
type replica struct {
	store   *keystore.Store
	server  *grpc.Server
	addr    string
	refused chan struct{} // closed when the server refuses a call
	once    sync.Once
	conns   atomic.Int64 // open connections
}

// A replica is a stats.Handler that counts the connections.

func (r *replica) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (r *replica) HandleRPC(context.Context, stats.RPCStats)                         {}
func (r *replica) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

func (r *replica) HandleConn(_ context.Context, s stats.ConnStats) {
	switch s.(type) {
	case *stats.ConnBegin:
		r.conns.Add(1)
	case *stats.ConnEnd:
		r.conns.Add(-1)
	}
}

// A lateStore is the store of a replica. Close waits until only the connection of the endless
// stream is left. On a slow machine, a client may learn of the stop after the time that Shutdown
// waits.
type lateStore struct{ *replica }

func (s lateStore) Close() error {
	for s.conns.Load() > 1 {
		time.Sleep(time.Millisecond)
	}
	return s.store.Close()
}

func newReplica(t *testing.T, backup []byte, svc *service) *replica {
	r := &replica{refused: make(chan struct{})}
	store := openStore(t)
	t.Cleanup(func() { _ = store.Close() })
	if backup != nil {
		require.NoError(t, store.Restore(t.Context(), bytes.NewReader(backup)))
	}
	r.store = store
	count := grpc.ChainUnaryInterceptor(func(
		ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
	) (any, error) {
		reply, err := next(ctx, req)
		if err != nil {
			r.once.Do(func() { close(r.refused) })
		}
		return reply, err
	})
	r.server = grpc.NewServer(append(
		[]grpc.ServerOption{count, grpc.StatsHandler(r)}, newAuth(t, store).ServerOptions()...,
	)...)
	testpb.RegisterTestServiceServer(r.server, svc)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r.addr = lis.Addr().String()
	done := make(chan error, 1)
	go func() { done <- r.server.Serve(lis) }()
	t.Cleanup(func() {
		r.server.Stop()
		require.NoError(t, <-done)
	})
	return r
}

// Two servers share the load of 16 clients, and one of the two stops, as in a rolling update. If
// the store is closed first, calls with a valid key fail. With Shutdown, no call fails, and a
// stream that would never end is ended.
func TestShutdownFailsNoGoodCall(t *testing.T) {
	for name, tt := range map[string]struct {
		stop  func(t *testing.T, r *replica)
		fails bool
	}{
		"the store first": {func(t *testing.T, r *replica) {
			require.NoError(t, r.store.Close())
			<-r.refused // a call always comes before the clients know that the server stops
			r.server.GracefulStop()
		}, true},
		"Shutdown": {func(t *testing.T, r *replica) {
			require.NoError(t, interceptor.Shutdown(r.server, lateStore{r}, time.Second))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			svc := &service{duplex: handlers["blocked in Recv"]}
			first := newReplica(t, nil, svc)
			_, token := issue(t, first.store, keystore.Spec{})
			var backup bytes.Buffer
			require.NoError(t, first.store.Backup(t.Context(), &backup))
			second := newReplica(t, backup.Bytes(), svc)

			endless, err := testpb.NewTestServiceClient(dial(t, first.addr)).FullDuplexCall(
				withKey(t.Context(), token),
			)
			require.NoError(t, err)
			require.Eventually(t, func() bool {
				return first.store.Stats().Live == 1
			}, time.Minute, time.Millisecond)

			load := startLoad(t, token, first.addr, second.addr)
			tt.stop(t, first)
			_, err = endless.Recv()
			requireRefused(t, err, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE")
			calls, failed := load.stop()
			t.Logf("%d of %d calls with a good key failed", failed, calls)
			require.Equal(t, tt.fails, failed > 0, "%d of %d calls failed; the last: %v", failed,
				calls, load.last.Load())
			_, err = first.store.Verify(t.Context(), token)
			require.ErrorIs(t, err, keystore.ErrClosed)
		})
	}
}

// A load is 16 clients that call continuously and distribute their calls over the addresses.
type load struct {
	end           chan struct{}
	clients       sync.WaitGroup
	calls, failed atomic.Int64
	last          atomic.Value
}

func startLoad(t *testing.T, token string, addrs ...string) *load {
	l := &load{end: make(chan struct{})}
	var ready sync.WaitGroup
	for range 16 {
		r := manual.NewBuilderWithScheme("replicas")
		state := resolver.State{}
		for _, addr := range addrs {
			state.Addresses = append(state.Addresses, resolver.Address{Addr: addr})
		}
		r.InitialState(state)
		conn, err := grpc.NewClient("replicas:///", grpc.WithResolvers(r),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
		require.NoError(t, err)
		t.Cleanup(func() { _ = conn.Close() })
		client := testpb.NewTestServiceClient(conn)
		ready.Add(1)
		l.clients.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-l.end:
					return
				default:
				}
				_, err := client.EmptyCall(withKey(context.Background(), token), &testpb.Empty{})
				l.calls.Add(1)
				if err != nil {
					l.failed.Add(1)
					l.last.Store(err.Error())
				}
				if n == 20 { // both servers were called
					ready.Done()
				}
			}
		})
	}
	ready.Wait()
	return l
}

func (l *load) stop() (calls, failed int64) {
	close(l.end)
	l.clients.Wait()
	return l.calls.Load(), l.failed.Load()
}

// A deaf is a server whose handlers return only after the call of Stop.
type deaf struct {
	closer
	stopped chan struct{}
}

func (d *deaf) GracefulStop() { <-d.stopped }
func (d *deaf) Stop()         { close(d.stopped) }

// A closer is a store that records when it was closed.
type closer struct {
	begin  time.Time
	closed []time.Duration
}

func (c *closer) Close() error {
	c.closed = append(c.closed, time.Since(c.begin))
	return errors.New("closed")
}

func TestShutdownStopsHandlersThatIgnoreTheEnd(t *testing.T) {
	for wait, after := range map[time.Duration]time.Duration{
		time.Minute: time.Minute, 0: 0, -time.Hour: 0,
	} {
		synctest.Test(t, func(t *testing.T) {
			d := &deaf{closer{begin: time.Now()}, make(chan struct{})}
			require.EqualError(t, interceptor.Shutdown(d, &d.closer, wait), "closed")
			require.Equal(t, []time.Duration{after}, d.closed,
				"the store is closed after wait, once")
			require.Equal(t, after+5*time.Second, time.Since(d.begin))
		})
	}
}

// An idle is a server that stops immediately.
type idle struct{ stopped bool }

func (i *idle) GracefulStop() {}
func (i *idle) Stop()         { i.stopped = true }

func TestShutdownDoesNotWaitWithoutNeed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server, store := &idle{}, &closer{begin: time.Now()}
		require.EqualError(t, interceptor.Shutdown(server, store, time.Minute), "closed")
		require.Equal(t, []time.Duration{0}, store.closed)
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Len(t, store.closed, 1)
		require.False(t, server.stopped)
	})
}
