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
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// serverOptions is the composition of the guides: tracing, metrics, recovery, authentication and
// logging, in this order.
func serverOptions(
	auth *interceptor.Authenticator, logger *slog.Logger, registry *prometheus.Registry,
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
			logging.UnaryServerInterceptor(calls, key),
		),
		grpc.ChainStreamInterceptor(
			metrics.StreamServerInterceptor(),
			recovery.StreamServerInterceptor(panics),
			auth.Stream(),
			logging.StreamServerInterceptor(calls, key),
		),
	}
}

// An observer counts what a store does, for Options.Observer.
type observer struct {
	refused, ended, changed *prometheus.CounterVec
}

func newObserver(registry *prometheus.Registry) observer {
	counter := func(name, help, label string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help},
			[]string{label})
		registry.MustRegister(c)
		return c
	}
	return observer{
		refused: counter("apikey_refused_total", "Calls that the store refused.", "reason"),
		ended:   counter("apikey_ended_total", "Streams that the store ended.", "reason"),
		changed: counter("apikey_changed_total", "Changes of keys.", "action"),
	}
}

// Verified does nothing, because it is on the path of every call. Stats counts these calls.
func (o observer) Verified(keystore.Verification) {}
func (o observer) Refused(r keystore.Refusal) {
	o.refused.WithLabelValues(keystore.Reason(r.Err)).Inc()
}
func (o observer) Ended(e keystore.BindEnd) {
	o.ended.WithLabelValues(keystore.Reason(e.Cause)).Inc()
}
func (o observer) Changed(e keystore.Event) { o.changed.WithLabelValues(string(e.Action)).Inc() }

// registerStats makes metrics of Store.Stats.
func registerStats(registry *prometheus.Registry, store *keystore.Store) {
	counter := func(name, help string, value func(keystore.Stats) uint64) {
		registry.MustRegister(
			prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
				func() float64 { return float64(value(store.Stats())) }))
	}
	gauge := func(name, help string, value func(keystore.Stats) int) {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return float64(value(store.Stats())) }))
	}
	counter("apikey_cache_hits_total", "Look-ups answered from memory.",
		func(s keystore.Stats) uint64 { return s.Hits })
	counter("apikey_cache_misses_total", "Look-ups answered by the store.",
		func(s keystore.Stats) uint64 { return s.Misses })
	gauge("apikey_cached", "Keys in memory.", func(s keystore.Stats) int { return s.Cached })
	gauge("apikey_live", "Streams that are open.", func(s keystore.Stats) int { return s.Live })
	gauge("apikey_outdated", "Digests that an earlier pepper made; -1 is not counted.",
		func(s keystore.Stats) int { return s.Outdated })
}

// newLastBackup returns the metric of the last good backup: call SetToCurrentTime after each.
func newLastBackup(registry *prometheus.Registry) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "apikey_last_backup_timestamp_seconds", Help: "When the last good backup was made."})
	registry.MustRegister(g)
	return g
}
