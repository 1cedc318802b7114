package compat

import (
	"context"
	"log/slog"
	"runtime/debug"

	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/logging"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

// serverOptions is the composition of the guides: tracing, metrics, recovery, authentication, the
// key of the call on its span, and logging, in this order.
func serverOptions(
	auth *interceptor.Authenticator, telemetry *otelkeys.Telemetry, logger *slog.Logger,
	registry *prometheus.Registry,
) []grpc.ServerOption {
	metrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram())
	registry.MustRegister(metrics)
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
	return []grpc.ServerOption{
		grpc.StatsHandler(otelgrpc.NewServerHandler()),
		grpc.ChainUnaryInterceptor(
			metrics.UnaryServerInterceptor(),
			recovery.UnaryServerInterceptor(panics),
			auth.Unary(),
			telemetry.Unary(),
			logging.UnaryServerInterceptor(calls, key),
		),
		grpc.ChainStreamInterceptor(
			metrics.StreamServerInterceptor(),
			recovery.StreamServerInterceptor(panics),
			auth.Stream(),
			telemetry.Stream(),
			logging.StreamServerInterceptor(calls, key),
		),
	}
}

// newAuthenticator returns an Authenticator whose refusals are logged, traced and counted, and
// registers the metrics of the store.
func newAuthenticator(
	store *keystore.Store, telemetry *otelkeys.Telemetry, logger *slog.Logger,
	registry *prometheus.Registry,
) (*interceptor.Authenticator, error) {
	collector, err := promkeys.NewCollector(store, nil)
	if err != nil {
		return nil, err
	}
	calls := promkeys.NewCalls()
	registry.MustRegister(collector, calls)
	return interceptor.New(store,
		interceptor.LogRefusals(slog.New(otelkeys.LogHandler(logger.Handler()))),
		interceptor.Observe(telemetry.Observe),
		interceptor.Observe(func(ctx context.Context, c interceptor.Call) {
			if !c.Ended {
				calls.Refused(ctx, c.Method, c.Refusal.Reason)
			}
		}))
}

// newLastBackup returns the metric of the last good backup: call SetToCurrentTime after each.
func newLastBackup(registry *prometheus.Registry) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "orders_last_backup_timestamp_seconds", Help: "When the last good backup was made."})
	registry.MustRegister(g)
	return g
}
