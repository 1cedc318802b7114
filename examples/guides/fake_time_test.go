package guides_test

import (
	"context"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

const day = 24 * time.Hour

func TestTrialEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		trial := keystoretest.MustCreate(t, store,
			keystore.Spec{ExpiresAt: time.Now().Add(30 * day)})

		time.Sleep(30*day - time.Second)
		_, err := store.Verify(t.Context(), trial.Secret.Reveal())
		require.NoError(t, err)
		time.Sleep(time.Second)
		_, err = store.Verify(t.Context(), trial.Secret.Reveal())
		require.ErrorIs(t, err, keystore.ErrExpired)
	})
}

func TestOldSecretHasAWeek(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		before := keystoretest.MustCreate(t, store, keystore.Spec{})
		after, err := store.Rotate(t.Context(), before.Key.ID, 7*day)
		require.NoError(t, err)

		time.Sleep(7 * day)
		_, err = store.Verify(t.Context(), before.Secret.Reveal())
		require.ErrorIs(t, err, keystore.ErrExpired)
		_, err = store.Verify(t.Context(), after.Secret.Reveal())
		require.NoError(t, err)
	})
}

func TestStreamEndsWithItsKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		client := serve(t, store)
		issued := keystoretest.MustCreate(t, store, keystore.Spec{ExpiresAt: time.Now().Add(day)})
		key := grpc.PerRPCCredentials(
			keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure()),
		)

		stream, err := client.Watch(t.Context(), &healthpb.HealthCheckRequest{}, key)
		require.NoError(t, err)
		_, err = stream.Recv()
		require.NoError(t, err)
		opened := time.Now()
		_, err = stream.Recv() // waits for a day, which takes no time
		require.Equal(t, codes.Unauthenticated, status.Code(err))
		require.Equal(t, day, time.Since(opened))
	})
}

// serve returns a client of a server in memory, because a test cannot use a socket in a bubble.
func serve(t *testing.T, store *keystore.Store) healthpb.HealthClient {
	auth, err := interceptor.New(store)
	require.NoError(t, err)
	server := grpc.NewServer(auth.ServerOptions()...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	lis := bufconn.Listen(1 << 20)
	go server.Serve(lis)
	conn, err := grpc.NewClient("passthrough:bufconn",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return lis.DialContext(ctx)
		}))
	require.NoError(t, err)
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
	})
	return healthpb.NewHealthClient(conn)
}
