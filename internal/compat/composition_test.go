package compat

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// For each kind of call, the metrics, logs and traces of the composition must be as the guide
// describes.
func TestComposition(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans)))
	defer otel.SetTracerProvider(before)
	var text buffer
	logger := slog.New(slog.NewTextHandler(&text, nil))
	registry := prometheus.NewRegistry()
	store, err := keystore.Open(t.TempDir(), nil)
	require.NoError(t, err)
	defer store.Close()
	newLastBackup(registry).SetToCurrentTime()
	telemetry, err := otelkeys.New(store, nil)
	require.NoError(t, err)
	defer telemetry.Close()
	auth, err := newAuthenticator(store, telemetry, logger, registry)
	require.NoError(t, err)
	svc := &service{returned: make(chan error, 1)}
	client, stop := serve(t, svc, serverOptions(auth, telemetry, logger, registry)...)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	issued, err := store.Create(ctx, keystore.Spec{Name: "test", Owner: "team-a"})
	require.NoError(t, err)
	token := issued.Secret.Reveal()
	key := grpc.PerRPCCredentials(keycreds.New(token, keycreds.AllowInsecure()))
	in := func(mode string) context.Context {
		return metadata.AppendToOutgoingContext(ctx, "mode", mode)
	}
	_, err = client.EmptyCall(ctx, &testpb.Empty{}, key)
	require.NoError(t, err)
	_, err = client.EmptyCall(ctx, &testpb.Empty{})
	require.Equal(t, codes.Unauthenticated, status.Code(err))
	_, err = client.EmptyCall(ctx, &testpb.Empty{},
		grpc.PerRPCCredentials(keycreds.New("mistyped", keycreds.AllowInsecure())))
	require.Equal(t, codes.Unauthenticated, status.Code(err))
	_, err = client.EmptyCall(in("panic"), &testpb.Empty{}, key)
	require.Equal(t, codes.Internal, status.Code(err))
	stream, err := client.FullDuplexCall(in("recv"), key)
	require.NoError(t, err)
	_, err = stream.Header()
	require.NoError(t, err)
	require.Equal(t, 1.0, gathered(t, registry, "apikeys_streams"))
	require.NoError(t, store.Revoke(ctx, issued.Key.ID, "leaked"))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	require.Error(t, <-svc.returned)
	stop()

	const (
		service = `grpc_service="grpc.testing.TestService"`
		unary   = `grpc_method="EmptyCall",` + service + `,grpc_type="unary"`
		duplex  = `grpc_method="FullDuplexCall",` + service + `,grpc_type="bidi_stream"`
		handled = "Total number of RPCs completed on the server, " +
			"regardless of success or failure."
	)
	require.NoError(t, testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP grpc_server_handled_total `+handled+`
# TYPE grpc_server_handled_total counter
grpc_server_handled_total{grpc_code="Internal",`+unary+`} 1
grpc_server_handled_total{grpc_code="OK",`+unary+`} 1
grpc_server_handled_total{grpc_code="Unauthenticated",`+unary+`} 2
grpc_server_handled_total{grpc_code="Unauthenticated",`+duplex+`} 1
# HELP apikeys_calls_refused_total Calls that the interceptor refused, by the reason and the method.
# TYPE apikeys_calls_refused_total counter
apikeys_calls_refused_total{grpc_method="/grpc.testing.TestService/EmptyCall",reason="malformed"} 1
apikeys_calls_refused_total{grpc_method="/grpc.testing.TestService/EmptyCall",reason="missing"} 1
`), "grpc_server_handled_total", "apikeys_calls_refused_total"))
	require.Equal(t, 1.0, gathered(t, registry, "apikeys_refusals_total"))
	require.Equal(t, 1.0, gathered(t, registry, "apikeys_streams_ended_total"))
	require.Equal(t, 2.0, gathered(t, registry, "apikeys_changes_total"))
	require.Equal(t, 0.0, gathered(t, registry, "apikeys_streams"))

	logged := text.String()
	// The logging interceptor runs after the Authenticator, so it logs the key and does not log
	// refused calls.
	require.Equal(t, 2, strings.Count(logged, `msg="finished call"`), "%s", logged)
	require.Contains(t, logged, "key="+issued.Key.ID+" owner=team-a")
	require.Equal(t, 3, strings.Count(logged, "trace_id="), "of the refusals: %s", logged)
	require.Contains(t, logged, `msg="a handler panicked" panic=unary`)
	require.Len(t, spans.GetSpans(), 5)
	require.NotContains(t, logged, token[len(token)-20:])

	// The metric in an alert of the guides must exist.
	rules, err := os.ReadFile("../../examples/guides/prometheus/alerts.yml")
	require.NoError(t, err)
	names := regexp.MustCompile(`\borders_\w+`).FindAllString(string(rules), -1)
	require.NotEmpty(t, names)
	for _, name := range names {
		_ = gathered(t, registry, name)
	}
}

// gathered returns the value of a metric, summed over its labels.
func gathered(t *testing.T, registry *prometheus.Registry, name string) (sum float64) {
	t.Helper()
	families, err := registry.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.Metric {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
			return sum
		}
	}
	require.Fail(t, "there is no metric with the name", name)
	return 0
}
