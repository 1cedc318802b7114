package interceptor

import (
	"sync"
	"time"
)

// lastMoment is how long handlers have to return after the store is closed.
const stopGrace = 5 * time.Second

// Shutdown stops server, closes store, and returns the error of store.Close. Shutdown returns when
// both are done. A server is a *grpc.Server, and a store is a *keystore.Store.
//
// No call that the server admitted fails while it can end by itself. At first Shutdown calls
// server.GracefulStop: clients open no new calls on the connections, and calls and streams run on.
// After wait, Shutdown closes the store. That ends the streams that still run: each client gets
// Unavailable with the reason AUTH_BACKEND_UNAVAILABLE, and each handler comes back from Recv and
// Send. 5 seconds later, Shutdown calls server.Stop, which ends every call of a handler that has
// not returned yet. If all calls end earlier, Shutdown does not wait. A wait of zero or less closes
// the store immediately: then calls that arrive before the clients know of the stop fail.
//
// Choose wait so that wait and 5 seconds are less than the time until the process is killed (in
// Kubernetes, terminationGracePeriodSeconds, 30 seconds by default). Before, set the status of a
// health.Server to NOT_SERVING with its method Shutdown. Call Shutdown once. Do not call Shutdown
// for a server behind grpc.Server.ServeHTTP, which has no graceful stop: stop the http.Server, and
// close the store after that.
func Shutdown(server interface {
	GracefulStop()
	Stop()
}, store interface{ Close() error }, wait time.Duration) error {
	closeStore := sync.OnceValue(store.Close)
	time.AfterFunc(wait, func() { _ = closeStore() })
	stop := time.AfterFunc(max(wait, 0)+stopGrace, server.Stop)
	defer stop.Stop()
	server.GracefulStop()
	return closeStore()
}
