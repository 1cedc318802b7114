//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// count returns the number of keys with a status.
func (w *world) count(s keystore.Status) (n int) {
	w.t.Helper()
	for key, err := range w.store.List(w.t.Context(), keystore.Query{}) {
		require.NoError(w.t, err)
		if key.Status() == s {
			n++
		}
	}
	return n
}

// The walk of the README: a key is made and used, watch sees the changes, and revoke ends the
// streams of the key, says how many, and is in the events with the user.
func TestRevokeEndsTheStreams(t *testing.T) {
	w := startWorld(t)
	watch := w.command("watch", "-o", "jsonl")
	out, err := watch.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, watch.Start())
	lines := bufio.NewReader(out)
	// A watch begins at the time of its call: make keys until watch has seen one.
	seen := make(chan event)
	go func() {
		defer close(seen)
		for {
			line, err := lines.ReadString('\n')
			var e event
			if err != nil || json.Unmarshal([]byte(line), &e) != nil {
				return
			}
			seen <- e
		}
	}()
	for started := false; !started; {
		w.create(keystore.Spec{Name: "probe"})
		select {
		case <-seen:
			started = true
		case <-time.After(50 * time.Millisecond):
		}
	}
	made := w.ctl("create", "--name", "billing", "-o", "json")
	require.Zero(t, made.code, made.stderr)
	var k issuedKey
	require.NoError(t, json.Unmarshal([]byte(made.stdout), &k))
	var ends []func() error
	for range 3 {
		ends = append(ends, w.stream(k.Secret))
	}
	revoked := w.ctl("revoke", k.ID, "--reason", "leaked")
	require.Equal(t, fmt.Sprintf("revoked %s (billing): 3 streams ended\n", k.ID), revoked.stdout)
	for _, end := range ends {
		require.Equal(t, codes.Unauthenticated, status.Code(end()))
	}
	var actions []string
	for e := range seen {
		if e.KeyID == k.ID {
			actions = append(actions, e.Action)
		}
		if e.Action == "revoke" {
			require.Equal(t, "leaked", e.Reason)
			require.Regexp(t, `^unix:.*\d`, e.Actor)
			break
		}
	}
	require.Equal(t, []string{"create", "revoke"}, actions)
	require.NoError(t, watch.Process.Signal(os.Interrupt))
	for range seen {
	}
	_ = watch.Wait()
	require.Equal(t, exitInterrupted, watch.ProcessState.ExitCode())
}

// The exit codes that the help lists.
func TestExitCodes(t *testing.T) {
	w := startWorld(t)
	key, _ := w.create(keystore.Spec{Name: "ci"})
	_, reader := w.create(keystore.Spec{Name: "reader", Scopes: []string{"keys:read"}})
	w.write("reader.key", reader)
	remote := []string{"--addr", strings.Replace(w.addr, "127.0.0.1", "localhost", 1), "--ca", "ca.pem",
		"--key-file", "reader.key"}
	for _, tt := range []struct {
		code int
		args []string
	}{
		{0, []string{"list"}},
		{0, append(remote, "list")},
		{exitUsage, []string{"lst"}},
		{exitServer, []string{"--socket", "missing", "list"}},
		{exitNotFound, []string{"get", shownIDs[0]}},
		{exitDenied, append(remote, "revoke", key.ID, "--reason", "x")},
		{exitElsewhere, []string{"--dir", "keys", "list"}},
		{exitConflict, []string{"update", key.ID, "--etag", "99", "--owner", "x"}},
	} {
		r := w.ctl(tt.args...)
		require.Equal(t, tt.code, r.code, "%v: %s", tt.args, r.stderr)
		r = w.ctl(append(slices.Clone(tt.args), "-o", "json")...)
		require.Equal(t, tt.code, r.code, tt.args)
		if tt.code == 0 {
			continue
		}
		var f struct {
			Error struct{ Code, Reason, Message string }
		}
		require.NoError(t, json.Unmarshal([]byte(r.stderr), &f), r.stderr)
		require.NotEmpty(t, f.Error.Code)
		require.NotEmpty(t, f.Error.Reason)
		require.NotEmpty(t, f.Error.Message)
		require.NotContains(t, r.stderr, "deadline exceeded")
	}
}

// A server over TLS: the certificate, the key and its scope each have a sentence.
func TestServerOverTLS(t *testing.T) {
	w := startWorld(t)
	addr := strings.Replace(w.addr, "127.0.0.1", "localhost", 1)
	admin, token := w.create(keystore.Spec{Name: "admin", Scopes: []string{"keys:admin"}})
	w.write("admin.key", token+"\n")
	w.write("bad.key", token[:len(token)-8])

	r := w.ctl("--addr", addr, "--ca", "ca.pem", "--key-file", "admin.key", "create", "--name", "x")
	require.Zero(t, r.code, r.stderr)
	r = w.ctl("events", "--newest", "--limit", "1", "-o", "jsonl")
	require.Contains(t, r.stdout, `"actor":"key:`+admin.ID+`"`)

	r = w.ctl("--addr", addr, "--key-file", "admin.key", "list")
	require.Equal(t, exitServer, r.code)
	require.Contains(t, r.stderr, "is not trusted")
	require.Contains(t, r.stderr, "give --ca FILE")

	r = w.ctl("--addr", addr, "--ca", "ca.pem", "--key-file", "bad.key", "list")
	require.Equal(t, exitDenied, r.code)
	require.Contains(t, r.stderr, "look at the key in APIKEYCTL_KEY, or in the file of --key-file")

	require.NoError(t, w.store.Revoke(t.Context(), admin.ID, "x"))
	r = w.ctl("--addr", addr, "--ca", "ca.pem", "--key-file", "admin.key", "list")
	require.Equal(t, exitDenied, r.code)

	plain, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer plain.Close()
	go func() {
		for {
			conn, err := plain.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, "220 mail.example.com ESMTP\r\n")
			conn.Close()
		}
	}()
	r = w.ctl("--addr", plain.Addr().String(), "--key-file", "admin.key", "list")
	require.Equal(t, exitServer, r.code)
	require.Contains(t, r.stderr, "does not speak TLS, so the key is not sent")
}

// Each state of a socket has its sentence.
func TestSockets(t *testing.T) {
	w := newWorld(t)
	w.env = append(w.env, "APIKEYCTL_SOCKET=s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(w.dir, "s"), Net: "unix"})
	require.NoError(t, err)
	stale.SetUnlinkOnClose(false)
	require.NoError(t, stale.Close())
	r := w.ctl("list")
	require.Equal(t, exitServer, r.code)
	require.Equal(t, "apikeyctl: no process listens on the socket s, so its server has ended: "+
		"start the server\n", r.stderr)

	// A server that accepts, and never answers.
	require.NoError(t, os.Remove(filepath.Join(w.dir, "s")))
	mute, err := net.Listen("unix", filepath.Join(w.dir, "s"))
	require.NoError(t, err)
	defer mute.Close()
	r = w.ctl("list", "--timeout", "300ms")
	require.Equal(t, exitServer, r.code)
	require.Contains(t, r.stderr, "no answer from the server at s within 300ms")
	require.NotContains(t, r.stderr, "deadline")
}

// Another user may not use the socket, and reads whose it is.
func TestSocketOfAnotherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("NOT RUN: only root can become another user")
	}
	w := newWorld(t)
	w.open(nil)
	srv, err := admin.New(w.store)
	require.NoError(t, err)
	// /tmp, because the other user cannot enter the directories of the test.
	dir, err := os.MkdirTemp("/tmp", "apikeyctl-test-")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	require.NoError(t, err)
	text, err := os.ReadFile(self)
	require.NoError(t, err)
	tool := filepath.Join(dir, "apikeyctl")
	require.NoError(t, os.WriteFile(tool, text, 0o755))
	require.NoError(t, os.Chmod(dir, 0o755))
	for _, tt := range []struct {
		name string
		mode os.FileMode
	}{{"mode", 0o600}, {"credentials", 0o666}} {
		path := filepath.Join(dir, tt.name)
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- srv.ServeUnix(ctx, path, admin.SocketMode(tt.mode)) }()
		require.Eventually(t, func() bool {
			conn, err := net.Dial("unix", path)
			if err == nil {
				conn.Close()
			}
			return err == nil
		}, time.Minute, 5*time.Millisecond)
		cmd := exec.Command(tool, "--socket", path, "list")
		cmd.Dir, cmd.Env = dir, w.env
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		r := w.finish(cmd)
		require.Equal(t, exitDenied, r.code, "%s: %s", tt.name, r.stderr)
		require.Contains(t, r.stderr, fmt.Sprintf("its socket is for root (0), mode %04o", tt.mode))
		require.Contains(t, r.stderr, "Run apikeyctl as this user or as root")
		cancel()
		require.NoError(t, <-served)
	}
}

// If a secret cannot be written, the failure names the key and what to do.
func TestSecretIsNotLostSilently(t *testing.T) {
	w := startWorld(t)
	// A reader that has gone.
	cmd := w.command("create", "--name", "pipe")
	r, pipe, err := os.Pipe()
	require.NoError(t, err)
	require.NoError(t, r.Close())
	cmd.Stdout = pipe
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	_ = cmd.Run()
	pipe.Close()
	require.Equal(t, exitUsage, cmd.ProcessState.ExitCode())
	require.Regexp(t, `is made, but its secret could not be written: .*apikeyctl rotate 01`,
		stderr.String())

	// A full disk.
	if full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0); err == nil {
		defer full.Close()
		cmd = w.command("create", "--name", "full")
		cmd.Stdout = full
		stderr.Reset()
		cmd.Stderr = &stderr
		_ = cmd.Run()
		require.Equal(t, exitUsage, cmd.ProcessState.ExitCode())
		require.Contains(t, stderr.String(), "no space left on device")
	}

	// A closed stdout: the Go runtime opens the null device in its place.
	shell := newShell(w)
	before := w.count(keystore.StatusActive)
	out, code := shell.run("apikeyctl create --name closed >&-")
	require.Equal(t, exitUsage, code)
	require.Contains(t, out, "give --out FILE")
	require.Equal(t, before, w.count(keystore.StatusActive), "no key was made")

	// The reader of a list may go early.
	out, code = shell.run("apikeyctl list -o jsonl | head -1 | wc -l")
	require.Zero(t, code)
	require.Equal(t, "1", strings.TrimSpace(out))

	// If the server refuses, no file is left.
	refused := w.ctl("create", "--name", "x", "--expires", "2001-01-01", "--out", "left.key")
	require.Equal(t, exitUsage, refused.code)
	require.NoFileExists(t, filepath.Join(w.dir, "left.key"))
	require.Equal(t, exitUsage, w.ctl("restore", "ca.pem", "--yes").code)
}

// If a server is killed, watch connects again to the next, misses no change and repeats none.
func TestWatchAcrossServers(t *testing.T) {
	w := newWorld(t)
	w.env = append(w.env, "APIKEYCTL_SOCKET="+socketPath)
	kill := w.startServer()
	watch := w.command("watch", "--after", "0", "-o", "jsonl")
	out, err := watch.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, watch.Start())
	lines := bufio.NewReader(out)
	var want []string
	for round := range 3 {
		if round > 0 {
			kill()
			kill = w.startServer()
		}
		for range 5 {
			r := w.ctl("create", "--name", "x", "--out", fmt.Sprintf("%d.key", len(want)), "-q")
			require.Zero(t, r.code, r.stderr)
			want = append(want, strings.TrimSpace(r.stdout))
		}
		for i := round * 5; i < len(want); i++ {
			line, err := lines.ReadString('\n')
			require.NoError(t, err)
			var e event
			require.NoError(t, json.Unmarshal([]byte(line), &e))
			require.Equal(t, want[i], e.KeyID)
		}
	}
	require.NoError(t, watch.Process.Signal(os.Interrupt))
	_ = watch.Wait()
	require.Equal(t, exitInterrupted, watch.ProcessState.ExitCode())
}

// startServer starts a process that serves the store in keys, and returns a function that kills it.
func (w *world) startServer() (kill func()) {
	w.t.Helper()
	self, err := os.Executable()
	require.NoError(w.t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), serveDir+"="+w.dir)
	cmd.Stderr = os.Stderr
	require.NoError(w.t, cmd.Start())
	kill = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	w.t.Cleanup(kill)
	w.waitForSocket()
	return kill
}

// If apikeyctl or the server is killed in the middle of a bulk revocation, the same command revokes
// the rest.
func TestKillInTheMiddleOfRevokeAll(t *testing.T) {
	for victim, keys := range map[string]int{
		"apikeyctl": 3000,
		"server":    5000, // more than apikeyctl learns of while nobody reads its output
	} {
		t.Run(victim, func(t *testing.T) {
			w := newWorld(t)
			w.env = append(w.env, "APIKEYCTL_SOCKET="+socketPath)
			w.open(nil)
			w.createMany(keys, "acme")
			require.NoError(t, w.store.Close())
			kill := w.startServer()
			args := []string{"revoke-all", "--owner", "acme", "--reason", "x", "--yes", "--expect",
				fmt.Sprint(keys), "-q"}
			cmd := w.command(args...)
			out, err := cmd.StdoutPipe()
			require.NoError(t, err)
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			require.NoError(t, cmd.Start())
			_, err = bufio.NewReaderSize(out, 16).ReadString('\n') // the first key is revoked
			require.NoError(t, err)
			if victim == "server" {
				kill()
				go func() { _, _ = bufio.NewReader(out).WriteTo(&bytes.Buffer{}) }()
				_ = cmd.Wait()
				require.Equal(t, exitServer, cmd.ProcessState.ExitCode(), stderr.String())
				require.Regexp(t, `\d+ of 5000 keys were revoked: run the same command again`,
					stderr.String())
				w.startServer()
			} else {
				require.NoError(t, cmd.Process.Kill())
				_ = cmd.Wait()
			}
			r := w.ctl("revoke-all", "--owner", "acme", "--reason", "x", "--yes", "--expect",
				fmt.Sprint(keys))
			require.Zero(t, r.code, r.stderr)
			r = w.ctl("list", "--state", "revoked", "-q")
			require.Equal(t, keys, strings.Count(r.stdout, "\n"))
		})
	}
}

// An interrupt in the middle of a bulk revocation says how many keys were revoked.
func TestInterruptInTheMiddleOfRevokeAll(t *testing.T) {
	w := startWorld(t)
	const keys = 8000 // more than are revoked while nobody reads the output
	w.createMany(keys, "")
	cmd := w.command("revoke-all", "--all", "--reason", "x", "--yes", "--expect", fmt.Sprint(keys),
		"-q")
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	require.NoError(t, cmd.Start())
	lines := bufio.NewReader(out)
	_, err = lines.ReadString('\n')
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	_, _ = lines.WriteTo(&bytes.Buffer{})
	_ = cmd.Wait()
	require.Equal(t, exitInterrupted, cmd.ProcessState.ExitCode(), stderr.String())
	require.Regexp(t, `interrupted: \d+ of 8000 keys were revoked: run the same command again`,
		stderr.String())
	r := w.ctl("revoke-all", "--all", "--reason", "x", "--yes", "--expect", fmt.Sprint(keys))
	require.Zero(t, r.code, r.stderr)
	require.Equal(t, keys, w.count(keystore.StatusRevoked))
}

// No output of a hostile run has a secret, whatever argument or flag the secret is in.
func TestSecretsInTheWrongPlace(t *testing.T) {
	w := startWorld(t)
	key, token := w.create(keystore.Spec{Name: "ci"})
	secret := token[strings.LastIndexByte(token, '_')+1:]
	var runs [][]string
	for _, cmd := range newCommand().Commands {
		namesFile := strings.HasPrefix(cmd.ArgsUsage, "FILE") // as the user has chosen
		if !namesFile {
			runs = append(runs, []string{cmd.Name, token})
		}
		runs = append(runs, []string{cmd.Name, "--" + token},
			[]string{cmd.Name, key.ID, token, "--reason", "x"})
		for _, flag := range slices.Concat(cmd.Flags, newCommand().Flags) {
			name := flag.Names()[0]
			// These keep or look for a text that the user has chosen, or name a file.
			if slices.Contains([]string{"name", "owner", "reason", "meta", "file", "out", "ca",
				"key-file", "dir", "socket", "actor", "text", "action", "addr"}, name) {
				continue
			}
			if !namesFile {
				runs = append(runs, []string{cmd.Name, "--" + name, token})
			}
			runs = append(runs,
				[]string{cmd.Name, key.ID, "--" + name + "=" + token, "--reason", "x"})
		}
	}
	runs = append(runs, []string{token}, []string{"--" + token}, []string{"-" + token, "list"},
		[]string{"help", token}, []string{"completion", token}, []string{"--help", token})
	for _, args := range runs {
		if args[0] == "watch" && len(args) < 3 || slices.Contains(args, "--dry-run="+token) {
			args = append(args, "--timeout", "1s")
		}
		cmd := w.command(args...)
		var timer *time.Timer
		r := w.finish(cmd, func() {
			timer = time.AfterFunc(5*time.Second, func() { _ = cmd.Process.Signal(os.Interrupt) })
		})
		timer.Stop()
		require.NotContains(t, r.stdout+r.stderr, secret, args)
	}
}

// Every command has one example in its help, and the example is a command line of the command.
func TestHelp(t *testing.T) {
	w := newWorld(t)
	root := w.ctl("--help")
	require.Zero(t, root.code)
	require.Equal(t, root.stdout, w.ctl("help").stdout)
	require.Equal(t, root.stdout, w.ctl().stdout)
	for _, cmd := range newCommand().Commands {
		require.Regexp(t, `(?m)^  `+cmd.Name+` `, root.stdout, "the help lists every command")
		r := w.ctl(cmd.Name, "--help")
		require.Zero(t, r.code)
		require.Contains(t, r.stdout, "Example\n  apikeyctl "+cmd.Name)
		for _, flag := range cmd.Flags {
			require.Contains(t, r.stdout, "--"+flag.Names()[0])
		}
		for line := range strings.Lines(r.stdout) {
			require.LessOrEqual(t, len(line), 101, line)
		}
	}
	for _, code := range []string{"0 done", "1 the", "2 the", "3 no", "4 not", "5 the", "6 the",
		"130 interrupted"} {
		require.Contains(t, strings.Join(strings.Fields(root.stdout), " "), code)
	}
}

// The completion of each shell names the commands and the flags.
func TestCompletion(t *testing.T) {
	w := newWorld(t)
	for _, shell := range []string{"bash", "zsh", "fish", "pwsh"} {
		r := w.ctl("completion", shell)
		require.Zero(t, r.code)
		require.NotEmpty(t, r.stdout)
	}
	r := w.ctl("rev", "--generate-shell-completion")
	require.Contains(t, r.stdout, "revoke-all")
	r = w.ctl("list", "--own", "--generate-shell-completion")
	require.Contains(t, r.stdout, "--owner")
	if bash, err := exec.LookPath("bash"); err == nil {
		cmd := exec.Command(bash, "-n")
		cmd.Stdin = strings.NewReader(w.ctl("completion", "bash").stdout)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, string(out))
	}
}

// If the answer to create is lost with the connection, apikeyctl repeats the call, and prints the
// secret of the only key that was made.
func TestRepeatAfterALostAnswer(t *testing.T) {
	w := startWorld(t)
	proxy, err := net.Listen("unix", filepath.Join(w.dir, "proxy.sock"))
	require.NoError(t, err)
	defer proxy.Close()
	var lost atomic.Bool
	go func() {
		for {
			client, err := proxy.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("unix", filepath.Join(w.dir, socketPath))
			if err != nil {
				client.Close()
				continue
			}
			go func() {
				_, _ = io.Copy(server, client)
				server.Close()
			}()
			go func() {
				defer client.Close()
				for buffer := make([]byte, 64<<10); ; {
					n, err := server.Read(buffer)
					secret := bytes.Contains(buffer[:n], []byte("oil_"))
					if err != nil || secret && lost.CompareAndSwap(false, true) {
						return
					}
					if _, err := client.Write(buffer[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	r := w.ctl("--socket", "proxy.sock", "create", "--name", "ci")
	require.Zero(t, r.code, r.stderr)
	require.True(t, lost.Load())
	require.Equal(t, 1, w.count(keystore.StatusActive))
	key, err := w.store.Verify(t.Context(), strings.TrimSpace(r.stdout))
	require.NoError(t, err)
	require.Equal(t, "ci", key.Name)
}
