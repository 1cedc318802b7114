package interceptor_test

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const check = "/grpc.health.v1.Health/Check"

func remaining(t *testing.T, store *keystore.Store, key *keystore.Key) int64 {
	t.Helper()
	c, err := store.Credits(t.Context(), key.ID)
	require.NoError(t, err)
	return c.Remaining
}

// A call costs the credits of its method, after all other checks.
func TestCost(t *testing.T) {
	for name, extra := range map[string][]interceptor.Option{
		"unary": nil, "with CancelUnary": {interceptor.CancelUnary()},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			store := openStore(t)
			auth := newAuth(t, store, append(extra, interceptor.Cost(0, "/grpc.health.v1.Health/*"),
				interceptor.Cost(5, "/grpc.testing.TestService/*"), interceptor.Cost(7, emptyCall),
				interceptor.Require(duplex, "streams"))...)
			require.Error(t, auth.Check(grpc.NewServer()), "Cost names methods that are not there")
			conn := dial(t, serve(t, &service{duplex: echo}, auth.ServerOptions()...))
			client := testpb.NewTestServiceClient(conn)
			key, token := issue(t, store, keystore.Spec{Credits: &keystore.Credits{Remaining: 20}})
			ctx = withKey(ctx, token)

			_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			require.NoError(t, err)
			require.EqualValues(t, 20, remaining(t, store, key), "free")
			_, err = client.EmptyCall(ctx, &testpb.Empty{})
			require.NoError(t, err)
			require.EqualValues(t, 13, remaining(t, store, key), "the cost of the method")
			_, err = client.UnaryCall(ctx, &testpb.SimpleRequest{})
			require.Equal(t, codes.Unimplemented, status.Code(err))
			require.EqualValues(t, 8, remaining(t, store, key), "the cost of the service")
			s, err := client.FullDuplexCall(ctx)
			require.NoError(t, err)
			_, err = s.Recv()
			requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
			require.EqualValues(t, 8, remaining(t, store, key), "a refused call costs nothing")
			_, err = client.EmptyCall(ctx, &testpb.Empty{})
			require.NoError(t, err)
			_, err = client.EmptyCall(ctx, &testpb.Empty{})
			requireRefused(t, err, codes.ResourceExhausted, "CREDITS_EXHAUSTED")
			require.Len(t, status.Convert(err).Details(), 1, "no RetryInfo without a refill")
			_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
			require.NoError(t, err, "free, without a credit")

			require.NoError(t, store.SetCredits(t.Context(), key.ID, &keystore.Credits{
				Remaining: 7, Refill: keystore.Refill{Amount: 6, Every: time.Hour},
			}))
			_, err = client.EmptyCall(ctx, &testpb.Empty{})
			require.NoError(t, err)
			_, err = client.EmptyCall(ctx, &testpb.Empty{})
			requireRefused(t, err, codes.ResourceExhausted, "CREDITS_EXHAUSTED")
			require.Len(t, status.Convert(err).Details(), 1, "the refill does not suffice")
			_, err = client.UnaryCall(ctx, &testpb.SimpleRequest{})
			requireRefused(t, err, codes.ResourceExhausted, "CREDITS_EXHAUSTED")
			require.Greater(t, retryAfter(t, err), 50*time.Minute)
		})
	}
}

// Without LimitMessages, a stream costs its opening. With LimitMessages, each message costs as
// much.
func TestCostOfAStream(t *testing.T) {
	store := openStore(t)
	for name, opts := range map[string][]grpc.ServerOption{
		"grpc-go's transport": nil, "another": {hidden()},
	} {
		for limited, options := range map[string][]interceptor.Option{
			"messages": {interceptor.LimitMessages()}, "opening": nil,
		} {
			t.Run(name+", "+limited, func(t *testing.T) {
				key, token := issue(t, store,
					keystore.Spec{Credits: &keystore.Credits{Remaining: 13}})
				refused := make(chan interceptor.Call, 8)
				auth := newAuth(t, store, append(options, interceptor.Cost(3, duplex),
					interceptor.Observe(func(_ context.Context, c interceptor.Call) {
						refused <- c
					}))...)
				conn := dial(t, serve(t, &service{duplex: echo},
					append(opts, auth.ServerOptions()...)...))
				ctx, cancel := context.WithTimeout(withKey(t.Context(), token), 30*time.Second)
				defer cancel()
				s, err := testpb.NewTestServiceClient(conn).FullDuplexCall(ctx)
				require.NoError(t, err)
				for range 3 {
					require.NoError(t, s.Send(&testpb.StreamingOutputCallRequest{}))
					_, err := s.Recv()
					require.NoError(t, err)
				}
				if limited == "opening" {
					require.EqualValues(t, 10, remaining(t, store, key))
					require.NoError(t, s.CloseSend())
					return
				}
				_ = s.Send(&testpb.StreamingOutputCallRequest{})
				_, err = s.Recv()
				requireRefused(t, err, codes.ResourceExhausted, "CREDITS_EXHAUSTED")
				require.EqualValues(t, 1, remaining(t, store, key))
				c := <-refused
				require.True(t, c.Ended)
				require.Equal(t, "credits_exhausted", c.Refusal.Reason)
				require.Equal(t, key.ID, c.Refusal.KeyID)
			})
		}
	}
}

// What a handler verifies under the context of its call is another call, and costs a credit.
func TestCostOfWhatAHandlerVerifies(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{Credits: &keystore.Credits{Remaining: 100}})
	verify := func(ctx context.Context) error {
		_, err := store.Verify(ctx, token)
		return err
	}
	auth := newAuth(t, store, interceptor.Cost(10, duplex), interceptor.Public(emptyCall))
	conn := dial(t, serve(t, &service{
		empty: verify, duplex: func(s duplexStream) error { return verify(s.Context()) },
	}, auth.ServerOptions()...))
	require.NoError(t, call(t.Context(), conn))
	require.EqualValues(t, 99, remaining(t, store, key))
	s, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	_, err = s.Recv()
	require.ErrorIs(t, err, io.EOF)
	require.EqualValues(t, 88, remaining(t, store, key))
}

func TestWrongCosts(t *testing.T) {
	store := openStore(t)
	for want, opts := range map[string][]interceptor.Option{
		"from 0":              {interceptor.Cost(-1, emptyCall)},
		"to 9007199254740992": {interceptor.Cost(1<<53+1, emptyCall)},
		"full method name":    {interceptor.Cost(1, "EmptyCall")},
		"already has a cost":  {interceptor.Cost(1, emptyCall), interceptor.Cost(2, emptyCall)},
	} {
		_, err := interceptor.New(store, opts...)
		require.ErrorContains(t, err, want)
	}
	auth := newAuth(t, store, interceptor.Cost(1, check, "/grpc.Nobody/*", "/grpc.Nobody/Call"))
	server := grpc.NewServer(auth.ServerOptions()...)
	testpb.RegisterTestServiceServer(server, &service{})
	require.ErrorContains(t, auth.Check(server),
		"/grpc.Nobody/*, /grpc.Nobody/Call, /grpc.health.v1.Health/Check")
	require.ErrorContains(t, auth.Check(server, "/grpc.health.v1.Health/*"),
		"not have: /grpc.Nobody/*, /grpc.Nobody/Call:")
}
