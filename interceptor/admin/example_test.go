package admin_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A server manages its keys on a unix socket. Only the user of the server, and root, can connect.
func Example() {
	dir, err := os.MkdirTemp("", "")
	check(err)
	defer os.RemoveAll(dir)
	store, err := keystore.Open(filepath.Join(dir, "keys"), nil)
	check(err)
	defer store.Close()

	srv, err := admin.New(store)
	check(err)
	defer srv.Close()
	ctx, stop := context.WithCancel(context.Background())
	socket := filepath.Join(dir, "admin.sock")
	served := make(chan error)
	go func() { served <- srv.ServeUnix(ctx, socket) }()

	// Another process, such as apikeyctl:
	conn, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(local.NewCredentials()))
	check(err)
	defer conn.Close()
	keys := adminpb.NewKeyServiceClient(conn)
	created, err := keys.CreateKey(ctx, &adminpb.CreateKeyRequest{
		Key: &adminpb.Key{DisplayName: "billing", Owner: "acme"}}, grpc.WaitForReady(true))
	check(err)
	_, err = store.Verify(ctx, created.Secret)
	fmt.Println("before:", err)
	revoked, err := keys.RevokeKey(ctx,
		&adminpb.RevokeKeyRequest{Name: created.Key.Name, Reason: "leaked"})
	check(err)
	_, err = store.Verify(ctx, created.Secret)
	fmt.Println("after:", err, revoked.Key.State, revoked.Key.RevokeReason)

	stop()
	check(<-served)
	// Output:
	// before: <nil>
	// after: API key denied: revoked STATE_REVOKED leaked
}

// A server offers the service over TLS too. A key needs the scope of a method, and cannot give out
// more than it has.
func ExampleRules() {
	dir, err := os.MkdirTemp("", "")
	check(err)
	defer os.RemoveAll(dir)
	store, err := keystore.Open(dir, nil)
	check(err)
	defer store.Close()
	cert, pem, err := throwaway.Certificate()
	check(err)

	srv, err := admin.New(store)
	check(err)
	defer srv.Close()
	auth, err := interceptor.New(store, append(admin.Rules(), interceptor.RequireTLS())...)
	check(err)
	server := grpc.NewServer(append(auth.ServerOptions(),
		grpc.Creds(credentials.NewServerTLSFromCert(&cert)))...)
	srv.Register(server)
	check(auth.Check(server))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	go server.Serve(listener)
	defer server.Stop()

	ctx := context.Background()
	for _, scopes := range [][]string{nil, {"keys:write"}, {"keys:write", "orders:*"}} {
		issued, err := store.Create(ctx, keystore.Spec{Name: "robot", Scopes: scopes})
		check(err)
		conn, err := grpc.NewClient(listener.Addr().String(),
			grpc.WithTransportCredentials(credentials.NewTLS(trusting(pem))),
			grpc.WithPerRPCCredentials(keycreds.New(issued.Secret.Reveal())))
		check(err)
		_, err = adminpb.NewKeyServiceClient(conn).CreateKey(ctx, &adminpb.CreateKeyRequest{
			Key: &adminpb.Key{DisplayName: "new", Scopes: []string{"orders:read"}}})
		fmt.Println(scopes, status.Code(err), status.Convert(err).Message())
		conn.Close()
	}
	// Output:
	// [] PermissionDenied the API key lacks a scope that this method needs: keys:write, keys:admin
	// [keys:write] PermissionDenied your own key lacks scopes that the changed key has: orders:read
	// [keys:write orders:*] OK
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
