// Package otelkeys connects a keystore.Store and an Authenticator with OpenTelemetry: metrics of
// the store, the key of each call in the span of the call, and events for refused calls and ended
// streams. The package uses the API of OpenTelemetry only; the program brings the SDK.
//
//	telemetry, err := otelkeys.New(store, nil)
//	defer telemetry.Close()
//	auth, err := interceptor.New(store, interceptor.Observe(telemetry.Observe))
//	server := grpc.NewServer(append(append(
//		[]grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler())},
//		auth.ServerOptions()...), telemetry.ServerOptions()...)...)
//
// The names follow the semantic conventions of OpenTelemetry, version 1.43.0: a reason is the
// attribute error.type, a method rpc.method, and all other names begin with "apikey.". No component
// sets an attribute enduser.*.
//
// # Metrics
//
// The instruments are observable: they read Store.Stats when the reader of the SDK collects. So
// Verify does no work for a metric. OpenTelemetry has no observable histogram, so durations are two
// counters: divide apikey.change.time by apikey.change.calls.
//
//	apikey.store.up                  1 while the store serves
//	apikey.lookups                   apikey.lookup.result: hit, miss
//	apikey.admissions
//	apikey.refusals                  error.type: see keystore.Reason
//	apikey.changes                   apikey.action: see keystore.Action
//	apikey.change.calls, .time       apikey.action
//	apikey.write.failures            error.type: full, failed
//	apikey.credit.leases, apikey.credit.exhaustions
//	apikey.stream.ends               error.type: see keystore.Stats.Ended
//	apikey.stream.count
//	apikey.cache.key.count, apikey.cache.evictions
//	apikey.outdated_digest.count
//	apikey.process.count, .fresh, .freshness, .feed_lag, .losses, .removals
//	apikey.barrier.calls, .time
//	apikey.key.count                 apikey.key.state; with Options.Inventory only
//	apikey.expiring_key.count        apikey.key.expires_within: 24h, 7d, 30d; Inventory
//	apikey.unused_key.count          apikey.key.unused_since: 30d, 90d; Inventory
//	apikey.inventory.time            with Options.Inventory only
//	apikey.calls.refused             error.type: see interceptor.Refusal; rpc.method
//
// The last counter is not observable, because Observe counts the calls that the interceptor
// refuses. No attribute of a metric has a text from outside: neither the ID, the name or the owner
// of a key, nor an address. The metrics of otelgrpc cannot be divided by key, because otelgrpc
// takes their attributes before any interceptor runs.
//
// # Traces
//
// The interceptors run after the Authenticator, and set apikey.id on the span in the context, which
// is the span of otelgrpc; see Options for the owner and the name. Observe adds the event
// apikey.refused to the span of a refused call, and apikey.stream.ended to the span of a call that
// ended with its key. Both have error.type, and apikey.id if the caller has sent the whole key.
//
// # Logs
//
// LogHandler adds the IDs of the trace and of the span to each line that is logged with the context
// of a call, such as the lines of interceptor.LogRefusals.
package otelkeys
