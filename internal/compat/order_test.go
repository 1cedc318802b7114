package compat

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A pair is an interceptor for unary calls and the equivalent interceptor for streams.
type pair struct {
	unary  grpc.UnaryServerInterceptor
	stream grpc.StreamServerInterceptor
}

// StreamingOutputCall is a stream that ends normally.
func (s *service) StreamingOutputCall(
	_ *testpb.StreamingOutputCallRequest,
	out grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse],
) error {
	if err := look(out.Context()); err != nil {
		return err
	}
	return out.Send(&testpb.StreamingOutputCallResponse{})
}

type limiter struct{}

func (limiter) Limit(context.Context) error { return nil }

// Each test puts one interceptor of go-grpc-middleware before or after the Authenticator. The
// outermost interceptor is recovery. The innermost interceptor checks the key in the context and
// the credential in the metadata.
func TestEachMiddlewareInBothOrders(t *testing.T) {
	logged, limit := new(log), limiter{}
	var looked atomic.Int64
	note := func(ctx context.Context) error { looked.Add(1); return look(ctx) }
	inner := pair{
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (
			any, error,
		) {
			if err := note(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		},
		func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo,
			next grpc.StreamHandler) error {
			if err := note(ss.Context()); err != nil {
				return err
			}
			return next(srv, ss)
		},
	}
	internal := recovery.WithRecoveryHandler(func(any) error {
		return status.Error(codes.Internal, "recovered")
	})
	recovers := pair{
		recovery.UnaryServerInterceptor(internal),
		recovery.StreamServerInterceptor(internal),
	}
	all := selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true })
	verbose := logging.WithLogOnEvents(
		logging.StartCall, logging.FinishCall, logging.PayloadReceived, logging.PayloadSent)
	logs := pair{
		logging.UnaryServerInterceptor(logged, verbose),
		logging.StreamServerInterceptor(logged, verbose),
	}
	for name, other := range map[string]pair{
		"logging": logs,
		"ratelimit": {
			ratelimit.UnaryServerInterceptor(limit),
			ratelimit.StreamServerInterceptor(limit),
		},
		"selector": {
			selector.UnaryServerInterceptor(logs.unary, all),
			selector.StreamServerInterceptor(logs.stream, all),
		},
		"recovery": recovers,
	} {
		for _, before := range []bool{true, false} {
			title := fmt.Sprintf("%s, before the Authenticator: %t", name, before)
			t.Run(title, func(t *testing.T) {
				looked.Store(0)
				logged.text.Reset()
				store, err := keystore.Open(t.TempDir(), nil)
				require.NoError(t, err)
				defer store.Close()
				auth, err := interceptor.New(store)
				require.NoError(t, err)
				order := []pair{recovers, {auth.Unary(), auth.Stream()}, other, inner}
				if before {
					order[1], order[2] = order[2], order[1]
				}
				spans := tracetest.NewInMemoryExporter()
				provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
				opts := []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
					otelgrpc.WithTracerProvider(provider),
					otelgrpc.WithMessageEvents(otelgrpc.ReceivedEvents, otelgrpc.SentEvents),
				))}
				for _, p := range order {
					opts = append(opts,
						grpc.ChainUnaryInterceptor(p.unary),
						grpc.ChainStreamInterceptor(p.stream))
				}
				svc := &service{returned: make(chan error, 3)}
				client, stop := serve(t, svc, opts...)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				issued, err := store.Create(ctx, keystore.Spec{Name: "test"})
				require.NoError(t, err)
				key := grpc.PerRPCCredentials(
					keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure()))
				in := func(mode string) context.Context {
					return metadata.AppendToOutgoingContext(ctx, "mode", mode)
				}
				drain := func(mode string, opts ...grpc.CallOption) (err error) {
					s, err := client.FullDuplexCall(in(mode), opts...)
					for err == nil {
						_, err = s.Recv()
					}
					return err
				}

				_, err = client.EmptyCall(ctx, &testpb.Empty{})
				requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
				requireRefused(t, drain("recv"), codes.Unauthenticated, "CREDENTIALS_MISSING")
				require.Zero(t, looked.Load(), "the inner interceptors see no call without a key")
				_, err = client.EmptyCall(ctx, &testpb.Empty{}, key)
				require.NoError(t, err)
				out, err := client.StreamingOutputCall(ctx, &testpb.StreamingOutputCallRequest{},
					key)
				require.NoError(t, err)
				_, err = out.Recv()
				require.NoError(t, err)
				_, err = out.Recv()
				require.ErrorIs(t, err, io.EOF)
				require.EqualValues(t, 2, looked.Load())
				_, err = client.EmptyCall(in("panic"), &testpb.Empty{}, key)
				require.Equal(t, codes.Internal, status.Code(err))
				require.Equal(t, codes.Internal, status.Code(drain("panic", key)))

				ends := make(chan error, 3)
				for _, mode := range []string{"recv", "send", "panic after the end"} {
					s, err := client.FullDuplexCall(in(mode), key)
					require.NoError(t, err)
					_, err = s.Header()
					require.NoError(t, err)
					go func() {
						var err error
						for err == nil {
							_, err = s.Recv()
						}
						ends <- err
					}()
				}
				require.NoError(t, store.Revoke(ctx, issued.Key.ID, ""))
				for range 3 {
					requireRefused(t, <-svc.returned, codes.Unauthenticated, "API_KEY_REVOKED")
					requireRefused(t, <-ends, codes.Unauthenticated, "API_KEY_REVOKED")
				}
				stop()

				// A refused call, or a stream that ends with its key, is not an error of the
				// server. A panic after the end of the stream is an error here if recovery is
				// the outer interceptor, although the caller received Unauthenticated.
				want := map[string]int{"OK Unset": 2, "UNAUTHENTICATED Unset": 4,
					"INTERNAL Error": 3}
				if name == "recovery" && !before {
					want = map[string]int{"OK Unset": 2, "UNAUTHENTICATED Unset": 5,
						"INTERNAL Error": 2}
				}
				got := map[string]int{}
				for _, span := range spans.GetSpans() {
					for _, a := range span.Attributes {
						if a.Key == "rpc.response.status_code" {
							got[a.Value.AsString()+" "+span.Status.Code.String()]++
						}
					}
				}
				require.Equal(t, want, got)
				traced, token := fmt.Sprint(spans.GetSpans()), issued.Secret.Reveal()
				require.Contains(t, traced, "UNAUTHENTICATED", "the text contains the attributes")
				require.Equal(t, name == "logging" || name == "selector",
					strings.Contains(logged.String(), "finished call"))
				secret := token[strings.LastIndexByte(token, '_')+1:]
				require.False(t, strings.Contains(traced, secret), "the credential was traced")
				require.False(t, strings.Contains(logged.String(), secret),
					"the credential was logged")
			})
		}
	}
}
