package interceptor_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The interceptor makes one allocation for a call: the context. The code of protoc-gen-go-grpc
// makes two more for any interceptor, a UnaryServerInfo and a handler: see BenchmarkUnary.
func TestUnaryAllocations(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	unary := newAuth(t, store).Unary()
	ctx := metadata.NewIncomingContext(t.Context(),
		metadata.Pairs("authorization", "Bearer "+token, "user-agent", "test"))
	info := &grpc.UnaryServerInfo{FullMethod: emptyCall}
	handler := func(context.Context, any) (any, error) { return nil, nil }
	var err error
	allocs := testing.AllocsPerRun(1000, func() { _, err = unary(ctx, nil, info, handler) })
	require.NoError(t, err)
	require.LessOrEqual(t, allocs, 1.0)
}

// BenchmarkUnaryInterceptor measures the interceptor alone, without a connection.
func BenchmarkUnaryInterceptor(b *testing.B) {
	store := openStore(b)
	_, token := issue(b, store, keystore.Spec{})
	unary := newAuth(b, store).Unary()
	ctx := metadata.NewIncomingContext(b.Context(),
		metadata.Pairs("authorization", "Bearer "+token, "user-agent", "test"))
	info := &grpc.UnaryServerInfo{FullMethod: emptyCall}
	handler := func(context.Context, any) (any, error) { return nil, nil }
	b.ReportAllocs()
	for b.Loop() {
		if _, err := unary(ctx, nil, info, handler); err != nil {
			b.Fatal(err)
		}
	}
}

// A unary call over a real socket: with the Authenticator, with an interceptor that does nothing,
// and without an interceptor. The client sends the key in all cases.
func BenchmarkUnary(b *testing.B) {
	store := openStore(b)
	_, token := issue(b, store, keystore.Spec{})
	nothing := grpc.ChainUnaryInterceptor(func(
		ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
	) (any, error) {
		return next(ctx, req)
	})
	for _, bm := range []struct {
		name string
		opts []grpc.ServerOption
	}{
		{"with", newAuth(b, store).ServerOptions()},
		{"nothing", []grpc.ServerOption{nothing}},
		{"without", nil},
	} {
		b.Run(bm.name, func(b *testing.B) {
			client := testpb.NewTestServiceClient(dial(b, serve(b, &service{}, bm.opts...)))
			ctx := withKey(b.Context(), token)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := client.EmptyCall(ctx, &testpb.Empty{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkUnaryTurns alternates between calls with and without the interceptor, with one client at
// a time. The metric x-none is the ratio of the medians.
func BenchmarkUnaryTurns(b *testing.B) {
	store := openStore(b)
	_, token := issue(b, store, keystore.Spec{})
	with := testpb.NewTestServiceClient(
		dial(b, serve(b, &service{}, newAuth(b, store).ServerOptions()...)),
	)
	without := testpb.NewTestServiceClient(dial(b, serve(b, &service{})))
	ctx := withKey(b.Context(), token)
	round := func(client testpb.TestServiceClient) time.Duration {
		begin := time.Now()
		for range 50 {
			if _, err := client.EmptyCall(ctx, &testpb.Empty{}); err != nil {
				b.Fatal(err)
			}
		}
		return time.Since(begin) / 50
	}
	var auth, none []time.Duration
	for b.Loop() {
		auth = append(auth, round(with))
		none = append(none, round(without))
	}
	slices.Sort(auth)
	slices.Sort(none)
	b.ReportMetric(float64(auth[len(auth)/2].Nanoseconds()), "ns/with")
	b.ReportMetric(float64(none[len(none)/2].Nanoseconds()), "ns/without")
	b.ReportMetric(float64(auth[len(auth)/2])/float64(none[len(none)/2]), "x-none")
}

// One message to the server and one back: without an interceptor, in the mode interruptible, and in
// the mode foreign. The comment on stream explains the modes.
func BenchmarkStreamMessage(b *testing.B) {
	store := openStore(b)
	_, token := issue(b, store, keystore.Spec{})
	echo := &service{duplex: func(s duplexStream) error {
		reply := payload(1)
		for {
			if _, err := s.Recv(); err != nil {
				return nil
			}
			if err := s.Send(reply); err != nil {
				return err
			}
		}
	}}
	auth := newAuth(b, store).ServerOptions()
	for _, bm := range []struct {
		name string
		opts []grpc.ServerOption
	}{{"none", nil}, {"ended from outside", auth},
		{"goroutine a call", append([]grpc.ServerOption{hidden()}, auth...)}} {
		b.Run(bm.name, func(b *testing.B) {
			stream, err := testpb.NewTestServiceClient(
				dial(b, serve(b, echo, bm.opts...)),
			).FullDuplexCall(withKey(b.Context(), token))
			require.NoError(b, err)
			request := &testpb.StreamingOutputCallRequest{}
			b.ReportAllocs()
			for b.Loop() {
				_ = stream.Send(request)
				if _, err := stream.Recv(); err != nil {
					b.Fatal(err)
				}
			}
			require.NoError(b, stream.CloseSend())
		})
	}
}

// The time from the call of Revoke until the client has the status, for a handler that is blocked
// in Recv.
func BenchmarkTimeToClose(b *testing.B) {
	store := openStore(b)
	for _, bm := range []struct {
		name string
		opts []grpc.ServerOption
	}{{"ended from outside", nil}, {"goroutine a call", []grpc.ServerOption{hidden()}}} {
		b.Run(bm.name, func(b *testing.B) {
			svc := &service{duplex: func(s duplexStream) error {
				_ = s.Send(payload(1))
				_, err := s.Recv()
				return err
			}}
			client := testpb.NewTestServiceClient(
				dial(b, serve(b, svc, append(bm.opts, newAuth(b, store).ServerOptions()...)...)),
			)
			var returned, known time.Duration
			for b.Loop() {
				key, token := issue(b, store, keystore.Spec{})
				stream, err := client.FullDuplexCall(withKey(b.Context(), token))
				require.NoError(b, err)
				_, err = stream.Recv()
				require.NoError(b, err)
				begin := time.Now()
				require.NoError(b, store.Revoke(b.Context(), key.ID, ""))
				returned += time.Since(begin)
				_, err = stream.Recv()
				known += time.Since(begin)
				require.Error(b, err)
			}
			b.ReportMetric(float64(returned.Microseconds())/float64(b.N), "µs-to-return")
			b.ReportMetric(float64(known.Microseconds())/float64(b.N), "µs-to-client")
		})
	}
}
