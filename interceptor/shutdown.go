package interceptor

import (
	"sync"
	"time"
)

// stopGrace is the time that handlers have to return after the store is closed.
const stopGrace = 5 * time.Second

// Shutdown stops server, closes store, and returns the error of store.Close. The server is a
// *grpc.Server, and the store is a *keystore.Store. Shutdown returns after both have stopped.
//
// Accepted calls have the time wait to complete:
//
//  1. Shutdown calls server.GracefulStop. Clients open no new calls on the connections. Calls and
//     streams that are open continue.
//  2. After wait, Shutdown closes the store, which ends the open streams. Each client gets
//     Unavailable with the reason AUTH_BACKEND_UNAVAILABLE. Recv and Send of each handler return.
//  3. After 5 more seconds, Shutdown calls server.Stop, which ends the calls of handlers that have
//     not returned.
//
// If all calls end earlier, Shutdown does not wait. If wait is zero or negative, Shutdown closes
// the store immediately. Then calls fail that arrive before the clients know of the stop.
//
// Choose wait so that wait plus 5 seconds is less than the time until the process is killed (in
// Kubernetes: terminationGracePeriodSeconds, 30 seconds by default). Before Shutdown, set the
// status of a health.Server to NOT_SERVING with its method Shutdown. Call Shutdown once. Do not use
// Shutdown with grpc.Server.ServeHTTP, which has no graceful stop: stop the http.Server, and then
// close the store.
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
