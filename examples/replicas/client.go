package main

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

// A replica is one of the servers, and a connection to this server alone.
type replica struct {
	*process
	name, addr string
	conn       *grpc.ClientConn
}

// call makes one call with a key, and returns the name of the server that has answered.
func call(ctx context.Context, conn *grpc.ClientConn, key string) (server string, err error) {
	reply, err := testpb.NewTestServiceClient(conn).UnaryCall(ctx, new(testpb.SimpleRequest),
		grpc.PerRPCCredentials(keycreds.New(key)))
	return reply.GetServerId(), err
}

// balance returns a connection that sends each call to the next server.
func balance(
	servers []*replica, creds credentials.TransportCredentials,
) (*grpc.ClientConn, error) {
	var state resolver.State
	for _, s := range servers {
		state.Endpoints = append(state.Endpoints,
			resolver.Endpoint{Addresses: []resolver.Address{{Addr: s.addr}}})
	}
	addresses := manual.NewBuilderWithScheme("replicas")
	addresses.InitialState(state)
	return grpc.NewClient("replicas:///localhost", grpc.WithResolvers(addresses),
		grpc.WithTransportCredentials(creds),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"round_robin": {}}]}`))
}

// A user uses a key on one server: with a stream, and with one call after the other.
type user struct {
	server *replica
	cancel context.CancelFunc
	done   sync.WaitGroup
	over   chan struct{} // closed when the stream has ended
	calls  []oneCall     // complete after stop
	ended  time.Time     // when the stream ended
	err    error         // why the stream ended
}

type oneCall struct {
	began, answered time.Time
	err             error
}

// use starts a user, whose stream is open.
func use(ctx context.Context, server *replica, key string) (*user, error) {
	ctx, cancel := context.WithCancel(ctx)
	u := &user{server: server, cancel: cancel, over: make(chan struct{})}
	stream, err := testpb.NewTestServiceClient(server.conn).FullDuplexCall(ctx,
		grpc.PerRPCCredentials(keycreds.New(key)))
	if err == nil {
		err = stream.Send(new(testpb.StreamingOutputCallRequest))
	}
	if err == nil {
		_, err = stream.Recv()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	u.done.Go(func() {
		_, u.err = stream.Recv() // waits until the server ends the stream
		u.ended = time.Now()
		close(u.over)
	})
	u.done.Go(func() {
		for ctx.Err() == nil {
			c := oneCall{began: time.Now()}
			_, c.err = call(ctx, server.conn, key)
			c.answered = time.Now()
			if ctx.Err() == nil {
				u.calls = append(u.calls, c)
			}
			time.Sleep(time.Millisecond)
		}
	})
	return u, nil
}

// stop ends the user. If the server has not ended the stream within ten seconds, stop ends the
// stream too.
func (u *user) stop() {
	select {
	case <-u.over:
	case <-time.After(10 * time.Second):
	}
	u.cancel()
	u.done.Wait()
}

// count returns the numbers of calls that began after a moment and were admitted, and refused.
func (u *user) count(after time.Time) (admitted, refused int) {
	for _, c := range u.calls {
		switch {
		case !c.began.After(after):
		case c.err == nil:
			admitted++
		default:
			refused++
		}
	}
	return admitted, refused
}

// refused returns when the first refusal was answered, or the zero time.
func (u *user) refused() time.Time {
	for _, c := range u.calls {
		if c.err != nil {
			return c.answered
		}
	}
	return time.Time{}
}
