package browsertest

import (
	"context"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
)

// A world is a store with its console, and with a gRPC server that admits the keys of the store.
type world struct {
	t     *testing.T
	store *keystore.Store
	base  string // the URL of the console
	addr  string // of the gRPC server
	roots credentials.TransportCredentials
}

func newWorld(t *testing.T) *world {
	t.Helper()
	store, err := keystore.Open(t.TempDir(), nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	w := &world{t: t, store: store}

	auth, err := interceptor.New(store, interceptor.RequireTLS())
	require.NoError(t, err)
	cert, pem, err := throwaway.Certificate()
	require.NoError(t, err)
	trusted := x509.NewCertPool()
	require.True(t, trusted.AppendCertsFromPEM(pem))
	w.roots = credentials.NewClientTLSFromCert(trusted, "")
	server := grpc.NewServer(append(auth.ServerOptions(),
		grpc.Creds(credentials.NewServerTLSFromCert(&cert)))...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w.addr = listener.Addr().String()
	go server.Serve(listener)
	t.Cleanup(server.Stop)

	c, err := console.New(store, console.Title("Orders, production"))
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.Handle("/keys/", http.StripPrefix("/keys", c))
	web := httptest.NewServer(mux)
	t.Cleanup(func() { c.Close(); web.Close() })
	w.base = web.URL + "/keys/"
	return w
}

// secrets finds the secrets of keys. No output of a test may have a secret.
var secrets = regexp.MustCompile(`oil_[0-9a-z]{26}_[0-9A-Za-z]+`)

// create makes a key, and returns the key and its text.
func (w *world) create(spec keystore.Spec) (*keystore.Key, string) {
	w.t.Helper()
	issued, err := w.store.Create(context.Background(), spec)
	require.NoError(w.t, err)
	return issued.Key, issued.Secret.Reveal()
}

// stream opens a stream with a key, and returns a function that waits for the end of the stream.
func (w *world) stream(token string) (end func() error) {
	w.t.Helper()
	return openStream(w.t, w.addr, w.roots, token)
}

func openStream(
	t *testing.T, addr string, roots credentials.TransportCredentials, token string,
) (end func() error) {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(roots),
		grpc.WithPerRPCCredentials(keycreds.New(token)))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	stream, err := healthpb.NewHealthClient(conn).Watch(t.Context(),
		new(healthpb.HealthCheckRequest))
	require.NoError(t, err)
	_, err = stream.Recv()
	require.NoError(t, err)
	return func() error {
		_, err := stream.Recv()
		return err
	}
}
