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
// any. WatchHealth never sets SERVING: a store that has stopped does not work again until it is
// reopened, in practice by a restart of the process. Let probes call the health service without a
// key: Public("/grpc.health.v1.Health/*").
func WatchHealth(ctx context.Context, server interface {
	SetServingStatus(service string, status healthpb.HealthCheckResponse_ServingStatus)
}, store interface{ Err() error }, services ...string) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if err := store.Err(); err != nil {
			for _, service := range append([]string{""}, services...) {
				server.SetServingStatus(service, healthpb.HealthCheckResponse_NOT_SERVING)
			}
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
