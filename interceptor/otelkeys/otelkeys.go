package otelkeys

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/internal/storemetrics"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// scopeName is the name of the instrumentation.
const scopeName = "github.com/grpc-api-key/grpc-api-key/interceptor/otelkeys"

// The attributes of spans and events.
const (
	keyID    = attribute.Key("apikey.id")
	keyOwner = attribute.Key("apikey.owner")
	keyName  = attribute.Key("apikey.name")
)

// Options are the settings of a Telemetry. Nil and the zero value are valid.
type Options struct {
	// MeterProvider makes the instruments. Nil means otel.GetMeterProvider.
	MeterProvider metric.MeterProvider
	// Inventory makes the Telemetry count the keys of the store, at most once in this time, in the
	// background. Each count reads every key, so Inventory must be at least 10 minutes. If several
	// processes have the store open, one of them is enough. 0 means no inventory.
	Inventory time.Duration
	// Owner and Name make the interceptors also set apikey.owner and apikey.name on spans. Both
	// texts may be personal data.
	Owner, Name bool
}

// A Telemetry reports what a store and an Authenticator do. A Telemetry is safe for concurrent use.
type Telemetry struct {
	store       *keystore.Store
	inventory   *inventory.Inventory // nil: none
	owner, name bool
	refused     metric.Int64Counter
	readers     []reader
	registered  metric.Registration
}

// New returns a Telemetry for a store, and registers its instruments. Call Close at the end. New
// returns an error if the store is nil, if an option is unusable, or if the MeterProvider refuses
// an instrument.
func New(store *keystore.Store, opts *Options) (*Telemetry, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.MeterProvider == nil {
		o.MeterProvider = otel.GetMeterProvider()
	}
	if store == nil {
		return nil, errors.New("otelkeys: New: the store is nil")
	}
	t := &Telemetry{store: store, owner: o.Owner, name: o.Name}
	if o.Inventory != 0 {
		var err error
		if t.inventory, err = storemetrics.NewInventory(store, o.Inventory); err != nil {
			return nil, fmt.Errorf("otelkeys: New: Options.Inventory %w", err)
		}
	}
	meter := o.MeterProvider.Meter(scopeName, metric.WithSchemaURL(semconv.SchemaURL))
	if err := t.register(meter); err != nil {
		return nil, fmt.Errorf("otelkeys: New: %w", err)
	}
	return t, nil
}

// Close unregisters the instruments of the store. The interceptors and Observe continue to work. A
// second call does nothing.
func (t *Telemetry) Close() error { return t.registered.Unregister() }

// ServerOptions returns both interceptors as options for grpc.NewServer. Give the options after
// those of the Authenticator, because interceptors run in order.
func (t *Telemetry) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(t.Unary()),
		grpc.ChainStreamInterceptor(t.Stream()),
	}
}

// Unary returns the interceptor for unary calls. The interceptor must run after the Authenticator.
func (t *Telemetry) Unary() grpc.UnaryServerInterceptor {
	return func(
		ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
	) (any, error) {
		t.identify(ctx)
		return handler(ctx, req)
	}
}

// Stream returns the interceptor for streams. The interceptor must run after the Authenticator.
func (t *Telemetry) Stream() grpc.StreamServerInterceptor {
	return func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler,
	) error {
		t.identify(ss.Context())
		return handler(srv, ss)
	}
}

// identify sets the key of the caller on the span in the context.
func (t *Telemetry) identify(ctx context.Context) {
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() {
		return
	}
	key, ok := interceptor.FromContext(ctx)
	if !ok {
		return
	}
	attrs := []attribute.KeyValue{keyID.String(key.ID)}
	if t.owner && key.Owner != "" {
		attrs = append(attrs, keyOwner.String(key.Owner))
	}
	if t.name && key.Name != "" {
		attrs = append(attrs, keyName.String(key.Name))
	}
	span.SetAttributes(attrs...)
}

// Observe counts a refused call, and adds an event to its span. Give Observe to
// interceptor.Observe.
func (t *Telemetry) Observe(ctx context.Context, c interceptor.Call) {
	reason := semconv.ErrorTypeKey.String(c.Refusal.Reason)
	event := "apikey.stream.ended"
	if !c.Ended {
		event = "apikey.refused"
		t.refused.Add(ctx, 1, metric.WithAttributes(reason, semconv.RPCMethod(methodOf(c))))
	}
	span := trace.SpanFromContext(ctx)
	if !span.IsRecording() {
		return
	}
	attrs := []attribute.KeyValue{reason}
	if c.Refusal.KeyID != "" {
		attrs = append(attrs, keyID.String(c.Refusal.KeyID))
	}
	span.AddEvent(event, trace.WithAttributes(attrs...))
}

// methodOf returns the method without the leading slash, as rpc.method has it.
func methodOf(c interceptor.Call) string {
	if len(c.Method) > 0 && c.Method[0] == '/' {
		return c.Method[1:]
	}
	return c.Method
}
