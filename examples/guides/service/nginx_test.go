package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// startService serves in the same way as the program.
func startService(t *testing.T, store *keystore.Store, c config) string {
	t.Helper()
	server, _, err := newServer(c, slog.New(slog.DiscardHandler), store)
	require.NoError(t, err)
	return serve(t, server)
}

// serve serves on a loopback port until the end of the test.
func serve(t *testing.T, server *grpc.Server) string {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		// A test that is skipped early stops the server before Serve begins.
		if err := <-served; !errors.Is(err, grpc.ErrServerStopped) {
			require.NoError(t, err)
		}
	})
	return lis.Addr().String()
}

// freeAddress returns a loopback address that no program listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	port, err := freeport.Port()
	require.NoError(t, err)
	return fmt.Sprint("127.0.0.1:", port)
}

// edited returns the text of a file with some pieces replaced. Each piece must occur exactly once.
func edited(t *testing.T, file string, oldNew ...string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	require.NoError(t, err)
	text := string(content)
	for i := 0; i < len(oldNew); i += 2 {
		require.Equal(t, 1, strings.Count(text, oldNew[i]), "%s has %q once", file, oldNew[i])
		text = strings.Replace(text, oldNew[i], oldNew[i+1], 1)
	}
	return text
}

// A proxy is a real nginx with the nginx.conf of the guide.
type proxy struct {
	address string
	tls     credentials.TransportCredentials
}

// startNginx starts nginx with the file of the guide. Only the ports, the paths and the pieces in
// edits differ.
func startNginx(t *testing.T, backend string, edits ...string) proxy {
	t.Helper()
	program, err := exec.LookPath("nginx")
	if err != nil {
		program, err = exec.LookPath("/usr/sbin/nginx")
	}
	if err != nil {
		t.Skip("NOT RUN: nginx is not installed. Install Debian's package nginx-light.")
	}
	dir := t.TempDir()
	cert, certPEM, err := throwaway.Certificate()
	require.NoError(t, err)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	require.NoError(t, err)
	certFile, keyFile := filepath.Join(dir, "orders.pem"), filepath.Join(dir, "orders.key")
	require.NoError(t, os.WriteFile(certFile, certPEM, 0o600))
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	require.NoError(t, os.WriteFile(keyFile, keyPEM, 0o600))

	address := freeAddress(t)
	conf := edited(t, "../nginx/nginx.conf", append([]string{
		"/etc/nginx/orders.pem", certFile,
		"/etc/nginx/orders.key", keyFile,
		"listen 443 ", "listen " + address + " ",
		"127.0.0.1:50051", backend,
	}, edits...)...)
	confFile := filepath.Join(dir, "nginx.conf")
	require.NoError(t, os.WriteFile(confFile, []byte(conf), 0o600))
	var stderr bytes.Buffer
	cmd := exec.Command(program, "-p", dir, "-c", confFile, "-e", "stderr", "-g",
		"daemon off; pid "+dir+"/pid; error_log stderr warn;")
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		require.NoError(t, cmd.Process.Signal(os.Interrupt))
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("nginx said:\n%s", &stderr)
		}
	})
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(certPEM))
	return proxy{address, credentials.NewTLS(&tls.Config{RootCAs: roots})}
}

// client returns a client that calls through the proxy, from the given loopback address.
func (p proxy) client(t *testing.T, from string) testpb.TestServiceClient {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := grpc.NewClient("passthrough:"+p.address, grpc.WithTransportCredentials(p.tls),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			return dialer.DialContext(ctx, "tcp", address)
		}))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	return testpb.NewTestServiceClient(conn)
}

func reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return ""
}

func message(size int) *testpb.StreamingOutputCallRequest {
	return &testpb.StreamingOutputCallRequest{Payload: &testpb.Payload{Body: make([]byte, size)}}
}

func callContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestNginx(t *testing.T) {
	store := keystoretest.New(t, nil)
	backend := startService(t, store, config{proxies: list{"127.0.0.1/32"}})
	nginx := startNginx(t, backend)
	client, ctx := nginx.client(t, "127.0.0.2"), callContext(t)
	ready := grpc.WaitForReady(true)
	issue := func(spec keystore.Spec) (string, grpc.CallOption) {
		issued := keystoretest.MustCreate(t, store, spec)
		return issued.Key.ID, grpc.PerRPCCredentials(keycreds.New(issued.Secret.Reveal()))
	}

	id, key := issue(keystore.Spec{Name: "customer"})
	reply, err := client.UnaryCall(ctx, &testpb.SimpleRequest{}, key, ready)
	require.NoError(t, err)
	require.Equal(t, "customer", reply.Username)
	_, err = client.UnaryCall(ctx, &testpb.SimpleRequest{})
	require.Equal(t, codes.Unauthenticated, status.Code(err))
	require.Equal(t, "CREDENTIALS_MISSING", reason(err))

	// The address of the caller counts, and not the address in a header from the caller.
	_, bound := issue(
		keystore.Spec{AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}})
	_, err = client.UnaryCall(ctx, &testpb.SimpleRequest{}, bound)
	require.NoError(t, err)
	liar := metadata.AppendToOutgoingContext(ctx, "x-forwarded-for", "127.0.0.2")
	_, err = nginx.client(t, "127.0.0.3").UnaryCall(liar, &testpb.SimpleRequest{}, bound, ready)
	require.Equal(t, "API_KEY_INVALID", reason(err))

	// A stream carries more data than client_max_body_size would allow. A revocation ends the
	// stream while neither side sends.
	stream, err := client.FullDuplexCall(ctx, key)
	require.NoError(t, err)
	for range 8 {
		require.NoError(t, stream.Send(message(1<<20)))
		_, err := stream.Recv()
		require.NoError(t, err)
	}
	require.NoError(t, store.Revoke(ctx, id, "leaked"))
	_, err = stream.Recv()
	require.Equal(t, codes.Unauthenticated, status.Code(err), "%v", err)
	require.Equal(t, "API_KEY_REVOKED", reason(err))
}

// nginx connects to a unix socket in a directory that only the user of both programs may enter. The
// service trusts nginx, and so knows the address of the caller.
func TestNginxOnUnixSocket(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Chmod(dir, 0o700))
	socket := "unix:" + filepath.Join(dir, "orders.sock")
	c := config{listen: socket, proxies: list{"unix"}, drain: time.Millisecond}
	store := keystoretest.New(t, nil)
	ctx, terminate := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serveCalls(ctx, c, slog.New(slog.DiscardHandler), store, nil) }()
	t.Cleanup(func() {
		terminate()
		require.NoError(t, <-ended)
	})
	issued := keystoretest.MustCreate(t, store, keystore.Spec{Name: "customer",
		AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}})
	key, ready := grpc.PerRPCCredentials(keycreds.New(issued.Secret.Reveal())),
		grpc.WaitForReady(true)

	owned := startNginx(t, socket, "worker_processes auto;", "worker_processes auto; user root;")
	call := func(ctx context.Context, through proxy, from string) (*testpb.SimpleResponse, error) {
		return through.client(t, from).UnaryCall(ctx, &testpb.SimpleRequest{}, key, ready)
	}
	reply, err := call(callContext(t), owned, "127.0.0.2")
	require.NoError(t, err)
	require.Equal(t, "customer", reply.Username)
	liar := metadata.AppendToOutgoingContext(callContext(t), "x-forwarded-for", "127.0.0.2")
	_, err = call(liar, owned, "127.0.0.3")
	require.Equal(t, "API_KEY_INVALID", reason(err), "%v", err)

	if os.Getuid() != 0 {
		t.Skip("NOT RUN: only root can start an nginx whose workers are another user's")
	}
	_, err = call(callContext(t), startNginx(t, socket), "127.0.0.2")
	require.Equal(t, codes.Unavailable, status.Code(err), "another user may not enter: %v", err)
	require.ErrorContains(t, err, "502")
}

// For each line of the configuration, the page describes the failure of callers without the line.
func TestNginxLines(t *testing.T) {
	for _, tt := range []struct {
		name     string
		old, new string
		check    func(t *testing.T, client testpb.TestServiceClient, key grpc.CallOption)
	}{
		{"X-Forwarded-For", "grpc_set_header X-Forwarded-For $remote_addr;", "",
			func(t *testing.T, client testpb.TestServiceClient, key grpc.CallOption) {
				_, err := client.UnaryCall(callContext(t), &testpb.SimpleRequest{}, key,
					grpc.WaitForReady(true))
				require.Equal(t, "API_KEY_INVALID", reason(err), "%v", err)
			}},
		{"client_max_body_size", "client_max_body_size 0;", "",
			func(t *testing.T, client testpb.TestServiceClient, key grpc.CallOption) {
				stream, err := client.FullDuplexCall(callContext(t), key, grpc.WaitForReady(true))
				require.NoError(t, err)
				for range 8 {
					if err == nil {
						err = stream.Send(message(1 << 20))
					}
				}
				for err == nil || err == io.EOF {
					_, err = stream.Recv()
				}
				require.Equal(t, codes.Unknown, status.Code(err))
				require.ErrorContains(t, err, "413")
			}},
		{"client_body_timeout", "client_body_timeout 1d;", "client_body_timeout 1s;", quiet},
		{"grpc_read_timeout", "grpc_read_timeout 1d;", "grpc_read_timeout 1s;", quiet},
	} {
		t.Run(tt.name, func(t *testing.T) {
			store := keystoretest.New(t, nil)
			backend := startService(t, store, config{proxies: list{"127.0.0.1/32"}})
			nginx := startNginx(t, backend, tt.old, tt.new)
			issued := keystoretest.MustCreate(t, store, keystore.Spec{
				AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}})
			tt.check(t, nginx.client(t, "127.0.0.2"),
				grpc.PerRPCCredentials(keycreds.New(issued.Secret.Reveal())))
		})
	}
}

// quiet opens a stream and waits: nginx ends the stream.
func quiet(t *testing.T, client testpb.TestServiceClient, key grpc.CallOption) {
	stream, err := client.FullDuplexCall(callContext(t), key, grpc.WaitForReady(true))
	require.NoError(t, err)
	_ = stream.Send(message(1)) // on a slow machine, nginx may have ended the stream already
	for err == nil {
		_, err = stream.Recv()
	}
	require.Equal(t, codes.Internal, status.Code(err), "%v", err)
	require.ErrorContains(t, err, "RST_STREAM")
}

// The page describes a service that does not run, and a header that nginx drops.
func TestNginxTraps(t *testing.T) {
	client := startNginx(t, freeAddress(t)).client(t, "127.0.0.2")
	_, err := client.UnaryCall(callContext(t), &testpb.SimpleRequest{}, grpc.WaitForReady(true))
	require.Equal(t, codes.Unavailable, status.Code(err))
	require.ErrorContains(t, err, "502")

	store := keystoretest.New(t, nil)
	auth, err := interceptor.New(store, interceptor.Header("api_key", ""))
	require.NoError(t, err)
	server := grpc.NewServer(auth.ServerOptions()...)
	testpb.RegisterTestServiceServer(server, service{})
	client = startNginx(t, serve(t, server)).client(t, "127.0.0.2")
	key := keycreds.New(keystoretest.MustCreate(t, store, keystore.Spec{}).Secret.Reveal(),
		keycreds.WithHeader("api_key", ""))
	_, err = client.UnaryCall(callContext(t), &testpb.SimpleRequest{}, grpc.PerRPCCredentials(key),
		grpc.WaitForReady(true))
	require.Equal(t, "CREDENTIALS_MISSING", reason(err), "%v", err)
}
