package interceptor_test

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A fallible is a store that a test can stop.
type fallible struct {
	err   atomic.Pointer[error]
	asked atomic.Int64
}

func (f *fallible) Err() error {
	f.asked.Add(1)
	if err := f.err.Load(); err != nil {
		return *err
	}
	return nil
}

func TestWatchHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, server := &fallible{}, health.NewServer()
		server.SetServingStatus("orders", healthpb.HealthCheckResponse_SERVING)
		server.SetServingStatus("other", healthpb.HealthCheckResponse_SERVING)
		check := func(service string) string {
			reply, err := server.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
			require.NoError(t, err)
			return reply.Status.String()
		}
		ended := make(chan error, 1)
		go func() { ended <- interceptor.WatchHealth(t.Context(), server, store, "orders") }()
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, []string{"SERVING", "SERVING", "SERVING"},
			[]string{check(""), check("orders"), check("other")})
		require.EqualValues(t, 61, store.asked.Load(), "once a second")

		stopped := errors.New("the disk is gone")
		store.err.Store(&stopped)
		require.ErrorIs(t, <-ended, stopped)
		require.Equal(t, []string{"NOT_SERVING", "NOT_SERVING", "SERVING"},
			[]string{check(""), check("orders"), check("other")})
	})
}

// A stale store is a store that may be out of contact with other processes.
type stale struct {
	fallible
	is atomic.Bool
}

func (s *stale) Fresh() bool { return !s.is.Load() }

// While the store is out of contact, the named services are NOT_SERVING. Afterwards each service
// has the status that it had before. The whole server is SERVING, because a restart would not help.
func TestWatchHealthOfAStoreOutOfContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		store, server := new(stale), health.NewServer()
		server.SetServingStatus("orders", healthpb.HealthCheckResponse_SERVING)
		server.SetServingStatus("paused", healthpb.HealthCheckResponse_NOT_SERVING)
		all := func() (all []string) {
			synctest.Wait()
			for _, service := range []string{"", "orders", "paused", "new"} {
				reply, err := server.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
				if err != nil {
					require.Equal(t, codes.NotFound, status.Code(err))
					all = append(all, "not found")
					continue
				}
				all = append(all, reply.Status.String())
			}
			return all
		}
		ended := make(chan error, 1)
		go func() {
			ended <- interceptor.WatchHealth(ctx, server, store, "orders", "paused", "new")
		}()
		require.Equal(t, []string{"SERVING", "SERVING", "NOT_SERVING", "not found"}, all())
		for range 2 {
			store.is.Store(true)
			time.Sleep(10 * time.Second)
			require.Equal(t, []string{"SERVING", "NOT_SERVING", "NOT_SERVING", "NOT_SERVING"},
				all())
			store.is.Store(false)
			time.Sleep(time.Second)
			require.Equal(t, []string{"SERVING", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"},
				all())
		}
		store.is.Store(true)
		time.Sleep(time.Second)
		stopped := errors.New("the disk is gone")
		store.err.Store(&stopped)
		require.ErrorIs(t, <-ended, stopped)
		require.Equal(t, "NOT_SERVING", all()[0])
		cancel()
	})
}

// A real store that loses contact with its storage is NOT_SERVING, and SERVING again afterwards.
func TestHealthOfAProcessOutOfContact(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		link, server := badlink.Open(backendtest.NewShared()), health.NewServer()
		store, err := keystore.New(link, nil)
		require.NoError(t, err)
		server.SetServingStatus("orders", healthpb.HealthCheckResponse_SERVING)
		ended := make(chan error, 1)
		go func() { ended <- interceptor.WatchHealth(t.Context(), server, store, "orders") }()
		check := func() healthpb.HealthCheckResponse_ServingStatus {
			reply, err := server.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "orders"})
			require.NoError(t, err)
			return reply.Status
		}
		link.Set(badlink.Faults{Drop: true})
		time.Sleep(5 * time.Second)
		require.Equal(t, healthpb.HealthCheckResponse_NOT_SERVING, check())
		require.False(t, store.Fresh())
		require.NoError(t, store.Err())
		link.Set(badlink.Faults{})
		time.Sleep(5 * time.Second)
		require.Equal(t, healthpb.HealthCheckResponse_SERVING, check())
		require.True(t, store.Fresh())
		require.NoError(t, store.Close())
		require.ErrorIs(t, <-ended, keystore.ErrClosed)
		require.False(t, store.Fresh())
	})
}

func TestWatchHealthEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- interceptor.WatchHealth(ctx, health.NewServer(), &fallible{}) }()
		synctest.Wait()
		cancel()
		require.NoError(t, <-ended)
	})
}

// A probe on a socket gets NOT_SERVING after the store has stopped. The probe has no key.
func TestHealthProbesReportAStoppedStore(t *testing.T) {
	store, healthServer := &fallible{}, health.NewServer()
	auth := newAuth(t, openStore(t), interceptor.Public("/grpc.health.v1.Health/*"))
	server := grpc.NewServer(append(auth.ServerOptions(), grpc.WaitForHandlers(true))...)
	healthpb.RegisterHealthServer(server, healthServer)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served, watched := make(chan error, 1), make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-served)
	})
	go func() { watched <- interceptor.WatchHealth(t.Context(), healthServer, store) }()

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	probe, err := healthpb.NewHealthClient(dial(t, lis.Addr().String())).Watch(ctx,
		&healthpb.HealthCheckRequest{})
	require.NoError(t, err)
	update, err := probe.Recv()
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_SERVING, update.Status)
	stopped := errors.New("the disk is gone")
	store.err.Store(&stopped)
	update, err = probe.Recv()
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_NOT_SERVING, update.Status)
	require.ErrorIs(t, <-watched, stopped)
	cancel()
	_, err = probe.Recv()
	require.Equal(t, codes.Canceled, status.Code(err))
}
