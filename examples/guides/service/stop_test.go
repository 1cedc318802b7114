package main

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// After the drain time, the program must end, even if a stream with a key or a public stream is
// still open.
func TestStop(t *testing.T) {
	c := config{listen: freeAddress(t), health: freeAddress(t), keys: filepath.Join(t.TempDir(), "keys"),
		drain: time.Millisecond}
	store, err := keystore.Open(c.keys, nil)
	require.NoError(t, err)
	issued, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
	require.NoError(t, err)
	require.NoError(t, store.Close())

	ctx, terminate := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, c) }()
	conn, err := grpc.NewClient(c.listen, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(callContext(t),
		grpc.WaitForReady(true),
		grpc.PerRPCCredentials(keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure())))
	require.NoError(t, err)
	require.NoError(t, stream.Send(message(1)))
	_, err = stream.Recv()
	require.NoError(t, err)
	watch, err := healthpb.NewHealthClient(conn).Watch(callContext(t),
		&healthpb.HealthCheckRequest{})
	require.NoError(t, err)
	serving, err := watch.Recv()
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_SERVING, serving.Status)

	terminate()
	serving, err = watch.Recv()
	require.NoError(t, err)
	require.Equal(t, healthpb.HealthCheckResponse_NOT_SERVING, serving.Status)
	_, err = stream.Recv()
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	require.NotErrorIs(t, err, io.EOF)
	require.NoError(t, <-ended)
}

// A service that finds no store must not create a store, because the path is wrong, or the volume
// is not mounted.
func TestServiceNeedsAStore(t *testing.T) {
	empty := t.TempDir()
	over, cancel := context.WithCancel(t.Context())
	cancel() // so that a service that starts by mistake ends
	for _, keys := range []string{empty, filepath.Join(empty, "missing")} {
		err := run(over, config{listen: "127.0.0.1:0", keys: keys})
		require.ErrorIs(t, err, fs.ErrNotExist)
		require.ErrorContains(t, err, "no key store exists in "+keys)
		left, err := os.ReadDir(empty)
		require.NoError(t, err)
		require.Empty(t, left)
	}
	require.NoError(t, run(t.Context(), config{keys: empty, issue: "test"}))
}

// A health probe must report that the store has stopped, and the log must contain the reason for a
// refused call.
func TestServiceReports(t *testing.T) {
	c := config{listen: freeAddress(t), drain: time.Millisecond}
	store, err := keystore.Open(filepath.Join(t.TempDir(), "keys"), nil)
	require.NoError(t, err)
	defer store.Close()
	ctx, terminate := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	var log bytes.Buffer
	go func() {
		ended <- serveCalls(ctx, c, slog.New(slog.NewTextHandler(&log, nil)), store, nil)
	}()
	conn, err := grpc.NewClient(c.listen, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	_, err = testpb.NewTestServiceClient(conn).UnaryCall(callContext(t), &testpb.SimpleRequest{},
		grpc.WaitForReady(true))
	require.Equal(t, "CREDENTIALS_MISSING", reason(err), "%v", err)

	watch, err := healthpb.NewHealthClient(conn).Watch(callContext(t),
		&healthpb.HealthCheckRequest{})
	require.NoError(t, err)
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{
		healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		got, err := watch.Recv()
		require.NoError(t, err)
		require.Equal(t, want, got.Status)
		if want == healthpb.HealthCheckResponse_SERVING {
			require.NoError(t, store.Close())
		}
	}
	terminate()
	require.NoError(t, <-ended)
	require.Contains(t, log.String(),
		`msg="gRPC call refused" reason=missing method=/grpc.testing.TestService/UnaryCall`)
}
