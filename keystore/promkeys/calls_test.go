package promkeys_test

import (
	"context"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

func TestCalls(t *testing.T) {
	calls := promkeys.NewCalls()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(calls))
	require.Empty(t, values(t, registry))
	ctx := t.Context()
	calls.Refused(ctx, "/a.B/C", "missing")
	calls.Refused(ctx, "/a.B/C", "missing")
	calls.Refused(ctx, "_OTHER", "scope")
	require.Equal(t, map[string]float64{
		"apikeys_calls_refused_total /a.B/C missing": 2,
		"apikeys_calls_refused_total _OTHER scope":   1,
	}, values(t, registry))
}

// A refusal has the trace as its exemplar, if the trace is sampled.
func TestExemplars(t *testing.T) {
	calls := promkeys.NewCalls()
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(calls))
	exemplar := func(flags trace.TraceFlags) string {
		span := trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1, 2, 3}, SpanID: trace.SpanID{4}, TraceFlags: flags,
		})
		calls.Refused(trace.ContextWithSpanContext(context.Background(), span), "/a.B/C", "scope")
		families, err := registry.Gather()
		require.NoError(t, err)
		e := families[0].Metric[0].GetCounter().GetExemplar()
		if e == nil {
			return ""
		}
		require.Len(t, e.Label, 1)
		return e.Label[0].GetName() + "=" + e.Label[0].GetValue()
	}
	require.Empty(t, exemplar(0))
	require.Equal(t, "trace_id=01020300000000000000000000000000", exemplar(trace.FlagsSampled))
}
