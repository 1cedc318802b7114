package interceptor

import (
	"context"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// WatchHealth sets the status of a health server to NOT_SERVING when the store has stopped, so that
// probes and load balancers notice. WatchHealth then returns the error of the store. If ctx ends
// first, WatchHealth returns nil. Call WatchHealth in a new goroutine:
//
//	healthServer := health.NewServer()
//	healthpb.RegisterHealthServer(server, healthServer)
//	go interceptor.WatchHealth(ctx, healthServer, store)
//
// The server is a *health.Server, and the store is a *keystore.Store. WatchHealth calls store.Err
// once a second. Err returns nil while the store works, and otherwise the reason why the store has
// stopped. WatchHealth sets the status of the whole server (""), and of the services, if you name
// any. A store that has stopped does not work again until it is reopened, in practice by a restart
// of the process. So the status of the whole server suits a check whether to restart the process,
// such as a liveness probe.
//
// If the store has a method Fresh() bool, WatchHealth calls Fresh once a second too. While Fresh is
// false, this process of several processes on one store refuses every call: see
// [github.com/grpc-api-key/grpc-api-key/keystore.Options.Freshness]. WatchHealth then sets the
// named services to NOT_SERVING, and puts back the status that each service had before once Fresh
// is true again. The status of the whole server stays, because a restart would not help. So the
// status of a named service suits a check whether to send calls to this process, such as a
// readiness probe or the health check of a client. Otherwise WatchHealth never sets SERVING.
//
// Let probes call the health service without a key: Public("/grpc.health.v1.Health/*").
func WatchHealth(ctx context.Context, server interface {
	SetServingStatus(service string, status healthpb.HealthCheckResponse_ServingStatus)
	Check(context.Context, *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error)
}, store interface{ Err() error }, services ...string) error {
	freshness, _ := store.(interface{ Fresh() bool })
	before := make(map[string]healthpb.HealthCheckResponse_ServingStatus) // while Fresh is false
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if err := store.Err(); err != nil {
			for _, service := range append([]string{""}, services...) {
				server.SetServingStatus(service, healthpb.HealthCheckResponse_NOT_SERVING)
			}
			return err
		}
		switch fresh := freshness == nil || freshness.Fresh(); {
		case !fresh && len(before) == 0:
			for _, service := range services {
				before[service] = healthpb.HealthCheckResponse_SERVICE_UNKNOWN
				reply, err := server.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
				if err == nil {
					before[service] = reply.Status
				}
				server.SetServingStatus(service, healthpb.HealthCheckResponse_NOT_SERVING)
			}
		case fresh:
			for service, status := range before {
				server.SetServingStatus(service, status)
			}
			clear(before)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
