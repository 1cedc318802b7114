package interceptor_test

import (
	"context"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A server whose clients need a key.
func Example_server() {
	store, err := keystore.Open("keys", nil) // a directory of its own
	if err != nil {
		log.Fatal(err)
	}
	auth, err := interceptor.New(store)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(auth.ServerOptions()...) // add grpc.Creds for TLS
	healthpb.RegisterHealthServer(server, health.NewServer())

	_ = server
}

// Open calls have 15 seconds to complete. Then the streams end, and the store is closed.
func ExampleShutdown() {
	store, err := keystore.Open("keys", nil)
	if err != nil {
		log.Fatal(err)
	}
	auth, err := interceptor.New(store)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(auth.ServerOptions()...)
	healthServer := health.NewServer()
	healthpb.RegisterHealthServer(server, healthServer)
	lis, err := net.Listen("tcp", ":50051")
	if err != nil {
		log.Fatal(err)
	}
	go server.Serve(lis)

	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	<-terminate
	healthServer.Shutdown()
	if err := interceptor.Shutdown(server, store, 15*time.Second); err != nil {
		log.Fatal(err)
	}
}

// A client that sends a key.
func Example_client() {
	conn, err := grpc.NewClient("api.example.com:443",
		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
		grpc.WithPerRPCCredentials(keycreds.New(os.Getenv("API_KEY"))))

	_, _ = conn, err
}

// The handler of a call reads the key of the caller.
func ExampleFromContext() {
	handler := func(ctx context.Context) string {
		key, ok := interceptor.FromContext(ctx)
		if !ok {
			return "a public method"
		}
		return fmt.Sprintf("called by %s, may write: %t", key.Owner, key.HasScope("orders:write"))
	}

	// A test of the handler needs no server.
	key := keystore.NewKey(keystore.Spec{Owner: "team-a", Scopes: []string{"orders:*"}})
	fmt.Println(handler(interceptor.NewContext(context.Background(), key)))
	fmt.Println(handler(context.Background()))
	// Output:
	// called by team-a, may write: true
	// a public method
}

// The server refuses a call without a key, accepts a call with a key, and refuses the key again
// after it is revoked.
func Example() {
	dir, err := os.MkdirTemp("", "example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	store, err := keystore.Open(dir, nil)
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	auth, err := interceptor.New(store,
		interceptor.Require("/grpc.health.v1.Health/Check", "health:read"))
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(auth.ServerOptions()...)
	defer server.Stop()
	healthpb.RegisterHealthServer(server, health.NewServer())
	if err := auth.Check(server); err != nil { // are the rules' methods spelt right?
		log.Fatal(err)
	}
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go server.Serve(lis)

	ctx := context.Background()
	call := func(opts ...grpc.CallOption) {
		conn, err := grpc.NewClient(lis.Addr().String(),
			grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			log.Fatal(err)
		}
		defer conn.Close()
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}, opts...)
		fmt.Println(status.Code(err))
	}
	send := func(issued *keystore.Issued) grpc.CallOption {
		// AllowInsecure is needed because this server has no TLS.
		return grpc.PerRPCCredentials(
			keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure()),
		)
	}

	call()
	narrow, _ := store.Create(ctx, keystore.Spec{Name: "without the scope"})
	call(send(narrow))
	issued, _ := store.Create(ctx, keystore.Spec{Name: "with it", Scopes: []string{"health:read"}})
	call(send(issued))
	if err := store.Revoke(ctx, issued.Key.ID, "leaked"); err != nil {
		log.Fatal(err)
	}
	call(send(issued))
	// Output:
	// Unauthenticated
	// PermissionDenied
	// OK
	// Unauthenticated
}
