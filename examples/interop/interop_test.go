// Package interop_test starts examples/server as a separate process and calls the server from other
// gRPC clients: grpc-js, in client.mjs, and grpcurl. The tests download both clients, so the tests
// run only with INTEROP=1.
package interop_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/local"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const (
	grpcurlModule   = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4"
	unauthenticated = 16
)

func TestNode(t *testing.T) {
	needInterop(t)
	for _, program := range []string{"node", "npm"} {
		_, err := exec.LookPath(program)
		require.NoError(t, err, "INTEROP is set, and this test needs %s", program)
	}
	dir := t.TempDir() // so that npm installs nothing in the source tree
	for _, name := range []string{"client.mjs", "package.json", "health.proto", "status.proto"} {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), text, 0o644))
	}
	install := command(t, "npm", "install",
		"--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund")
	install.Dir = dir
	succeed(t, install)

	s := startServer(t)
	call := func(key string, mode ...string) *process {
		// Use the name, because Node warns about TLS with an IP address.
		address := strings.Replace(s.address, "127.0.0.1", "localhost", 1)
		args := append([]string{filepath.Join(dir, "client.mjs"), s.ca, address}, mode...)
		cmd := command(t, "node", args...)
		cmd.Env = append(cmd.Env, "API_KEY="+key, "no_grpc_proxy=localhost")
		return start(t, key, cmd)
	}
	serving := event{Event: "message", Status: "SERVING"}
	refused := func(reason string) event {
		return event{Event: "error", Code: unauthenticated, Reason: reason}
	}

	require.Equal(t, []event{serving}, events(t, call(s.key)))
	require.Equal(t, []event{refused("API_KEY_INVALID")}, events(t, call(foreignKey(t))))
	require.Equal(t, []event{refused("CREDENTIALS_MISSING")}, events(t, call("")))

	watch := call(s.key, "watch")
	require.Equal(t, serving, next[event](t, watch))
	notInProcessTable(t, watch)
	s.revoke(t)
	require.Equal(t, []event{refused("API_KEY_REVOKED"), {Event: "end"}}, events(t, watch))

	require.Equal(t, []event{refused("API_KEY_INVALID")}, events(t, call(s.key)))
}

func TestGrpcurl(t *testing.T) {
	needInterop(t)
	bin := t.TempDir()
	install := command(t, "go", "install", grpcurlModule)
	install.Env = append(install.Env, "GOBIN="+bin, "GOFLAGS=")
	succeed(t, install)

	s := startServer(t)
	// call makes a call with the reflection service of the server, which requires the key too.
	call := func(key, method string, flags ...string) *process {
		args := append([]string{"-cacert", s.ca, "-expand-headers"}, flags...)
		cmd := command(t, filepath.Join(bin, "grpcurl"), append(args, s.address, method)...)
		cmd.Env = append(cmd.Env, "API_KEY="+key)
		return start(t, key, cmd)
	}
	const (
		check  = "grpc.health.v1.Health/Check"
		watch  = "grpc.health.v1.Health/Watch"
		header = "authorization: Bearer ${API_KEY}" // grpcurl expands the variable
	)
	type reply struct{ Status string }
	serving := reply{"SERVING"}

	right := call(s.key, check, "-H", header)
	require.Equal(t, serving, next[reply](t, right))
	require.Zero(t, right.wait(t))

	wrong := call(foreignKey(t), check, "-H", header) // the call of reflection is refused
	require.NotZero(t, wrong.wait(t))
	require.Contains(t, wrong.stderr.String(), "Unauthenticated")

	wrong = call(foreignKey(t), check, "-H", header,
		"-proto", "health.proto", "-proto", "status.proto")
	require.NotZero(t, wrong.wait(t))
	require.Contains(t, wrong.stderr.String(), "Code: Unauthenticated")
	require.Contains(t, wrong.stderr.String(), `"reason": "API_KEY_INVALID"`)

	missing := call("", check, "-proto", "health.proto", "-proto", "status.proto")
	require.NotZero(t, missing.wait(t))
	require.Contains(t, missing.stderr.String(), `"reason": "CREDENTIALS_MISSING"`)

	// The revocation also ends the reflection stream, so grpcurl needs status.proto to decode an
	// ErrorInfo.
	stream := call(s.key, watch, "-H", header, "-use-reflection", "-proto", "status.proto")
	require.Equal(t, serving, next[reply](t, stream))
	notInProcessTable(t, stream)
	s.revoke(t)
	require.NotZero(t, stream.wait(t))
	require.Contains(t, stream.stderr.String(), "Code: Unauthenticated")
	require.Contains(t, stream.stderr.String(), `"reason": "API_KEY_REVOKED"`)
}

func needInterop(t *testing.T) {
	t.Helper()
	if os.Getenv("INTEROP") != "1" {
		t.Skip("NOT RUN: this test downloads grpcurl and npm packages. " +
			"Run it with: INTEROP=1 go test -count=1 -v ./examples/interop")
	}
}

// An event is a line of the output of client.mjs. The human-readable text is not compared.
type event struct {
	Event, Status, Reason string
	Code                  int
}

// foreignKey returns a key that is valid in another store.
func foreignKey(t *testing.T) string {
	t.Helper()
	store, err := keystore.Open(t.TempDir(), nil)
	require.NoError(t, err)
	issued, err := store.Create(t.Context(), keystore.Spec{Name: "foreign"})
	require.NoError(t, err)
	require.NoError(t, store.Close())
	return issued.Secret.Reveal()
}

// A server is a process of examples/server with one key.
type server struct {
	address, ca, name, key string

	keys adminpb.KeyServiceClient
}

func startServer(t *testing.T) *server {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "server.exe") // Windows needs the suffix
	succeed(t, command(t, "go", "build", "-o", program, "../server"))

	s := &server{ca: filepath.Join(dir, "server.pem")}
	socket := filepath.Join(socketDir(t), "admin.sock")
	p := start(t, "", command(t, program, "-addr", "127.0.0.1:0",
		"-dir", filepath.Join(dir, "keys"), "-socket", socket, "-ca", s.ca))
	output := bufio.NewScanner(p.stdout)
	for s.address == "" {
		require.True(t, output.Scan(), "the server ended")
		if address, ok := strings.CutPrefix(output.Text(), "listening on "); ok {
			s.address = address
		}
	}
	conn, err := grpc.NewClient("unix:"+socket,
		grpc.WithTransportCredentials(local.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	s.keys = adminpb.NewKeyServiceClient(conn)
	created, err := s.keys.CreateKey(t.Context(),
		&adminpb.CreateKeyRequest{Key: &adminpb.Key{DisplayName: "interop"}},
		grpc.WaitForReady(true)) // the socket may come a moment after the address
	require.NoError(t, err)
	s.name, s.key = created.Key.Name, created.Secret
	p.key = s.key
	return s
}

// socketDir returns a directory with a short path: the path of a socket has 107 bytes at most.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// revoke revokes the key.
func (s *server) revoke(t *testing.T) {
	t.Helper()
	_, err := s.keys.RevokeKey(t.Context(),
		&adminpb.RevokeKeyRequest{Name: s.name, Reason: "found in a log"})
	require.NoError(t, err)
}

// command returns a command that ends with the test, or shortly before the deadline of the test
// binary.
func command(t *testing.T, name string, args ...string) *exec.Cmd {
	t.Helper()
	ctx := t.Context()
	if deadline, ok := t.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline.Add(-15*time.Second))
		t.Cleanup(cancel)
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = os.Environ()
	cmd.WaitDelay = 5 * time.Second // child processes may keep the pipes open
	return cmd
}

// succeed runs a command that has no key, and requires that the command succeeds.
func succeed(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%v\n%s", cmd, out)
}

// A process is a running program that received a key in its environment, or that created a key.
type process struct {
	*exec.Cmd
	key    string
	stdout io.Reader
	values *json.Decoder // reads stdout
	stderr bytes.Buffer  // complete after wait
}

func start(t *testing.T, key string, cmd *exec.Cmd) *process {
	t.Helper()
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	p := &process{Cmd: cmd, key: key, stdout: stdout, values: json.NewDecoder(stdout)}
	cmd.Stderr = &p.stderr
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		// The context of the test has ended, so the process was killed.
		p.wait(t)
		if t.Failed() {
			t.Logf("standard error of %s:\n%s", filepath.Base(cmd.Path), &p.stderr)
		}
	})
	return p
}

// wait waits for the end of the process, and returns its exit code.
func (p *process) wait(t *testing.T) int {
	t.Helper()
	if p.ProcessState == nil {
		_, _ = io.Copy(io.Discard, p.stdout)
		_ = p.Wait()
	}
	if p.key != "" {
		// Use require.False here and below, because a failed require.NotContains would print the
		// key.
		require.False(t, strings.Contains(p.stderr.String(), p.key),
			"standard error contains the key")
	}
	return p.ProcessState.ExitCode()
}

// next returns the next JSON value that the process prints.
func next[T any](t *testing.T, p *process) T {
	t.Helper()
	var v T
	require.NoError(t, p.values.Decode(&v))
	return v
}

// events returns the remaining events of client.mjs.
func events(t *testing.T, p *process) (all []event) {
	t.Helper()
	for p.values.More() {
		all = append(all, next[event](t, p))
	}
	p.wait(t)
	return all
}

// notInProcessTable checks that the arguments of the running process do not contain the key.
func notInProcessTable(t *testing.T, p *process) {
	t.Helper()
	if runtime.GOOS != "linux" {
		return
	}
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p.Process.Pid))
	require.NoError(t, err)
	require.True(t, bytes.Contains(args, []byte(".pem")), "unexpected arguments of the process")
	require.False(t, bytes.Contains(args, []byte(p.key)), "the arguments contain the key")
}
