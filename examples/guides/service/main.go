// Service is the program that the guides deploy: a gRPC server whose methods need an API key. The
// two methods are from grpc.testing.TestService: a unary call and a stream. Replace the two methods
// with your methods.
//
//	go run ./examples/guides/service -keys /tmp/orders/keys -issue laptop     prints a key, and ends
//	go run ./examples/guides/service -keys /tmp/orders/keys                   serves
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A config contains the values of the flags.
type config struct {
	listen, health, keys, backups, restore, issue, cert, certKey string

	peppers, proxies list
	drain            time.Duration
}

// A list is a flag that may occur several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func main() {
	log.SetFlags(0)
	var c config
	flag.StringVar(&c.listen, "listen", "127.0.0.1:50051", "address for callers, or unix:PATH")
	flag.StringVar(&c.health, "health", "",
		"address for health checks without TLS and without a key; empty: none")
	flag.StringVar(&c.keys, "keys", "", "directory of the key store; nothing else may be in it")
	flag.StringVar(&c.backups, "backups", "", "directory for nightly backups; empty: none")
	flag.StringVar(&c.restore, "restore", "", "restore this backup, and end")
	flag.StringVar(&c.issue, "issue", "", "create a key with this name, print it, and end")
	flag.StringVar(&c.cert, "cert", "", "TLS certificate in PEM; empty: no TLS")
	flag.StringVar(&c.certKey, "cert-key", "", "private key of -cert")
	flag.Var(&c.peppers, "pepper",
		"ID=FILE, or sha256; repeat it for earlier ones, the current one first")
	flag.Var(&c.proxies, "proxy",
		"network of a proxy whose x-forwarded-for is believed, or unix; may be repeated")
	flag.DurationVar(&c.drain, "drain", 20*time.Second, "how long calls may go on after SIGTERM")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		log.Fatal("service: ", err)
	}
}

func run(ctx context.Context, c config) error {
	if flag.NArg() > 0 || c.keys == "" {
		return errors.New("-keys DIRECTORY is needed, and arguments begin with a hyphen: see -help")
	}
	logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
	hasher, err := hasherFrom(c.peppers)
	if err != nil {
		return err
	}
	// Only -issue and -restore may create a store. If a service finds no store, the path is wrong,
	// or the volume is not mounted.
	mustExist := c.issue == "" && c.restore == ""
	opts := &keystore.Options{Hasher: hasher, Logger: logger, MustExist: mustExist}
	store, err := keystore.Open(c.keys, opts)
	if err != nil {
		return err
	}
	defer store.Close()
	if c.issue != "" {
		issued, err := store.Create(ctx, keystore.Spec{Name: c.issue})
		if err != nil {
			return err
		}
		fmt.Println(issued.Secret.Reveal())
		return store.Close()
	}
	if c.restore != "" {
		return errors.Join(restore(ctx, store, c.restore), store.Close())
	}
	return serveCalls(ctx, c, logger, store, opts)
}

// serveCalls serves calls until ctx ends, and then closes the store.
func serveCalls(
	ctx context.Context, c config, logger *slog.Logger, store *keystore.Store,
	opts *keystore.Options,
) error {
	server, checks, err := newServer(c, logger, store)
	if err != nil {
		return err
	}
	if c.health != "" {
		probed := grpc.NewServer()
		healthpb.RegisterHealthServer(probed, checks)
		lis, err := net.Listen("tcp", c.health)
		if err != nil {
			return err
		}
		go probed.Serve(lis)
		defer probed.Stop()
	}
	network, address := "tcp", c.listen
	if path, ok := strings.CutPrefix(c.listen, "unix:"); ok {
		network, address = "unix", path
	}
	lis, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	go interceptor.WatchHealth(ctx, checks, store)
	if c.backups != "" {
		go nightly(ctx, logger, func(ctx context.Context) error {
			return backUp(ctx, logger, store, opts, c.backups, 14)
		})
	}
	logger.Info("listening", "address", lis.Addr().String())

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

// newServer returns the server for callers, and the health service that answers health checks.
func newServer(
	c config, logger *slog.Logger, store *keystore.Store,
) (*grpc.Server, *health.Server, error) {
	authOpts := []interceptor.Option{
		interceptor.Public("/grpc.health.v1.Health/*"),
		interceptor.LogRefusals(logger),
	}
	var networks []netip.Prefix
	for _, text := range c.proxies {
		if text == "unix" {
			authOpts = append(authOpts, interceptor.TrustProxyTransport("x-forwarded-for", "unix"))
			continue
		}
		network, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, nil, fmt.Errorf("-proxy: %w", err)
		}
		networks = append(networks, network)
	}
	if len(networks) > 0 {
		authOpts = append(authOpts, interceptor.TrustProxy("x-forwarded-for", networks...))
	}
	serverOpts := []grpc.ServerOption{}
	if c.cert != "" {
		creds, err := credentials.NewServerTLSFromFile(c.cert, c.certKey)
		if err != nil {
			return nil, nil, err
		}
		serverOpts = append(serverOpts, grpc.Creds(creds))
		authOpts = append(authOpts, interceptor.RequireTLS())
	}
	auth, err := interceptor.New(store, authOpts...)
	if err != nil {
		return nil, nil, err
	}
	checks := health.NewServer()
	server := grpc.NewServer(append(serverOpts, auth.ServerOptions()...)...)
	testpb.RegisterTestServiceServer(server, service{})
	healthpb.RegisterHealthServer(server, checks)
	return server, checks, auth.Check(server)
}

// A service is a placeholder for your service.
type service struct {
	testpb.UnimplementedTestServiceServer
}

// UnaryCall returns the name of the key of the caller.
func (service) UnaryCall(
	ctx context.Context, _ *testpb.SimpleRequest,
) (*testpb.SimpleResponse, error) {
	key, ok := interceptor.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "no key in the context")
	}
	return &testpb.SimpleResponse{Username: key.Name}, nil
}

// FullDuplexCall answers each message with the payload of the message.
func (service) FullDuplexCall(
	stream testpb.TestService_FullDuplexCallServer,
) error {
	for {
		in, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		out := &testpb.StreamingOutputCallResponse{Payload: in.Payload}
		if err := stream.Send(out); err != nil {
			return err
		}
	}
}
