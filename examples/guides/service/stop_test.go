package main

import (
	"context"
	"io"
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

// After the drain, neither a stream with a key nor a public one keeps the program from ending.
func TestStop(t *testing.T) {
	c := config{listen: freePort(t), health: freePort(t), keys: filepath.Join(t.TempDir(), "keys"), drain: time.Millisecond}
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
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(callContext(t), grpc.WaitForReady(true),
		grpc.PerRPCCredentials(keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure())))
	require.NoError(t, err)
	require.NoError(t, stream.Send(message(1)))
	_, err = stream.Recv()
	require.NoError(t, err)
	watch, err := healthpb.NewHealthClient(conn).Watch(callContext(t), &healthpb.HealthCheckRequest{})
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
