package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

// need returns the path of a program, or skips the test.
func need(t *testing.T, program, debian string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("NOT RUN: %s is not installed. Install Debian's package %s.", program, debian)
	}
	return path
}

// build compiles the program as it is deployed, without cgo.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "orders")
	cmd := exec.Command("go", "build", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return program
}

// A machine has the directories that systemd gives to the units.
type machine struct{ program, state, credentials, address string }

func newMachine(t *testing.T) machine {
	t.Helper()
	m := machine{build(t), filepath.Join(t.TempDir(), "state"), t.TempDir(), freeAddress(t)}
	require.NoError(t, os.MkdirAll(filepath.Join(m.state, "orders", "backups"), 0o700))
	const pepper = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n" // the pepper of this test
	require.NoError(t, os.WriteFile(filepath.Join(m.credentials, "pepper"), []byte(pepper), 0o400))
	return m
}

// command returns the arguments of ExecStart of a unit, with the directories of m.
func (m machine) command(t *testing.T, unit string) []string {
	t.Helper()
	text, err := os.ReadFile(unit)
	require.NoError(t, err)
	lines := strings.ReplaceAll(string(text), "\\\n", " ")
	exec := regexp.MustCompile(`(?m)^ExecStart=(.*)$`).FindStringSubmatch(lines)
	require.NotNil(t, exec, "%s has ExecStart", unit)
	args := strings.Fields(strings.NewReplacer("%S", m.state, "%d", m.credentials,
		"127.0.0.1:50051", m.address, "/usr/local/bin/orders", m.program).Replace(exec[1]))
	require.Equal(t, m.program, args[0])
	return args
}

// The test runs the commands of both units with the arguments of the units. The units must allow
// every system call of the program, and systemd must find no error in the units.
func TestSystemd(t *testing.T) {
	strace := need(t, "strace", "strace")
	analyze := need(t, "systemd-analyze", "systemd")
	m := newMachine(t)
	trace := filepath.Join(t.TempDir(), "trace")
	traced := func(unit string) *exec.Cmd {
		return exec.Command(strace,
			append([]string{"-f", "-qq", "-A", "-o", trace}, m.command(t, unit)...)...)
	}

	issue := traced("../systemd/orders-issue.service")
	key, err := issue.Output()
	require.NoError(t, err)
	var stderr bytes.Buffer
	serve := traced("../systemd/orders.service")
	serve.Stderr = &stderr
	require.NoError(t, serve.Start())
	conn, err := grpc.NewClient(m.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	defer conn.Close()
	reply, err := testpb.NewTestServiceClient(conn).UnaryCall(callContext(t),
		&testpb.SimpleRequest{},
		grpc.WaitForReady(true),
		grpc.PerRPCCredentials(keycreds.New(string(key), keycreds.AllowInsecure())))
	require.NoError(t, err)
	require.Equal(t, "admin", reply.Username)
	// strace does not pass SIGTERM on to the traced program.
	pids, err := exec.Command("pgrep", "-P", strconv.Itoa(serve.Process.Pid)).Output()
	require.NoError(t, err)
	require.NoError(t, exec.Command("kill", "-TERM", strings.TrimSpace(string(pids))).Run())
	require.NoError(t, serve.Wait(), "%s", &stderr)

	calls, err := os.ReadFile(trace)
	require.NoError(t, err)
	unit, err := os.ReadFile("../systemd/orders.service")
	require.NoError(t, err)
	allowed := map[string]bool{}
	filters := regexp.MustCompile(`(?m)^SystemCallFilter=(~?)(.*)$`)
	for _, filter := range filters.FindAllStringSubmatch(string(unit), -1) {
		for _, set := range strings.Fields(filter[2]) {
			for call := range systemCalls(t, analyze, set) {
				allowed[call] = filter[1] == ""
			}
		}
	}
	require.Greater(t, len(allowed), 200)
	made := regexp.MustCompile(`(?m)^\d+ +([a-z0-9_]+)\(`).FindAllSubmatch(calls, -1)
	require.NotEmpty(t, made)
	for _, call := range made {
		require.True(t, allowed[string(call[1])], "the unit forbids %s", call[1])
	}

	for _, unit := range []string{"orders.service", "orders-issue.service"} {
		file := filepath.Join(t.TempDir(), unit)
		text := edited(t, "../systemd/"+unit, "/usr/local/bin/orders", m.program)
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		out, err := exec.Command(analyze, "verify", "--man=no", file).CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Empty(t, string(out))
	}
	out, err := exec.Command(analyze, "security", "--offline=true", "--threshold=20",
		"../systemd/orders.service").CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// systemCalls returns the names in a set of system calls of systemd, nested sets included.
func systemCalls(t *testing.T, analyze, set string) map[string]bool {
	t.Helper()
	out, err := exec.Command(analyze, "--no-pager", "syscall-filter", set).Output()
	require.NoError(t, err)
	names := map[string]bool{}
	comments := regexp.MustCompile(`(?m)^ *#.*$`)
	for _, name := range strings.Fields(comments.ReplaceAllString(string(out), "")) {
		switch {
		case name == set:
		case strings.HasPrefix(name, "@"):
			for call := range systemCalls(t, analyze, name) {
				names[call] = true
			}
		default:
			names[name] = true
		}
	}
	return names
}
