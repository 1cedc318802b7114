// Streaming shows how the server ends the stream of a client when the key of the client is changed,
// disabled or revoked. Streaming also shows the possible reactions of the client: open the stream
// again, wait for an administrator, or give up.
//
//	go run ./examples/streaming
package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal("streaming: ", err)
	}
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "streaming-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	server, addr, roots, err := serve(store)
	if err != nil {
		return err
	}
	defer server.Stop()
	issued, err := store.Create(ctx, keystore.Spec{Name: "streaming", Scopes: []string{"orders:*"}})
	if err != nil {
		return err
	}
	id := issued.Key.ID
	conn, err := grpc.NewClient(addr,
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "")),
		grpc.WithPerRPCCredentials(keycreds.New(issued.Secret.Reveal())))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)

	for _, act := range []struct {
		title  string
		change func() error
		code   codes.Code
		again  bool // whether the client should open the stream again
	}{
		{"The key loses a scope: the client opens the stream again", func() error {
			_, err := store.Update(ctx, id, func(spec *keystore.Spec) error {
				spec.Scopes = []string{"orders:read"}
				return nil
			})
			return err
		}, codes.Unavailable, true},
		{"The key is disabled: the client waits until an administrator enables the key",
			func() error {
				return store.Disable(ctx, id, "used at an unusual time")
			}, codes.Unauthenticated, false},
		{"The key is enabled and used again, then revoked: the client gives up", func() error {
			return store.Revoke(ctx, id, "leaked")
		}, codes.Unauthenticated, false},
	} {
		fmt.Println(act.title + ".")
		stream, err := watch(ctx, client)
		if err != nil {
			return err
		}
		if err := act.change(); err != nil {
			return err
		}
		_, err = stream.Recv()
		if status.Code(err) != act.code {
			return fmt.Errorf("the stream must end with %v, but ended with: %v", act.code, err)
		}
		if again := explain(err); again != act.again {
			return fmt.Errorf("the server allows a retry: %v; expected: %v", again, act.again)
		}
		_, err = watch(ctx, client)
		switch {
		case act.again && err != nil:
			return fmt.Errorf("could not open the stream again: %w", err)
		case act.again:
			fmt.Println("  a second attempt succeeds")
		case err == nil:
			return errors.New("an invalid key opened a stream")
		default:
			fmt.Println("  a second attempt is refused:", status.Convert(err).Message())
		}
		if act.code == codes.Unauthenticated {
			if err := store.Enable(ctx, id); err != nil && !errors.Is(err, keystore.ErrKeyRevoked) {
				return err
			}
		}
	}
	// A stream that was opened again still runs: the wait of zero ends it immediately.
	return interceptor.Shutdown(server, store, 0)
}

// explain prints why a stream has ended. explain reports whether the client may open the stream
// again without an administrator: in this case, the status contains a RetryInfo with the time to
// wait.
func explain(err error) (again bool) {
	st := status.Convert(err)
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			fmt.Printf("  the stream ended: %v, %s: %s\n", st.Code(), d.Reason, st.Message())
		case *errdetails.RetryInfo:
			again = true
		}
	}
	return again
}

type healthStream = grpc.ServerStreamingClient[healthpb.HealthCheckResponse]

// watch opens a stream and waits until the server admits the stream.
func watch(ctx context.Context, client healthpb.HealthClient) (healthStream, error) {
	stream, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return nil, err
	}
	if _, err := stream.Recv(); err != nil {
		return nil, err
	}
	return stream, nil
}

func serve(store *keystore.Store) (*grpc.Server, string, *x509.CertPool, error) {
	cert, pem, err := throwaway.Certificate()
	if err != nil {
		return nil, "", nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	auth, err := interceptor.New(store)
	if err != nil {
		return nil, "", nil, err
	}
	creds := grpc.Creds(credentials.NewServerTLSFromCert(&cert))
	server := grpc.NewServer(append(auth.ServerOptions(), creds)...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, "", nil, err
	}
	go server.Serve(lis)
	return server, lis.Addr().String(), roots, nil
}
