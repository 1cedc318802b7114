package keycreds_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"sync/atomic"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Every call on the connection carries the key. The credentials may be printed and logged: the text
// does not contain the key.
func ExampleNew() {
	creds := keycreds.New(os.Getenv("API_KEY"))
	conn, err := grpc.NewClient("api.example.com:443",
		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
		grpc.WithPerRPCCredentials(creds))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	fmt.Println(creds)
	// Output: keycreds(authorization, redacted)
}

// Text that cannot be a key is not sent. (A call on a connection fails with the same error.)
func ExampleNew_badKey() {
	creds := keycreds.New("", keycreds.AllowInsecure())
	_, err := creds.GetRequestMetadata(context.Background())
	fmt.Println(status.Code(err))
	fmt.Println(status.Convert(err).Message())
	// Output:
	// Unauthenticated
	// keycreds: the API key is empty: check the variable or the file that the key comes from
}

// A secret that is mounted into a container. When the file changes, calls carry the new key at most
// a second later.
func ExampleFromFile() {
	conn, err := grpc.NewClient("api.example.com:443",
		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
		grpc.WithPerRPCCredentials(keycreds.FromFile("/run/secrets/api-key")))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
}

// Every call calls the source.
func ExampleFromSource() {
	var current atomic.Pointer[string] // another goroutine sets it, from a secret manager
	creds := keycreds.FromSource(func(context.Context) (string, error) {
		if key := current.Load(); key != nil {
			return *key, nil
		}
		return "", errors.New("the key was not fetched yet")
	})
	conn, err := grpc.NewClient("api.example.com:443",
		grpc.WithTransportCredentials(credentials.NewTLS(nil)),
		grpc.WithPerRPCCredentials(creds))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	fmt.Println(creds)
	// Output: keycreds(authorization, redacted)
}

// A test without a certificate, on the loopback interface.
func ExampleAllowInsecure() {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer() // with the options of an interceptor.Authenticator
	healthpb.RegisterHealthServer(server, health.NewServer())
	go server.Serve(lis)
	defer server.Stop()

	conn, err := grpc.NewClient(lis.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(keycreds.New("a-key-for-tests", keycreds.AllowInsecure())))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	reply, err := healthpb.NewHealthClient(conn).Check(context.Background(),
		&healthpb.HealthCheckRequest{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reply.GetStatus())
	// Output: SERVING
}

// A client finds out why the server has refused its call.
func Example_refused() {
	store, err := keystore.New(backendtest.NewMemory(), nil) // in production: keystore.Open
	if err != nil {
		log.Fatal(err)
	}
	defer store.Close()
	auth, err := interceptor.New(store,
		interceptor.Require("/grpc.health.v1.Health/Check", "health:read"))
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(auth.ServerOptions()...) // in production: with grpc.Creds
	healthpb.RegisterHealthServer(server, health.NewServer())
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go server.Serve(lis)
	defer server.Stop()
	issued, err := store.Create(context.Background(), keystore.Spec{Name: "no scopes"})
	if err != nil {
		log.Fatal(err)
	}

	conn, err := grpc.NewClient(lis.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithPerRPCCredentials(
			keycreds.New(issued.Secret.Reveal(), keycreds.AllowInsecure())))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	_, err = healthpb.NewHealthClient(conn).Check(context.Background(),
		&healthpb.HealthCheckRequest{})
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			fmt.Println(info.Reason, info.Metadata["scopes"])
		}
	}
	// Output: INSUFFICIENT_SCOPE health:read
}

// A server that expects the key alone in a header.
func ExampleWithHeader() {
	creds := keycreds.New(os.Getenv("API_KEY"), keycreds.WithHeader("x-api-key", ""))
	fmt.Println(creds)
	// Output: keycreds(x-api-key, redacted)
}
