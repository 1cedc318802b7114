// Package server is a gRPC server that shares its API keys with other servers. Any number of
// servers have the same store open, and each server creates and revokes keys for all servers.
//
// The two methods of the server are from grpc.testing.TestService: a unary call and a stream.
// Replace the two methods with your methods.
package server

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A config contains the values of the flags.
type config struct {
	name, listen, health, cert, certKey string
	engine                              string
	freshness, drain                    time.Duration
	issue                               string
	console                             bool
}

// An Engine is a storage that servers can share.
type Engine interface {
	// Name is a value of the flag -engine.
	Name() string
	// AddFlags adds the flags of the engine.
	AddFlags(*flag.FlagSet)
	// Open connects to the storage. The function that Open returns ends the connection, after the
	// backend is closed.
	Open(context.Context) (backend.Backend, func() error, error)
}

// Run runs the server until ctx ends. The args are the flags of the command line. The first engine
// is the default.
func Run(ctx context.Context, args []string, engines ...Engine) error {
	hostname, err := os.Hostname()
	if err != nil {
		return err
	}
	var c config
	flags := flag.NewFlagSet("orders", flag.ExitOnError)
	flags.StringVar(&c.name, "name", hostname, "name of this server")
	flags.StringVar(&c.listen, "listen", "127.0.0.1:50051", "address for callers")
	flags.StringVar(&c.health, "health", "",
		"address for health checks without TLS and without a key; empty: none")
	flags.StringVar(&c.cert, "cert", "", "TLS certificate of the server in PEM")
	flags.StringVar(&c.certKey, "cert-key", "", "private key of -cert")
	var names []string
	for _, e := range engines {
		names = append(names, e.Name())
		e.AddFlags(flags)
	}
	flags.StringVar(&c.engine, "engine", names[0],
		"the storage that the servers share: "+strings.Join(names, " or "))
	flags.DurationVar(&c.freshness, "freshness", 0,
		"how long a server that has lost contact may admit callers; 0: as the other servers, or 3s")
	flags.DurationVar(&c.drain, "drain", 20*time.Second, "how long calls may go on after SIGTERM")
	flags.StringVar(&c.issue, "issue", "", "create a key with this name, print it, and end")
	flags.BoolVar(&c.console, "console", false,
		"read \"create NAME\" and \"revoke ID\" from the standard input, and end with the input")
	_ = flags.Parse(args) // ends the process at an error
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: flags begin with a hyphen: see -help",
			flags.Arg(0))
	}
	n := slices.Index(names, c.engine)
	if n < 0 {
		return fmt.Errorf("-engine is %q: want %s", c.engine, strings.Join(names, " or "))
	}
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	store, disconnect, err := open(ctx, engines[n], &c, logger)
	if err != nil {
		return err
	}
	defer disconnect()
	defer store.Close()
	if c.issue != "" {
		issued, err := store.Create(ctx, keystore.Spec{Name: c.issue})
		if err != nil {
			return err
		}
		fmt.Println(issued.Secret.Reveal())
		return store.Close()
	}
	return serve(ctx, &c, logger, store)
}

// open opens the store that all servers share. open returns once this server may admit callers.
func open(
	ctx context.Context, engine Engine, c *config, logger *slog.Logger,
) (*keystore.Store, func() error, error) {
	b, disconnect, err := engine.Open(ctx)
	if err != nil {
		return nil, nil, err
	}
	store, err := keystore.New(b, &keystore.Options{Freshness: c.freshness, Logger: logger})
	if err != nil {
		return nil, nil, errors.Join(err, b.Close(), disconnect())
	}
	return store, disconnect, nil
}

// serve serves calls until ctx ends, and then closes the store: so no other server waits for this
// server.
func serve(ctx context.Context, c *config, logger *slog.Logger, store *keystore.Store) error {
	creds, err := credentials.NewServerTLSFromFile(c.cert, c.certKey)
	if err != nil {
		return fmt.Errorf("-cert and -cert-key: %w", err)
	}
	auth, err := interceptor.New(store, interceptor.RequireTLS(), interceptor.LogRefusals(logger))
	if err != nil {
		return err
	}
	server := grpc.NewServer(append(auth.ServerOptions(), grpc.Creds(creds))...)
	testpb.RegisterTestServiceServer(server, service{name: c.name})
	if err := auth.Check(server); err != nil {
		return err
	}
	checks := health.NewServer()
	if c.health != "" {
		probed := grpc.NewServer()
		healthpb.RegisterHealthServer(probed, checks)
		lis, err := net.Listen("tcp", c.health)
		if err != nil {
			return err
		}
		go probed.Serve(lis)
		defer probed.Stop()
		// While the server has lost contact with the other servers, it refuses every call, and
		// callers should go to another server: "ready" is then NOT_SERVING.
		checks.SetServingStatus("ready", healthpb.HealthCheckResponse_SERVING)
		go interceptor.WatchHealth(ctx, checks, store, "ready")
	}
	lis, err := net.Listen("tcp", c.listen)
	if err != nil {
		return err
	}
	fmt.Println("serving", lis.Addr())

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if c.console {
		go func() {
			defer stop()
			readCommands(ctx, store)
		}()
	}
	stopped := make(chan error, 1)
	go func() {
		<-ctx.Done()
		checks.Shutdown()
		stopped <- interceptor.Shutdown(server, store, c.drain)
	}()
	if err := server.Serve(lis); err != nil {
		return err
	}
	return <-stopped
}
