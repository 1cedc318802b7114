package promkeys

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
)

// Calls counts the calls that an interceptor refused. The Collector counts what the store refused;
// a store does not see a call without a credential, for example, or a call of a method whose scope
// the key lacks. Calls is a prometheus.Collector, and safe for concurrent use.
//
//	calls := promkeys.NewCalls()
//	auth, err := interceptor.New(store, interceptor.Observe(
//		func(ctx context.Context, c interceptor.Call) {
//			if !c.Ended {
//				calls.Refused(ctx, c.Method, c.Refusal.Reason)
//			}
//		}))
type Calls struct{ refused *prometheus.CounterVec }

// NewCalls returns a Calls without counts. NewCalls registers nothing.
func NewCalls() *Calls {
	return &Calls{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "apikeys_calls_refused_total",
		Help: "Calls that the interceptor refused, by the reason and the method.",
	}, []string{"reason", "grpc_method"})}
}

// Refused counts a refused call. Give the Method of an interceptor.Call, which callers cannot
// choose, and the Reason of its Refusal. If ctx has a span that is sampled, the ID of its trace
// becomes the exemplar of the count. Prometheus reads exemplars in the OpenMetrics format only: set
// EnableOpenMetrics of promhttp.HandlerOpts.
func (c *Calls) Refused(ctx context.Context, method, reason string) {
	counter := c.refused.WithLabelValues(reason, method)
	if span := trace.SpanContextFromContext(ctx); span.IsSampled() {
		counter.(prometheus.ExemplarAdder).AddWithExemplar(1,
			prometheus.Labels{"trace_id": span.TraceID().String()})
		return
	}
	counter.Inc()
}

// Describe implements prometheus.Collector.
func (c *Calls) Describe(descs chan<- *prometheus.Desc) { c.refused.Describe(descs) }

// Collect implements prometheus.Collector.
func (c *Calls) Collect(out chan<- prometheus.Metric) { c.refused.Collect(out) }
