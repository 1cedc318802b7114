package main

import (
	"context"
	"log/slog"
	"runtime/debug"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

// newServer returns a server that is observed by logs, traces and metrics, and a function that ends
// the observation. The order of the parts:
//
//  1. otelgrpc is a stats handler: the span covers the whole call, refused calls too
//  2. the metrics of gRPC count refused calls, and panics as Internal
//  3. recovery ends the panic of a handler, or of an interceptor below
//  4. the Authenticator: everything below runs for callers with a key alone
//  5. otelkeys sets the key on the span
//  6. the log has one line for each call, with the key
func newServer(
	store *keystore.Store, registry *prometheus.Registry, tracers trace.TracerProvider,
	logger *slog.Logger,
) (server *grpc.Server, stop func() error, err error) {
	logger = slog.New(otelkeys.LogHandler(logger.Handler())) // lines have the IDs of trace and span
	telemetry, err := otelkeys.New(store, &otelkeys.Options{Owner: true})
	if err != nil {
		return nil, nil, err
	}
	collector, err := promkeys.NewCollector(store,
		&promkeys.Options{Inventory: inventoryEvery})
	if err != nil {
		return nil, nil, err
	}
	refused := promkeys.NewCalls()
	metrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram())
	registry.MustRegister(collector, refused, metrics)

	auth, err := interceptor.New(store,
		interceptor.Require("/grpc.testing.TestService/UnaryCall", "admin"),
		interceptor.LogRefusals(logger),
		interceptor.Observe(telemetry.Observe),
		interceptor.Observe(func(ctx context.Context, c interceptor.Call) {
			if !c.Ended {
				refused.Refused(ctx, c.Method, c.Refusal.Reason)
			}
		}))
	if err != nil {
		return nil, nil, err
	}
	panics := recovery.WithRecoveryHandler(func(p any) error {
		logger.Error("a handler panicked", "panic", p, "stack", string(debug.Stack()))
		return status.Error(codes.Internal, "internal error")
	})
	calls := logging.LoggerFunc(func(
		ctx context.Context, level logging.Level, msg string, fields ...any,
	) {
		logger.Log(ctx, slog.Level(level), msg, fields...)
	})
	key := logging.WithFieldsFromContext(func(ctx context.Context) logging.Fields {
		if key, ok := interceptor.FromContext(ctx); ok {
			return logging.Fields{"key", key.ID, "owner", key.Owner}
		}
		return nil
	})
	finished := logging.WithLogOnEvents(logging.FinishCall)
	server = grpc.NewServer(
		grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(tracers))),
		grpc.ChainUnaryInterceptor(
			metrics.UnaryServerInterceptor(),
			recovery.UnaryServerInterceptor(panics),
			auth.Unary(),
			telemetry.Unary(),
			logging.UnaryServerInterceptor(calls, key, finished),
		),
		grpc.ChainStreamInterceptor(
			metrics.StreamServerInterceptor(),
			recovery.StreamServerInterceptor(panics),
			auth.Stream(),
			telemetry.Stream(),
			logging.StreamServerInterceptor(calls, key, finished),
		))
	testpb.RegisterTestServiceServer(server, service{})
	return server, telemetry.Close, auth.Check(server)
}

// A service answers unary calls, and echoes the messages of a stream.
type service struct {
	testpb.UnimplementedTestServiceServer
}

func (service) EmptyCall(context.Context, *testpb.Empty) (*testpb.Empty, error) {
	return &testpb.Empty{}, nil
}

func (service) UnaryCall(
	context.Context, *testpb.SimpleRequest,
) (*testpb.SimpleResponse, error) {
	return &testpb.SimpleResponse{}, nil
}

func (service) FullDuplexCall(stream testpb.TestService_FullDuplexCallServer) error {
	for {
		if _, err := stream.Recv(); err != nil {
			return err
		}
		if err := stream.Send(&testpb.StreamingOutputCallResponse{}); err != nil {
			return err
		}
	}
}
