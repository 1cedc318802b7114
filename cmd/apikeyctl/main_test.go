//go:build unix

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// With runAsTool in the environment, the test binary is apikeyctl. So the tests run apikeyctl as a
// process, under the race detector too.
const runAsTool = "APIKEYCTL_TEST_RUN"

// With serveDir in the environment, the test binary is a server that a test can kill.
const serveDir = "APIKEYCTL_TEST_SERVE"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(runAsTool) != "":
		main()
	case os.Getenv(serveDir) != "":
		serveForever(os.Getenv(serveDir))
	}
	// With the race detector, each process would otherwise sleep for a second at its end.
	os.Setenv("GORACE", strings.TrimSpace(os.Getenv("GORACE")+" atexit_sleep_ms=0"))
	os.Exit(m.Run())
}

// serveForever serves the store in dir/keys on the socket dir/run/admin.sock.
func serveForever(dir string) {
	fatal := func(err error) {
		if err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
	}
	store, err := keystore.Open(filepath.Join(dir, "keys"), nil)
	fatal(err)
	srv, err := admin.New(store)
	fatal(err)
	fatal(srv.ServeUnix(context.Background(), filepath.Join(dir, socketPath)))
	os.Exit(0)
}

// socketPath is the path of the socket in the directory of a world.
const socketPath = "run/admin.sock"

// A world is a directory in which a test runs apikeyctl, with a server: on a unix socket, and over
// TLS for callers with a key.
type world struct {
	t     *testing.T
	dir   string
	keys  string   // the directory of the store, in dir
	made  []string // the IDs of the keys that create has made
	store *keystore.Store
	addr  string // of the server over TLS, whose certificate is in ca.pem
	env   []string
}

// newWorld returns a world without a server.
func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	self, err := os.Executable()
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "bin"), 0o700))
	require.NoError(t, os.Symlink(self, filepath.Join(dir, "bin", "apikeyctl")))
	w := &world{t: t, dir: dir, keys: "keys"}
	for _, entry := range os.Environ() {
		if !strings.HasPrefix(entry, "APIKEYCTL_") && !strings.HasPrefix(entry, "PATH=") {
			w.env = append(w.env, entry)
		}
	}
	w.env = append(w.env, runAsTool+"=1", "TZ=UTC", "GOTRACEBACK=all",
		"PATH="+filepath.Join(dir, "bin")+":"+os.Getenv("PATH"))
	return w
}

// startWorld returns a world with a server.
func startWorld(t *testing.T) *world {
	t.Helper()
	w := newWorld(t)
	w.open(nil)
	w.serve()
	return w
}

func (w *world) open(opts *keystore.Options) {
	w.t.Helper()
	if ^uint(0)>>63 == 0 {
		w.t.Skip("NOT RUN: a directory needs a 64-bit system")
	}
	store, err := keystore.Open(filepath.Join(w.dir, w.keys), opts)
	require.NoError(w.t, err)
	w.store = store
	w.t.Cleanup(func() { store.Close() })
}

// serve serves the store on the socket and over TLS until the end of the test.
func (w *world) serve() {
	w.t.Helper()
	w.env = append(w.env, "APIKEYCTL_SOCKET="+socketPath)
	srv, err := admin.New(w.store)
	require.NoError(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- srv.ServeUnix(ctx, filepath.Join(w.dir, socketPath)) }()
	w.t.Cleanup(func() {
		cancel()
		require.NoError(w.t, <-served)
		srv.Close()
	})
	w.waitForSocket()

	auth, err := interceptor.New(w.store, append(admin.Rules(), interceptor.RequireTLS())...)
	require.NoError(w.t, err)
	cert, pem, err := throwaway.Certificate()
	require.NoError(w.t, err)
	w.write("ca.pem", string(pem))
	server := grpc.NewServer(append(auth.ServerOptions(),
		grpc.Creds(credentials.NewServerTLSFromCert(&cert)))...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	srv.Register(server)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(w.t, err)
	w.addr = listener.Addr().String()
	go server.Serve(listener)
	w.t.Cleanup(server.Stop)
}

// waitForSocket waits until a process listens on the socket.
func (w *world) waitForSocket() {
	w.t.Helper()
	require.Eventually(w.t, func() bool {
		conn, err := net.Dial("unix", filepath.Join(w.dir, socketPath))
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, time.Minute, 5*time.Millisecond)
}

func (w *world) write(name, text string) {
	w.t.Helper()
	require.NoError(w.t, os.WriteFile(filepath.Join(w.dir, name), []byte(text), 0o600))
}

func (w *world) read(name string) string {
	w.t.Helper()
	text, err := os.ReadFile(filepath.Join(w.dir, name))
	require.NoError(w.t, err)
	return string(text)
}

// create makes a key in the store, and returns the key and its token.
func (w *world) create(spec keystore.Spec) (*keystore.Key, string) {
	w.t.Helper()
	issued, err := w.store.Create(w.t.Context(), spec)
	require.NoError(w.t, err)
	w.made = append(w.made, issued.Key.ID)
	return issued.Key, issued.Secret.Reveal()
}

// createMany makes n keys of an owner, many at a time.
func (w *world) createMany(n int, owner string) {
	w.t.Helper()
	var all sync.WaitGroup
	const creators = 64
	for i := range creators {
		all.Go(func() {
			for ; i < n; i += creators {
				_, err := w.store.Create(w.t.Context(),
					keystore.Spec{Name: fmt.Sprint("key", i), Owner: owner})
				if err != nil {
					w.t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	require.False(w.t, w.t.Failed())
}

// stream opens a stream with a token, and returns a function that waits for the end of the stream.
func (w *world) stream(token string) (end func() error) {
	w.t.Helper()
	roots, err := credentials.NewClientTLSFromFile(filepath.Join(w.dir, "ca.pem"), "")
	require.NoError(w.t, err)
	conn, err := grpc.NewClient(w.addr, grpc.WithTransportCredentials(roots),
		grpc.WithPerRPCCredentials(keycreds.New(token)))
	require.NoError(w.t, err)
	w.t.Cleanup(func() { conn.Close() })
	stream, err := healthpb.NewHealthClient(conn).Watch(w.t.Context(),
		new(healthpb.HealthCheckRequest))
	require.NoError(w.t, err)
	_, err = stream.Recv()
	require.NoError(w.t, err)
	return func() error {
		_, err := stream.Recv()
		return err
	}
}

// A result is the outcome of one run of apikeyctl.
type result struct {
	stdout, stderr string
	code           int
}

// command returns apikeyctl with arguments, in the directory of the world.
func (w *world) command(args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	w.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, filepath.Join(w.dir, "bin", "apikeyctl"), args...)
	cmd.Dir, cmd.Env = w.dir, w.env
	return cmd
}

// ctl runs apikeyctl without a terminal.
func (w *world) ctl(args ...string) result { return w.ctlIn("", args...) }

// ctlIn runs apikeyctl with a text on stdin.
func (w *world) ctlIn(stdin string, args ...string) result {
	w.t.Helper()
	cmd := w.command(args...)
	cmd.Stdin = strings.NewReader(stdin)
	return w.finish(cmd)
}

// finish runs a command to its end. It calls the functions as soon as the process has started.
func (w *world) finish(cmd *exec.Cmd, started ...func()) result {
	w.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(w.t, cmd.Start())
	for _, f := range started {
		f()
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, io.EOF) {
		require.NoError(w.t, err)
	}
	require.NotContains(w.t, stderr.String(), "goroutine ", "apikeyctl has panicked")
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}
