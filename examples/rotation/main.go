// Rotation shows how a key gets a new secret under load. A client calls the server all the time,
// the key is rotated, and no call fails. When the grace period ends, the old secret stops working,
// and the stream that was opened with the old secret ends.
//
//	go run ./examples/rotation
package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"sync/atomic"
	"time"

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

// grace is short for this demonstration. In production, give clients enough time to fetch the new
// secret.
const grace = time.Second

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal("rotation: ", err)
	}
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "rotation-")
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

	old, err := store.Create(ctx, keystore.Spec{Name: "rotation"})
	if err != nil {
		return err
	}
	// The client asks the source for the secret at each call. In production, the source reads a
	// file or asks a secret manager.
	var secret atomic.Value
	secret.Store(old.Secret.Reveal())
	source := keycreds.FromSource(func(context.Context) (string, error) {
		return secret.Load().(string), nil
	})
	conn, err := grpc.NewClient(addr,
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, "")),
		grpc.WithPerRPCCredentials(source))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)

	watchOld, err := watch(ctx, client)
	if err != nil {
		return err
	}
	fmt.Println("A client makes calls all the time, and has a stream open.")
	stop, calls := make(chan struct{}), make(chan error, 1)
	var made int
	go func() {
		for {
			select {
			case <-stop:
				calls <- nil
				return
			default:
			}
			if _, err := client.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
				calls <- err
				return
			}
			made++
		}
	}()

	issued, err := store.Rotate(ctx, old.Key.ID, grace)
	if err != nil {
		return err
	}
	fmt.Printf("The key was rotated. For the next %v, both secrets work.\n", grace)
	time.Sleep(grace / 2)
	secret.Store(issued.Secret.Reveal())
	fmt.Println("The client has fetched the new secret and opens a second stream.")
	watchNew, err := watch(ctx, client)
	if err != nil {
		return err
	}

	err = ended(watchOld)
	if status.Code(err) != codes.Unauthenticated {
		return fmt.Errorf("the old stream must end with Unauthenticated, but ended with: %v", err)
	}
	late := time.Since(issued.Key.PreviousUntil).Round(time.Millisecond)
	fmt.Printf("The grace period is over. The first stream ended %v later: %v\n",
		late, status.Convert(err).Message())
	if _, err := store.Verify(ctx, old.Secret.Reveal()); !errors.Is(err, keystore.ErrDenied) {
		return fmt.Errorf("the old secret must be refused, but Verify returned: %v", err)
	}
	fmt.Println("The old secret is refused.")
	time.Sleep(grace / 4)
	close(stop)
	if err := <-calls; err != nil {
		return fmt.Errorf("a call failed: %w", err)
	}
	fmt.Printf("The client made %d calls, and no call failed.\n", made)
	select {
	case err := <-watchNew:
		return fmt.Errorf("the stream of the new secret ended: %v", err)
	default:
		fmt.Println("The second stream stays open until the server stops.")
	}
	// The wait is zero for this demonstration. In production, give running calls some seconds to
	// finish.
	if err := interceptor.Shutdown(server, store, 0); err != nil {
		return err
	}
	if err := ended(watchNew); status.Code(err) != codes.Unavailable {
		return fmt.Errorf("the new stream must end with Unavailable, but ended with: %v", err)
	}
	return nil
}

// watch opens a stream and waits until the server admits the stream. The returned channel receives
// the error that ends the stream.
func watch(ctx context.Context, client healthpb.HealthClient) (<-chan error, error) {
	stream, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return nil, err
	}
	if _, err := stream.Recv(); err != nil {
		return nil, err
	}
	end := make(chan error, 1)
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				end <- err
				return
			}
		}
	}()
	return end, nil
}

func ended(stream <-chan error) error {
	select {
	case err := <-stream:
		return err
	case <-time.After(30 * time.Second):
		return errors.New("the stream is still open after 30 seconds")
	}
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
