// Quickstart shows the life of an API key in one process. A server with TLS listens on a real
// socket, and a client calls the server. The key is created, used, and revoked while a stream is
// open.
//
//	go run ./examples/quickstart
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
		log.Fatal("quickstart: ", err)
	}
}

func run() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	dir, err := os.MkdirTemp("", "quickstart-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Println("grpc-api-key quickstart: one process, a real socket, TLS, and a directory of keys")

	step("Open a key store")
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	say("in %s", dir)

	step("Start a gRPC server that requires a key for every call")
	server, addr, roots, err := serve(store)
	if err != nil {
		return err
	}
	defer server.Stop()
	say("the server listens on %s with TLS, and serves the standard health service", addr)

	step("Call the server without a key")
	anonymous, err := dial(addr, roots)
	if err != nil {
		return err
	}
	defer anonymous.Close()
	if err := refused(check(ctx, anonymous), codes.Unauthenticated); err != nil {
		return err
	}

	step("Create a key")
	issued, err := store.Create(ctx, keystore.Spec{Name: "quickstart", Owner: "you"})
	if err != nil {
		return err
	}
	say("id      %s", issued.Key.ID)
	say("secret  %v", issued.Secret)
	say("(a Secret always prints like this; Reveal returns the text, " +
		"which the store does not keep)")

	step("Call with the key")
	conn, err := dial(addr, roots, grpc.WithPerRPCCredentials(keycreds.New(issued.Secret.Reveal())))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := check(ctx, conn); err != nil {
		return err
	}
	say("served: the health service says SERVING")

	step("Open a stream with the key")
	stream, err := healthpb.NewHealthClient(conn).Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	update, err := stream.Recv()
	if err != nil {
		return err
	}
	say("the stream is open; the first message says %v", update.Status)

	step("Revoke the key while the stream is open")
	closed := make(chan error, 1)
	var closedAt time.Time
	go func() {
		_, err := stream.Recv() // waits until the server ends the stream
		closedAt = time.Now()
		closed <- err
	}()
	revokedAt := time.Now()
	if err := store.Revoke(ctx, issued.Key.ID, "shown to everyone in a quickstart"); err != nil {
		return err
	}
	say("Revoke returned after %v: the revocation is on disk",
		time.Since(revokedAt).Round(10*time.Microsecond))
	err = <-closed
	if err := refused(err, codes.Unauthenticated); err != nil {
		return err
	}
	say("the stream of the client ended %v after the call of Revoke",
		closedAt.Sub(revokedAt).Round(10*time.Microsecond))

	step("Call with the key again")
	if err := refused(check(ctx, conn), codes.Unauthenticated); err != nil {
		return err
	}

	step("Close the store and open the store again, as after a restart")
	if err := store.Close(); err != nil {
		return err
	}
	reopened, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	defer reopened.Close()
	_, err = reopened.Verify(ctx, issued.Secret.Reveal())
	if !errors.Is(err, keystore.ErrRevoked) {
		return fmt.Errorf("a revoked key must be refused after a restart, but Verify returned: %v",
			err)
	}
	say("refused: %v", err)

	fmt.Println("\nDone. Next, start a server, and in another terminal create, use and revoke a key:")
	for _, command := range []string{
		"go run ./examples/server",
		"export APIKEYCTL_SOCKET=run/admin.sock",
		"API_KEY=$(go run ./cmd/apikeyctl create --name laptop) go run ./examples/client -watch",
		"go run ./cmd/apikeyctl --help",
	} {
		say("%s", command)
	}
	return nil
}

// serve starts a server that requires a key for every method. serve returns the address of the
// server and the root certificates for its clients.
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

func dial(addr string, roots *x509.CertPool, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	creds := grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(roots, ""))
	return grpc.NewClient(addr, append(opts, creds)...)
}

// check makes a unary call.
func check(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	return err
}

// refused prints the refusal in err. refused returns an error if err has another code than want.
func refused(err error, want codes.Code) error {
	st := status.Convert(err)
	if st.Code() != want {
		return fmt.Errorf("the call must be refused with %v, but ended with: %v", want, err)
	}
	reason := ""
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			reason = info.Reason
		}
	}
	say("refused: %v, %s: %s", st.Code(), reason, st.Message())
	return nil
}

var steps int

func step(title string) {
	steps++
	fmt.Printf("\n%d. %s\n", steps, title)
}

func say(format string, args ...any) { fmt.Printf("   "+format+"\n", args...) }
