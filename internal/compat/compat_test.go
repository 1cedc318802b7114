package compat

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type stream = grpc.BidiStreamingServer[
	testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse,
]

// A service checks that the context has the key and that the metadata has no credential. The caller
// selects the behaviour of a handler with the metadata "mode".
type service struct {
	testpb.UnimplementedTestServiceServer
	returned chan error // the results of streams that the server ended
}

func look(ctx context.Context) error {
	if _, ok := interceptor.FromContext(ctx); !ok {
		return status.Error(codes.FailedPrecondition, "no key in the context")
	}
	if len(metadata.ValueFromIncomingContext(ctx, "authorization")) > 0 {
		return status.Error(codes.FailedPrecondition, "the credential is in the metadata")
	}
	return nil
}

func mode(ctx context.Context) string {
	return strings.Join(metadata.ValueFromIncomingContext(ctx, "mode"), "")
}

func (s *service) EmptyCall(ctx context.Context, _ *testpb.Empty) (*testpb.Empty, error) {
	if mode(ctx) == "panic" {
		panic("unary")
	}
	return &testpb.Empty{}, look(ctx)
}

func (s *service) FullDuplexCall(stream stream) (err error) {
	ctx := stream.Context()
	if err := look(ctx); err != nil {
		return err
	}
	if mode(ctx) == "panic" {
		panic("stream")
	}
	defer func() { s.returned <- err }()
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	for mode(ctx) == "send" {
		payload := &testpb.Payload{Body: make([]byte, 4096)}
		err := stream.Send(&testpb.StreamingOutputCallResponse{Payload: payload})
		if err != nil {
			return err
		}
	}
	_, err = stream.Recv()
	if mode(ctx) == "panic after the end" {
		panic(err)
	}
	return err
}

// A log collects the messages of the logging interceptors.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Log(_ context.Context, _ logging.Level, msg string, fields ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	fmt.Fprintln(&l.text, append([]any{msg}, fields...)...)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func TestMiddlewareStack(t *testing.T) {
	type parts struct {
		auth *interceptor.Authenticator
		log  *log
	}
	unaries, streams := grpc.ChainUnaryInterceptor, grpc.ChainStreamInterceptor
	for _, tt := range []struct {
		name     string
		recovers bool // whether the server recovers from a panic of a handler
		opts     func(p parts) []grpc.ServerOption
	}{
		{"alone", false, func(p parts) []grpc.ServerOption { return p.auth.ServerOptions() }},
		{"as the only interceptors", false, func(p parts) []grpc.ServerOption {
			return []grpc.ServerOption{
				grpc.UnaryInterceptor(p.auth.Unary()),
				grpc.StreamInterceptor(p.auth.Stream()),
			}
		}},
		{"after grpc.UnaryInterceptor and StreamInterceptor", true,
			func(p parts) []grpc.ServerOption {
				return append(p.auth.ServerOptions(),
					grpc.UnaryInterceptor(recovery.UnaryServerInterceptor()),
					grpc.StreamInterceptor(recovery.StreamServerInterceptor()))
			}},
		{"recovery, auth, logging", true, func(p parts) []grpc.ServerOption {
			return []grpc.ServerOption{
				unaries(recovery.UnaryServerInterceptor(), p.auth.Unary(),
					logging.UnaryServerInterceptor(p.log)),
				streams(recovery.StreamServerInterceptor(), p.auth.Stream(),
					logging.StreamServerInterceptor(p.log)),
			}
		}},
		{"logging, recovery, auth", true, func(p parts) []grpc.ServerOption {
			return []grpc.ServerOption{
				unaries(logging.UnaryServerInterceptor(p.log),
					recovery.UnaryServerInterceptor(), p.auth.Unary()),
				streams(logging.StreamServerInterceptor(p.log),
					recovery.StreamServerInterceptor(), p.auth.Stream()),
			}
		}},
		{"auth, logging, recovery", true, func(p parts) []grpc.ServerOption {
			return append(p.auth.ServerOptions(),
				unaries(logging.UnaryServerInterceptor(p.log), recovery.UnaryServerInterceptor()),
				streams(logging.StreamServerInterceptor(p.log), recovery.StreamServerInterceptor()))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			store, err := keystore.Open(t.TempDir(), nil)
			require.NoError(t, err)
			defer store.Close()
			auth, err := interceptor.New(store)
			require.NoError(t, err)
			spans := tracetest.NewSpanRecorder()
			tracing := otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(
				sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))))
			p := parts{auth, new(log)}
			svc := &service{returned: make(chan error, 1)}
			client, stop := serve(t, svc, append(tt.opts(p), grpc.StatsHandler(tracing))...)
			var tokens []string
			issue := func() (string, grpc.CallOption) {
				issued, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
				require.NoError(t, err)
				tokens = append(tokens, issued.Secret.Reveal())
				key := keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure())
				return issued.Key.ID, grpc.PerRPCCredentials(key)
			}
			in := func(mode string) context.Context {
				return metadata.AppendToOutgoingContext(t.Context(), "mode", mode)
			}

			_, err = client.EmptyCall(t.Context(), &testpb.Empty{})
			requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
			s, err := client.FullDuplexCall(t.Context())
			require.NoError(t, err)
			_, err = s.Recv()
			requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")

			_, key := issue()
			_, err = client.EmptyCall(t.Context(), &testpb.Empty{}, key)
			require.NoError(t, err)

			modes := []string{"recv", "send"}
			if tt.recovers {
				_, err = client.EmptyCall(in("panic"), &testpb.Empty{}, key)
				require.Equal(t, codes.Unknown, status.Code(err),
					"the code of the recovery interceptor")
				s, err = client.FullDuplexCall(in("panic"), key)
				require.NoError(t, err)
				_, err = s.Recv()
				require.Equal(t, codes.Unknown, status.Code(err),
					"the code of the recovery interceptor")
				modes = append(modes, "panic after the end")
			}
			for _, mode := range modes {
				id, key := issue()
				s, err := client.FullDuplexCall(in(mode), key)
				require.NoError(t, err)
				_, err = s.Header()
				require.NoError(t, err)
				require.NoError(t, store.Revoke(t.Context(), id, ""))
				requireRefused(t, <-svc.returned, codes.Unauthenticated, "API_KEY_REVOKED")
				for err = nil; err == nil; {
					_, err = s.Recv()
				}
				// The client has received this status before the handler returns or panics.
				requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
			}

			stop()
			var traced strings.Builder
			refused := 0
			for _, span := range spans.Ended() {
				text := fmt.Sprintln(span.Name(), span.Attributes(), span.Events(), span.Status())
				traced.WriteString(text)
				if strings.Contains(text, "UNAUTHENTICATED") {
					refused++
				}
			}
			require.GreaterOrEqual(t, refused, 4,
				"two calls without a key, and two streams that the server ended")
			for _, token := range tokens {
				secret := token[strings.LastIndexByte(token, '_')+1:]
				require.False(t, strings.Contains(p.log.String(), secret),
					"the credential was logged")
				require.False(t, strings.Contains(traced.String(), secret),
					"the credential was traced")
			}
		})
	}
}

// serve runs a server on a real socket. serve returns a client of the server, and a function that
// stops the client and the server after all calls have ended.
func serve(
	t *testing.T, svc *service, opts ...grpc.ServerOption,
) (client testpb.TestServiceClient, stop func()) {
	t.Helper()
	server := grpc.NewServer(append(opts, grpc.WaitForHandlers(true))...)
	testpb.RegisterTestServiceServer(server, svc)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	conn, err := grpc.NewClient(lis.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	return testpb.NewTestServiceClient(conn), func() {
		require.NoError(t, conn.Close())
		server.GracefulStop()
		require.NoError(t, <-served)
	}
}

func requireRefused(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	require.Equal(t, code.String(), status.Code(err).String(), "%v", err)
	got := ""
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			got = info.Reason
		}
	}
	require.Equal(t, reason, got)
}
