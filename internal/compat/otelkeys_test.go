package compat

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// collected returns the values of all instruments, by the name and the values of the attributes.
func collected(t testing.TB, r sdkmetric.Reader) (map[string]float64, metricdata.ScopeMetrics) {
	t.Helper()
	var all metricdata.ResourceMetrics
	require.NoError(t, r.Collect(context.Background(), &all))
	require.Len(t, all.ScopeMetrics, 1)
	values := make(map[string]float64)
	add := func(name string, attrs attribute.Set, value float64) {
		for _, a := range attrs.ToSlice() {
			name += " " + a.Value.AsString()
		}
		values[name] = value
	}
	for _, m := range all.ScopeMetrics[0].Metrics {
		switch data := m.Data.(type) {
		case metricdata.Sum[int64]:
			for _, p := range data.DataPoints {
				add(m.Name, p.Attributes, float64(p.Value))
			}
		case metricdata.Sum[float64]:
			for _, p := range data.DataPoints {
				add(m.Name, p.Attributes, p.Value)
			}
		case metricdata.Gauge[int64]:
			for _, p := range data.DataPoints {
				add(m.Name, p.Attributes, float64(p.Value))
			}
		case metricdata.Gauge[float64]:
			for _, p := range data.DataPoints {
				add(m.Name, p.Attributes, p.Value)
			}
		default:
			require.Fail(t, "unexpected data", "%s: %T", m.Name, data)
		}
	}
	return values, all.ScopeMetrics[0]
}

// A server with otelgrpc and otelkeys: the metrics, the spans, the events and the log.
func TestOTelKeys(t *testing.T) {
	reader, spans := sdkmetric.NewManualReader(), tracetest.NewInMemoryExporter()
	meters := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	store := keystoretest.New(t, nil)
	telemetry, err := otelkeys.New(store, &otelkeys.Options{MeterProvider: meters,
		Inventory: time.Hour, Owner: true})
	require.NoError(t, err)
	var text buffer
	auth, err := interceptor.New(store, interceptor.Observe(telemetry.Observe),
		interceptor.LogRefusals(slog.New(otelkeys.LogHandler(slog.NewJSONHandler(&text, nil)))))
	require.NoError(t, err)
	svc := &service{returned: make(chan error, 1)}
	client, stop := serve(t, svc, append(append([]grpc.ServerOption{
		grpc.StatsHandler(otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(tracers))),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil }),
	}, auth.ServerOptions()...), telemetry.ServerOptions()...)...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	issued := keystoretest.MustCreate(t, store,
		keystore.Spec{Name: "name-of-key", Owner: "team-a"})
	token, id := issued.Secret.Reveal(), issued.Key.ID
	key := grpc.PerRPCCredentials(keycreds.New(token, keycreds.AllowInsecure()))
	in := func(mode string) context.Context {
		return metadata.AppendToOutgoingContext(ctx, "mode", mode)
	}
	_, err = client.EmptyCall(ctx, &testpb.Empty{}, key)
	require.NoError(t, err)
	_, err = client.EmptyCall(ctx, &testpb.Empty{})
	requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
	stream, err := client.FullDuplexCall(in("recv"), key)
	require.NoError(t, err)
	_, err = stream.Header()
	require.NoError(t, err)
	values, _ := collected(t, reader)
	require.Equal(t, 1.0, values["apikey.stream.count"])
	require.NoError(t, store.Revoke(ctx, id, "leaked"))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	require.Error(t, <-svc.returned)
	_, err = client.EmptyCall(ctx, &testpb.Empty{}, key)
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_INVALID")
	stop()

	// The spans: the key of the good call and of the stream, and an event for each refusal.
	type seen struct{ key, owner, event, reason, eventKey string }
	var got []seen
	bySpan := make(map[string]string) // the reason, by the IDs of the trace and the span
	for _, span := range spans.GetSpans() {
		var s seen
		for _, a := range span.Attributes {
			require.NotContains(t, a.Key, "enduser")
			switch a.Key {
			case "apikey.id":
				s.key = a.Value.AsString()
			case "apikey.owner":
				s.owner = a.Value.AsString()
			}
		}
		for _, e := range span.Events {
			s.event += e.Name
			for _, a := range e.Attributes {
				switch a.Key {
				case semconv.ErrorTypeKey:
					s.reason = a.Value.AsString()
				case "apikey.id":
					s.eventKey = a.Value.AsString()
				default:
					require.Fail(t, "unexpected attribute", a.Key)
				}
			}
		}
		got = append(got, s)
		bySpan[span.SpanContext.TraceID().String()+span.SpanContext.SpanID().String()] = s.reason
	}
	require.ElementsMatch(t, []seen{
		{id, "team-a", "", "", ""},
		{"", "", "apikey.refused", "missing", ""},
		{id, "team-a", "apikey.stream.ended", "revoked", id},
		{"", "", "apikey.refused", "revoked", id},
	}, got)

	// Each line of the log leads to the span with the same reason.
	lines := strings.Split(strings.TrimSpace(text.String()), "\n")
	require.Len(t, lines, 3)
	for _, line := range lines {
		var l struct {
			Reason string
			Trace  string `json:"trace_id"`
			Span   string `json:"span_id"`
		}
		require.NoError(t, json.Unmarshal([]byte(line), &l))
		reason, ok := bySpan[l.Trace+l.Span]
		require.True(t, ok, "%s", line)
		require.Equal(t, reason, l.Reason)
	}

	require.Eventually(t, func() bool {
		values, _ = collected(t, reader)
		_, ok := values["apikey.key.count revoked"]
		return ok
	}, time.Minute, time.Millisecond)
	for name, want := range map[string]float64{
		"apikey.store.up": 1, "apikey.lookups hit": 1, "apikey.lookups miss": 2, "apikey.admissions": 2,
		"apikey.refusals revoked": 1, "apikey.refusals malformed": 0,
		"apikey.changes create": 1, "apikey.change.calls revoke": 1,
		"apikey.stream.ends revoked": 1, "apikey.stream.count": 0,
		"apikey.calls.refused missing grpc.testing.TestService/EmptyCall": 1,
		"apikey.calls.refused revoked grpc.testing.TestService/EmptyCall": 1,
		"apikey.process.count": 1, "apikey.process.fresh": 1,
	} {
		require.Equal(t, want, values[name], name)
	}
	require.Positive(t, values["apikey.change.time revoke"])
	require.Equal(t, 1.0, values["apikey.key.count active"]+values["apikey.key.count revoked"],
		"the count began before or after the revocation")
	secret := token[len(token)-40:]
	everything := fmt.Sprint(spans.GetSpans(), text.String(), values)
	require.NotContains(t, everything, secret)
	require.NotContains(t, fmt.Sprint(values), id, "no metric has the ID of a key")
	require.NotContains(t, everything, "name-of-key", "the name is an option")

	require.NoError(t, telemetry.Close())
	var after metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(ctx, &after))
	for _, scope := range after.ScopeMetrics {
		for _, m := range scope.Metrics {
			require.Equal(t, "apikey.calls.refused", m.Name, "the store is not read any more")
		}
	}
}

// The names, units and attributes follow the rules of the semantic conventions: lower-case words
// between dots, no plural "total", no name that is also a namespace, and a unit for each.
func TestOTelKeysNames(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	shared := backendtest.NewShared()
	store, err := keystore.New(shared.Open(), nil)
	require.NoError(t, err)
	defer store.Close()
	telemetry, err := otelkeys.New(store, &otelkeys.Options{
		MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)),
		Inventory:     time.Hour,
	})
	require.NoError(t, err)
	telemetry.Observe(t.Context(), interceptor.Call{Method: interceptor.OtherMethod,
		Refusal: &interceptor.Refusal{Reason: "missing"}})
	var scope metricdata.ScopeMetrics
	require.Eventually(t, func() bool {
		var values map[string]float64
		values, scope = collected(t, reader)
		_, ok := values["apikey.key.count revoked"]
		return ok
	}, time.Minute, time.Millisecond)
	require.Equal(t, semconv.SchemaURL, scope.Scope.SchemaURL)
	require.Equal(t, "github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys", scope.Scope.Name)
	var names []string
	for _, m := range scope.Metrics {
		names = append(names, m.Name)
		require.Regexp(t, regexp.MustCompile(`^apikey(\.[a-z]+(_[a-z]+)*)+$`), m.Name)
		require.NotEmpty(t, m.Unit, m.Name)
		require.NotEmpty(t, m.Description, m.Name)
	}
	require.Greater(t, len(names), 20)
	for _, name := range names {
		require.False(t, slices.ContainsFunc(names, func(other string) bool {
			return strings.HasPrefix(other, name+".")
		}), "%s is also a namespace", name)
	}
	require.NoError(t, telemetry.Close())
	require.NoError(t, telemetry.Close(), "a second Close does nothing")
}

func TestOTelKeysRefuses(t *testing.T) {
	_, err := otelkeys.New(nil, nil)
	require.EqualError(t, err, "otelkeys: New: the store is nil")
	_, err = otelkeys.New(keystoretest.New(t, nil), &otelkeys.Options{Inventory: time.Second})
	require.ErrorContains(t, err, "otelkeys: New: Options.Inventory is 1s")
}

// A logger with attributes and a group, and a context without a span.
func TestLogHandler(t *testing.T) {
	tracers := sdktrace.NewTracerProvider()
	ctx, span := tracers.Tracer("test").Start(t.Context(), "test")
	defer span.End()
	var text buffer
	logger := slog.New(otelkeys.LogHandler(slog.NewTextHandler(&text, nil))).
		With("a", 1).WithGroup("g")
	logger.InfoContext(ctx, "with", "b", 2)
	logger.InfoContext(t.Context(), "without", "b", 2)
	require.Contains(t, text.String(), fmt.Sprintf("msg=with a=1 g.b=2 g.trace_id=%s g.span_id=%s\n",
		span.SpanContext().TraceID(), span.SpanContext().SpanID()))
	require.Contains(t, text.String(), "msg=without a=1 g.b=2\n")
}

// Verify of a store that OpenTelemetry collects against Verify of a store that it does not, in
// turns. x-without is the ratio of the medians.
func BenchmarkVerifyOTel(b *testing.B) {
	const batch = 2000
	ctx := b.Context()
	var stores [2]*keystore.Store
	var texts [2]string
	for i := range stores {
		stores[i] = keystoretest.New(b, nil)
		texts[i] = keystoretest.MustCreate(b, stores[i], keystore.Spec{}).Secret.Reveal()
	}
	reader := sdkmetric.NewManualReader()
	telemetry, err := otelkeys.New(stores[1], &otelkeys.Options{
		MeterProvider: sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))})
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, telemetry.Close()) })
	var took [2][]time.Duration
	for round := 0; b.Loop(); round++ {
		var all metricdata.ResourceMetrics
		require.NoError(b, reader.Collect(ctx, &all))
		for i := range stores {
			i := (i + round) % 2
			began := time.Now()
			for range batch {
				_, _ = stores[i].Verify(ctx, texts[i])
			}
			took[i] = append(took[i], time.Since(began))
		}
	}
	slices.Sort(took[0])
	slices.Sort(took[1])
	without, with := took[0][len(took[0])/2], took[1][len(took[1])/2]
	b.ReportMetric(float64(without.Nanoseconds())/batch, "ns/without")
	b.ReportMetric(float64(with.Nanoseconds())/batch, "ns/with")
	b.ReportMetric(float64(with)/float64(without), "x-without")
	b.ReportMetric(testing.AllocsPerRun(1000, func() { _, _ = stores[1].Verify(ctx, texts[1]) }),
		"allocs/verify")
}
