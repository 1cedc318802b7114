package sharedlab

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/local"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// serveAdmin serves the admin service of a store on a socket, and returns a client.
func serveAdmin(t *testing.T, store *keystore.Store) adminpb.KeyServiceClient {
	t.Helper()
	srv, err := admin.New(store)
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "s") // the path of a socket must be short
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	socket := filepath.Join(dir, "admin.sock")
	go func() { served <- srv.ServeUnix(ctx, socket) }()
	conn, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(local.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, conn.Close())
		stop()
		require.NoError(t, <-served)
		srv.Close()
		require.NoError(t, os.RemoveAll(dir))
	})
	return adminpb.NewKeyServiceClient(conn)
}

// Each process of a store on etcd manages the keys of all: what one process does, each of the
// others shows, and the sessions in all processes end before the call returns.
func TestAdminInEachProcess(t *testing.T) {
	t.Parallel()
	r := startReplicas(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	var admins []adminpb.KeyServiceClient
	for _, store := range r.stores {
		admins = append(admins, serveAdmin(t, store))
	}
	watch, err := admins[2].WatchEvents(ctx, &adminpb.WatchEventsRequest{})
	require.NoError(t, err)
	_, err = watch.Recv()
	require.NoError(t, err)

	created, err := admins[0].CreateKey(ctx, &adminpb.CreateKeyRequest{
		Key: &adminpb.Key{DisplayName: "a", Owner: "acme"}})
	require.NoError(t, err)
	var sessions []*keystore.Session
	for _, store := range r.stores {
		session, err := store.Bind(ctx, created.Secret)
		require.NoError(t, err)
		defer session.Close()
		sessions = append(sessions, session)
	}
	list, err := admins[1].ListKeys(ctx, &adminpb.ListKeysRequest{
		Filter: &adminpb.Filter{Owner: "acme"}, NewestFirst: true})
	require.NoError(t, err)
	require.Len(t, list.Keys, 1)
	require.Equal(t, created.Key.Etag, list.Keys[0].Etag)
	_, err = admins[1].RevokeKey(ctx, &adminpb.RevokeKeyRequest{
		Name: created.Key.Name, Reason: "leaked", Etag: created.Key.Etag})
	require.NoError(t, err)
	for _, session := range sessions {
		require.ErrorIs(t, session.Cause(), keystore.ErrRevoked)
	}
	var actions []string
	for len(actions) < 2 {
		m, err := watch.Recv()
		require.NoError(t, err)
		for _, e := range m.Events {
			require.Equal(t, created.Key.Name, e.Key)
			require.NotEmpty(t, e.Actor)
			actions = append(actions, e.Action)
		}
	}
	require.Equal(t, []string{"create", "revoke"}, actions)
}
