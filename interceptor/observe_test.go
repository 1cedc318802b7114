package interceptor_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An observed records the calls that Observe reports.
type observed struct {
	mu  sync.Mutex
	all []interceptor.Call
}

func (o *observed) observe(ctx context.Context, c interceptor.Call) {
	md, _ := metadata.FromIncomingContext(ctx)
	if len(md.Get("authorization")) > 0 {
		panic("the context has the credential")
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.all = append(o.all, c)
}

// take returns the calls since the last take, in short: refused or ended, method, reason, key.
func (o *observed) take() (short []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.all {
		what := "refused"
		if c.Ended {
			what = "ended"
		}
		short = append(short,
			fmt.Sprint(what, " ", c.Method, " ", c.Refusal.Reason, " ", c.Refusal.KeyID))
	}
	o.all = nil
	return short
}

// await waits until n calls were reported since the last take.
func (o *observed) await(t *testing.T, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return len(o.all) >= n
	}, time.Minute, time.Millisecond)
}

func TestObserve(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	o, again := new(observed), new(observed)
	auth := newAuth(t, store, interceptor.Observe(o.observe), interceptor.Observe(again.observe),
		interceptor.Require("/grpc.testing.TestService/UnaryCall", "a"))
	addr := serve(t, &service{duplex: echo}, append(auth.ServerOptions(),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil }))...)
	conn := dial(t, addr)
	ctx := t.Context()

	both(ctx, conn)
	require.ElementsMatch(t,
		[]string{"refused " + emptyCall + " missing ", "refused " + duplex + " missing "},
		o.take())
	require.NoError(t, call(withKey(ctx, token), conn))
	require.NoError(t, exchange(withKey(ctx, token), conn, 1))
	require.Empty(t, o.take(), "accepted calls are not reported")

	client := testpb.NewTestServiceClient(conn)
	_, err := client.UnaryCall(withKey(ctx, token), &testpb.SimpleRequest{})
	requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
	require.Equal(t, []string{"refused /grpc.testing.TestService/UnaryCall scope " + key.ID},
		o.take())
	err = conn.Invoke(ctx, "/invented/"+token[:20], &testpb.Empty{}, &testpb.Empty{})
	requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
	o.mu.Lock()
	require.Equal(t, "/invented/"+token[:20], o.all[0].Refusal.Method)
	o.mu.Unlock()
	require.Equal(t, []string{"refused _OTHER missing "}, o.take(),
		"callers cannot choose the word for a label")

	stream, err := client.FullDuplexCall(withKey(ctx, token))
	require.NoError(t, err)
	require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
	_, err = stream.Recv()
	require.NoError(t, err)
	require.NoError(t, store.Revoke(ctx, key.ID, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	o.await(t, 1)
	require.Equal(t, []string{"ended " + duplex + " revoked " + key.ID}, o.take())
	again.await(t, 5) // the end of a stream is reported after the client got the status
	require.Len(t, again.take(), 5, "each function is called")
}

// Tap does not know the methods of the server, but knows the methods that rules name.
func TestObserveTap(t *testing.T) {
	o := new(observed)
	auth := newAuth(t, openStore(t), interceptor.Observe(o.observe), interceptor.AnyKey(emptyCall))
	conn := dial(t, serve(t, &service{duplex: end}, withTap(auth)...))
	both(t.Context(), conn)
	require.ElementsMatch(t, []string{"refused " + emptyCall + " missing ", "refused _OTHER missing "},
		o.take())
}

// A function of Observe that panics changes nothing for the callers, also when a key ends a stream
// on a goroutine of the store. The other functions are called.
func TestObservePanics(t *testing.T) {
	book, o := logDefault(t), new(observed)
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store, interceptor.LimitMessages(),
		interceptor.Observe(func(context.Context, interceptor.Call) { panic("of the test") }),
		interceptor.Observe(o.observe))
	conn := dial(t, serve(t, &service{duplex: echo}, auth.ServerOptions()...))
	for _, err := range both(t.Context(), conn) {
		requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
	}
	_, limited := issue(t, store,
		keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 0.001, Burst: 1}})
	requireRefused(t, exchange(withKey(t.Context(), limited), conn, 1), codes.ResourceExhausted,
		"RATE_LIMIT_EXCEEDED")
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
	_, err = stream.Recv()
	require.NoError(t, err)
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	o.await(t, 4)
	line := book.lines(t)[0]
	require.Equal(t, "function of Observe panicked", line["msg"])
	require.Equal(t, "string", line["panic"], "the value may hold a credential")
	require.NotContains(t, book.String(), "of the test")
	require.Contains(t, line["stack"], "observe_test.go")
	require.NotContains(t, book.String(), token)
}

func TestObserveNil(t *testing.T) {
	_, err := interceptor.New(openStore(t), interceptor.Observe(nil))
	require.EqualError(t, err, "interceptor: Observe: the function is nil")
}
