package otelkeys

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/grpc-api-key/grpc-api-key/internal/storemetrics"
)

// A reader observes one metric.
type reader func(metric.Observer, *storemetrics.Sample)

// register makes all instruments, and registers their callback.
func (t *Telemetry) register(meter metric.Meter) error {
	var all []metric.Observable
	var errs []error
	counter := func(name, help, unit string) metric.Int64ObservableCounter {
		c, err := meter.Int64ObservableCounter(name, metric.WithDescription(help),
			metric.WithUnit(unit))
		all, errs = append(all, c), append(errs, err)
		return c
	}
	for _, m := range storemetrics.Metrics {
		switch {
		case m.Kind == storemetrics.Histogram:
			calls := counter(m.OTel+".calls", m.Help+" The number of calls.", "{call}")
			sum, err := meter.Float64ObservableCounter(m.OTel+".time",
				metric.WithDescription(m.Help+" The sum."), metric.WithUnit("s"))
			all, errs = append(all, sum), append(errs, err)
			t.read(m, func(o metric.Observer, v storemetrics.Value, attrs metric.MeasurementOption) {
				o.ObserveInt64(calls, int64(v.Durations.Count), attrs)
				o.ObserveFloat64(sum, v.Durations.Sum.Seconds(), attrs)
			})
		case m.Kind == storemetrics.Counter:
			c := counter(m.OTel, m.Help, m.Unit)
			t.read(m, func(o metric.Observer, v storemetrics.Value, attrs metric.MeasurementOption) {
				o.ObserveInt64(c, int64(v.Number), attrs)
			})
		case m.Kind == storemetrics.Level:
			l, err := meter.Int64ObservableUpDownCounter(m.OTel, metric.WithDescription(m.Help),
				metric.WithUnit(m.Unit))
			all, errs = append(all, l), append(errs, err)
			t.read(m, func(o metric.Observer, v storemetrics.Value, attrs metric.MeasurementOption) {
				o.ObserveInt64(l, int64(v.Number), attrs)
			})
		case m.Unit == "s":
			g, err := meter.Float64ObservableGauge(m.OTel, metric.WithDescription(m.Help),
				metric.WithUnit(m.Unit))
			all, errs = append(all, g), append(errs, err)
			t.read(m, func(o metric.Observer, v storemetrics.Value, attrs metric.MeasurementOption) {
				o.ObserveFloat64(g, v.Number, attrs)
			})
		default:
			g, err := meter.Int64ObservableGauge(m.OTel, metric.WithDescription(m.Help),
				metric.WithUnit(m.Unit))
			all, errs = append(all, g), append(errs, err)
			t.read(m, func(o metric.Observer, v storemetrics.Value, attrs metric.MeasurementOption) {
				o.ObserveInt64(g, int64(v.Number), attrs)
			})
		}
	}
	var err error
	t.refused, err = meter.Int64Counter("apikey.calls.refused", metric.WithUnit("{call}"),
		metric.WithDescription("Calls that the interceptor refused, by the reason and the method."))
	errs = append(errs, err)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	t.registered, err = meter.RegisterCallback(t.observe, all...)
	return err
}

// read adds the reader of a metric.
func (t *Telemetry) read(
	m storemetrics.Metric,
	observe func(metric.Observer, storemetrics.Value, metric.MeasurementOption),
) {
	t.readers = append(t.readers, func(o metric.Observer, s *storemetrics.Sample) {
		m.Read(s, func(word string, v storemetrics.Value) {
			attrs := metric.WithAttributeSet(*attribute.EmptySet())
			if m.Attribute != "" {
				attrs = metric.WithAttributes(attribute.String(m.Attribute, word))
			}
			observe(o, v, attrs)
		})
	})
}

// observe is called when a reader of the SDK collects.
func (t *Telemetry) observe(_ context.Context, o metric.Observer) error {
	sample := storemetrics.Take(t.store, t.inventory)
	for _, read := range t.readers {
		read(o, sample)
	}
	return nil
}
