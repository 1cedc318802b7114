package admin_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var localCreds = grpc.WithTransportCredentials(local.NewCredentials())

func needsDirectory(t testing.TB) {
	t.Helper()
	if bits.UintSize < 64 {
		t.Skip("SKIPPED: a 32-bit system has no store in a directory")
	}
}

func init() {
	children["serve"] = serveChild
	children["call"] = callChild
}

// serveChild serves the store of a directory on a socket and over TLS, until the standard input
// ends, with every kind of logging, to the standard error.
func serveChild() error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	store, err := keystore.Open(os.Getenv("ADMIN_TEST_DIR"), &keystore.Options{Logger: log})
	if err != nil {
		return err
	}
	defer store.Close()
	srv, err := admin.New(store, admin.Logger(log))
	if err != nil {
		return err
	}
	auth, err := interceptor.New(store, append(admin.Rules(), interceptor.LogRefusals(log))...)
	if err != nil {
		return err
	}
	socket := os.Getenv("ADMIN_TEST_SOCKET")
	cert, pem, err := throwaway.Certificate()
	if err == nil {
		err = os.WriteFile(socket+".pem", pem, 0o600)
	}
	if err != nil {
		return err
	}
	server := grpc.NewServer(append(auth.ServerOptions(),
		grpc.Creds(credentials.NewServerTLSFromCert(&cert)),
		grpc.ChainUnaryInterceptor(func(
			ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
		) (any, error) {
			reply, err := handler(ctx, req)
			if !slices.Contains(admin.SecretMethods(), info.FullMethod) {
				log.DebugContext(ctx, "payload", "request", fmt.Sprint(req),
					"reply", fmt.Sprint(reply))
			}
			log.DebugContext(ctx, "call", "context", fmt.Sprintf("%+v", ctx), "error", err)
			return reply, err
		}))...)
	srv.Register(server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	go server.Serve(listener)
	defer server.Stop()
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.ServeUnix(ctx, socket) }()
	fmt.Println(listener.Addr())
	_, _ = io.Copy(io.Discard, os.Stdin)
	stop()
	return <-served
}

// callChild calls GetStats on a socket, and prints the code and the text of the status.
func callChild() error {
	conn, err := grpc.NewClient("unix:"+os.Getenv("ADMIN_TEST_SOCKET"), localCreds)
	if err != nil {
		return err
	}
	defer conn.Close()
	c := adminpb.NewKeyServiceClient(conn)
	_, err = c.CreateKey(context.Background(),
		&adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "by a child"}})
	return json.NewEncoder(os.Stdout).Encode(outcome{
		os.Getuid(), status.Code(err).String(), status.Convert(err).Message()})
}

// An outcome is what callChild prints.
type outcome struct {
	UID        int
	Code, Text string
}

// A child is a process of this test binary that runs serveChild.
type child struct {
	cmd          *exec.Cmd
	socket, addr string
	roots        *x509.CertPool
	stdin        io.Closer
	stderr       bytes.Buffer // complete after wait
}

// startServer starts a child that serves the store of the directory, on a socket in another
// directory.
func startServer(t *testing.T, dir, socketDir string, env ...string) *child {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	c := &child{socket: filepath.Join(socketDir, "admin.sock"), cmd: exec.Command(exe)}
	c.cmd.Env = append(os.Environ(), "ADMIN_TEST_CHILD=serve", "ADMIN_TEST_DIR="+dir,
		"ADMIN_TEST_SOCKET="+c.socket)
	c.cmd.Env = append(c.cmd.Env, env...)
	c.cmd.Stderr = &c.stderr
	c.stdin, err = c.cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := c.cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, c.cmd.Start())
	t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		c.wait(t)
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		c.wait(t)
		t.Fatalf("the server did not start: %s", &c.stderr)
	}
	c.addr = strings.TrimSpace(line)
	awaitSocket(t, c.socket)
	pem, err := os.ReadFile(c.socket + ".pem")
	require.NoError(t, err)
	c.roots = x509.NewCertPool()
	require.True(t, c.roots.AppendCertsFromPEM(pem))
	return c
}

// stop stops the child in good order.
func (c *child) stop(t *testing.T) {
	t.Helper()
	c.stdin.Close()
	c.wait(t)
	require.True(t, c.cmd.ProcessState.Success(), "%s", &c.stderr)
	_, err := os.Lstat(c.socket)
	require.ErrorIs(t, err, os.ErrNotExist, "the socket is removed")
}

func (c *child) wait(t *testing.T) {
	t.Helper()
	if c.cmd.ProcessState == nil {
		_ = c.cmd.Wait()
	}
}
