package main

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// A process with the variable is the command, or one of the processes that the command starts.
func TestMain(m *testing.M) {
	if os.Getenv("REPLICAS") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// command returns the command, which writes below a directory of the test. The user of PostgreSQL
// can enter the directory.
func command(t *testing.T, engine string) (cmd *exec.Cmd, dir string, out *bytes.Buffer) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	dir, err = os.MkdirTemp("", "replicas")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	out = new(bytes.Buffer)
	cmd = exec.Command(self, "-engine="+engine)
	cmd.Env = append(os.Environ(), "REPLICAS=1", "TMPDIR="+dir)
	cmd.Stdout, cmd.Stderr = out, out
	return cmd, dir, out
}

// requireGone checks that no file and no process of the command is left. Each process of the
// command has the directory in its command line.
func requireGone(t *testing.T, dir string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, files)
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	require.NoError(t, err)
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err == nil {
			require.NotContains(t, string(line), dir, "%s runs still", path)
		}
	}
}

// onEngines runs a test on each engine.
func onEngines(t *testing.T, test func(t *testing.T, engine string)) {
	for engine := range engines {
		t.Run(engine, func(t *testing.T) { test(t, engine) })
	}
}

// skipWithout skips a test that has failed because the machine has no PostgreSQL.
func skipWithout(t *testing.T, err error, out *bytes.Buffer) {
	t.Helper()
	if err != nil && strings.Contains(out.String(), "PostgreSQL IS NOT INSTALLED") {
		t.Skip("NOT RUN: PostgreSQL IS NOT INSTALLED: install the Debian package postgresql")
	}
}

// The command shows what its comment promises, and leaves nothing behind. The command itself
// returns an error if a server admits a revoked key.
func TestReplicas(t *testing.T) { onEngines(t, testReplicas) }

func testReplicas(t *testing.T, engine string) {
	cmd, dir, out := command(t, engine)
	err := cmd.Run()
	skipWithout(t, err, out)
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
	for _, want := range []string{
		`server one has answered [1-9]\d*, two [1-9]\d*, three [1-9]\d*`,
		`(?s)(after Revoke had returned: 0 admitted, [1-9]\d* refused.*){2}`,
		`server three has answered: 0 admitted, `,
		`server three is back`,
	} {
		require.Regexp(t, regexp.MustCompile(want), out.String())
	}
	require.NotContains(t, out.String(), "oil_", "a key")
	requireGone(t, dir)
}

// A Ctrl-C while a server is stopped leaves nothing behind either.
func TestInterrupt(t *testing.T) { onEngines(t, testInterrupt) }

func testInterrupt(t *testing.T, engine string) {
	cmd, dir, failure := command(t, engine)
	cmd.Stdout = nil
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	stopped := false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.Contains(lines.Text(), "has stopped") {
			stopped = true
			require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
		}
	}
	err = cmd.Wait()
	skipWithout(t, err, failure)
	require.Error(t, err, "the command reports the end before its time")
	require.True(t, stopped, "%s", failure)
	require.Contains(t, failure.String(), "interrupt")
	requireGone(t, dir)
}

// Without PostgreSQL, the command ends, and says what to install.
func TestWithoutPostgreSQL(t *testing.T) {
	cmd, dir, out := command(t, "postgres")
	cmd.Env = append(cmd.Env, "PGLAB_BIN="+filepath.Join(dir, "missing"))
	require.Error(t, cmd.Run())
	require.Contains(t, out.String(), "PostgreSQL IS NOT INSTALLED: install")
	requireGone(t, dir)
}

// A user of etcdstore links neither the server of etcd nor the client of another engine.
func TestTheProgramLinksNoServer(t *testing.T) {
	list, err := exec.Command("go", "list", "-deps", "./orders").Output()
	require.NoError(t, err)
	deps := strings.Fields(string(list))
	require.Contains(t, deps, "go.etcd.io/etcd/client/v3")
	for _, dep := range deps {
		for _, never := range []string{
			"go.etcd.io/etcd/server/", "go.etcd.io/raft/", "go.etcd.io/bbolt", "github.com/jackc/",
		} {
			require.False(t, strings.HasPrefix(dep, never), "it depends on %s", dep)
		}
	}
}
