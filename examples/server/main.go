// Server is a gRPC server that requires an API key for every method. The server also serves the
// admin service on a unix socket, where apikeyctl manages the keys at run time. Only the process
// that has opened the directory of the store can manage the keys.
//
//	go run ./examples/server
//
// In another terminal:
//
//	export APIKEYCTL_SOCKET=run/admin.sock
//	API_KEY=$(go run ./cmd/apikeyctl create --name laptop) go run ./examples/client -watch
//
// With -console, the server also serves a web console for the keys, to browsers on this machine:
//
//	go run ./examples/server -console 127.0.0.1:8080
//	go run ./cmd/apikeyctl create --name me --scope keys:admin --expires 1d
//
// Open http://127.0.0.1:8080/keys/, and log in with the key.
//
// The server serves reflection and the standard health service: Check is a unary call, and Watch is
// a stream.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
)

func main() {
	log.SetFlags(0)
	addr := flag.String("addr", "127.0.0.1:50051", "address to listen on")
	dir := flag.String("dir", "keys", "directory of the key store; it must contain no other files")
	socket := flag.String("socket", "run/admin.sock",
		"path of the unix socket for apikeyctl; if empty, there is no socket")
	consoleAddr := flag.String("console", "",
		"address for the web console, such as 127.0.0.1:8080; if empty, there is no console")
	certFile := flag.String("cert", "",
		"PEM file with the TLS certificate; if empty, make a throw-away certificate and write it "+
			"to -ca")
	keyFile := flag.String("key", "", "PEM file with the private key of -cert")
	caFile := flag.String("ca", "server.pem",
		"file for the throw-away certificate, for clients to trust")
	flag.Parse()
	if flag.NArg() > 0 {
		log.Fatalf("server: unexpected argument %q: flags begin with a hyphen; see -help",
			flag.Arg(0))
	}
	err := run(*addr, *dir, *socket, *consoleAddr, *certFile, *keyFile, *caFile)
	if err != nil {
		log.Fatal("server: ", err)
	}
}

func run(addr, dir, socket, consoleAddr, certFile, keyFile, caFile string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	// Listen first: if another server already runs on this address, this start fails before it
	// changes anything of that server.
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer lis.Close()
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	store, err := keystore.Open(dir, &keystore.Options{Logger: logger})
	if err != nil {
		return err
	}
	defer store.Close()

	auth, err := interceptor.New(store, interceptor.RequireTLS())
	if err != nil {
		return err
	}
	cert, err := certificate(certFile, keyFile, caFile)
	if err != nil {
		return err
	}
	creds := grpc.Creds(credentials.NewServerTLSFromCert(&cert))
	server := grpc.NewServer(append(auth.ServerOptions(), creds)...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	reflection.Register(server)
	if err := auth.Check(server); err != nil {
		return err
	}
	srv, err := admin.New(store, admin.Logger(logger))
	if err != nil {
		return err
	}
	defer srv.Close()

	failed := make(chan error, 3)
	go func() { failed <- server.Serve(lis) }()
	var administration sync.WaitGroup
	if socket != "" {
		fmt.Printf("apikeyctl --socket %s manages the keys\n", socket)
		administration.Go(func() {
			if err := srv.ServeUnix(ctx, socket); err != nil {
				failed <- err
			}
		})
	}
	stopConsole := func() {}
	if consoleAddr != "" {
		if stopConsole, err = serveConsole(consoleAddr, store, logger, failed); err != nil {
			return err
		}
	}
	fmt.Printf("listening on %s\n", lis.Addr())
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	stop()
	stopConsole()
	administration.Wait()
	// Running calls have 5 seconds to finish. Then the server ends the remaining streams with a
	// status that allows clients to retry.
	return errors.Join(err, interceptor.Shutdown(server, store, 5*time.Second))
}

// serveConsole serves the web console. The console accepts logins without TLS only from this
// machine: on any other machine, serve the console with TLS.
func serveConsole(
	addr string, store *keystore.Store, logger *slog.Logger, failed chan<- error,
) (stop func(), err error) {
	lis, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	c, err := console.New(store, console.Logger(logger), console.Title("Example server"))
	if err != nil {
		return nil, errors.Join(err, lis.Close())
	}
	mux := http.NewServeMux()
	mux.Handle("/keys/", http.StripPrefix("/keys", c))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := server.Serve(lis); !errors.Is(err, http.ErrServerClosed) {
			failed <- err
		}
	}()
	fmt.Printf("the console is on http://%s/keys/ (log in with a key of scope keys:admin)\n",
		lis.Addr())
	return func() {
		c.Close() // ends the streams of events, for which Shutdown would wait
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
	}, nil
}

// certificate loads the certificate from certFile. If certFile is empty, certificate makes a
// throw-away certificate and writes the public part to caFile.
func certificate(certFile, keyFile, caFile string) (tls.Certificate, error) {
	if (certFile == "") != (keyFile == "") {
		return tls.Certificate{}, errors.New("set both -cert and -key, " +
			"or neither for a throw-away certificate")
	}
	if certFile != "" {
		return tls.LoadX509KeyPair(certFile, keyFile)
	}
	cert, pem, err := throwaway.Certificate()
	if err != nil {
		return tls.Certificate{}, err
	}
	if err := os.WriteFile(caFile, pem, 0o644); err != nil {
		return tls.Certificate{}, err
	}
	path, err := filepath.Abs(caFile)
	if err != nil {
		return tls.Certificate{}, err
	}
	fmt.Printf("clients trust the certificate in %s\n", path)
	return cert, nil
}
