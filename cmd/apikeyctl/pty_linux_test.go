package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A terminal is a pseudo terminal on which apikeyctl runs. The test is the person in front of it.
type terminal struct {
	t      *testing.T
	master *os.File
	cmd    *exec.Cmd
	mu     sync.Mutex
	seen   bytes.Buffer // what the terminal shows
	closed chan struct{}
}

// onTerminal starts a command on a new terminal. Stdout is the terminal too, unless the command has
// another one.
func onTerminal(t *testing.T, cmd *exec.Cmd, columns uint16) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("NOT RUN: there is no pseudo terminal: %v", err)
	}
	t.Cleanup(func() { master.Close() })
	fd := int(master.Fd())
	require.NoError(t, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ,
		&unix.Winsize{Row: 24, Col: columns}))
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	defer slave.Close()
	cmd.Stdin, cmd.Stderr = slave, slave
	if cmd.Stdout == nil {
		cmd.Stdout = slave
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	term := &terminal{t: t, master: master, cmd: cmd, closed: make(chan struct{})}
	go func() {
		defer close(term.closed)
		buffer := make([]byte, 4096)
		for {
			n, err := master.Read(buffer)
			term.mu.Lock()
			term.seen.Write(buffer[:n])
			term.mu.Unlock()
			if err != nil {
				return // EIO after the end of the process
			}
		}
	}()
	return term
}

func (term *terminal) text() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	return strings.ReplaceAll(term.seen.String(), "\r\n", "\n")
}

// await waits until the terminal shows a text.
func (term *terminal) await(text string) {
	term.t.Helper()
	require.Eventually(term.t, func() bool { return strings.Contains(term.text(), text) },
		time.Minute, 5*time.Millisecond, "the terminal does not show %q", text)
}

func (term *terminal) typeIn(text string) {
	term.t.Helper()
	_, err := io.WriteString(term.master, text)
	require.NoError(term.t, err)
}

// end waits for the end of the process, and returns the exit code and what the terminal shows.
func (term *terminal) end() (int, string) {
	term.t.Helper()
	_ = term.cmd.Wait()
	<-term.closed
	require.NotContains(term.t, term.text(), "goroutine ")
	return term.cmd.ProcessState.ExitCode(), term.text()
}

func threeKeys(w *world) {
	for i, owner := range []string{"acme", "acme", "beta"} {
		w.create(keystore.Spec{Name: fmt.Sprint("key", i), Owner: owner})
	}
}

// On a terminal, revoke-all shows what it will do, and goes on only after the number was typed.
func TestTerminalAsksForTheNumber(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	for _, answer := range []string{"2\n", "\n", "yes\n", "\x04"} {
		term := onTerminal(t, w.command("revoke-all", "--all", "--reason", "x"), 100)
		term.await("Type 3 to continue: ")
		term.typeIn(answer)
		code, text := term.end()
		require.Equal(t, exitUsage, code)
		require.Contains(t, text, "This revokes 3 keys of 2 owners for good (acme: 2, beta: 1)")
		require.Contains(t, text, "nothing was changed, because 3 was not typed")
		require.Equal(t, 3, w.count(keystore.StatusActive))
	}
	term := onTerminal(t, w.command("revoke-all", "--owner", "acme", "--reason", "x"), 100)
	term.await("Type 2 to continue: ")
	term.typeIn("2\n")
	code, text := term.end()
	require.Zero(t, code, text)
	require.Contains(t, text, "revoked 2 keys")
	require.Equal(t, 1, w.count(keystore.StatusActive))

	// With --yes, nobody is asked.
	term = onTerminal(t, w.command("revoke-all", "--all", "--reason", "x", "--yes"), 100)
	code, text = term.end()
	require.Zero(t, code, text)
	require.NotContains(t, text, "Type")
	require.Equal(t, 0, w.count(keystore.StatusActive))

	term = onTerminal(t, w.command("purge", "--before", "0s"), 100)
	term.await("This removes 3 keys for good.\nType 3 to continue: ")
	term.typeIn("3\n")
	code, text = term.end()
	require.Zero(t, code, text)
	require.Contains(t, text, "removed 3 keys")
}

// A key that is made between the question and the answer is not revoked with the others.
func TestSelectionGrowsBeforeTheAnswer(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	term := onTerminal(t, w.command("revoke-all", "--all", "--reason", "x"), 100)
	term.await("Type 3 to continue: ")
	w.create(keystore.Spec{Name: "late", Owner: "acme"})
	term.typeIn("3\n")
	code, text := term.end()
	require.Equal(t, exitConflict, code, text)
	require.Contains(t, text, "selects 4 keys, and the call expects 3")
	require.Equal(t, 4, w.count(keystore.StatusActive))
}

func TestTerminalAsksBeforeRestore(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	require.Zero(t, w.ctl("backup", "b").code)
	term := onTerminal(t, w.command("--dir", "other", "restore", "b"), 100)
	term.await("Type restore to continue: ")
	term.typeIn("restore\n")
	code, text := term.end()
	require.Zero(t, code, text)
	require.Equal(t, 3, strings.Count(w.ctl("--dir", "other", "list", "-q").stdout, "\n"))
}

// An interrupt at a question changes nothing.
func TestInterruptAtTheQuestion(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	term := onTerminal(t, w.command("revoke-all", "--all", "--reason", "x"), 100)
	term.await("Type 3 to continue: ")
	term.typeIn("\x03")
	code, text := term.end()
	require.Equal(t, exitInterrupted, code)
	require.Contains(t, text, "interrupted: nothing was changed")
	require.Equal(t, 3, w.count(keystore.StatusActive))
}

// The prompt of lookup does not show the secret.
func TestPromptHidesTheSecret(t *testing.T) {
	w := startWorld(t)
	key, token := w.create(keystore.Spec{Name: "ci"})
	term := onTerminal(t, w.command("lookup"), 100)
	term.await("Secret (not shown): ")
	term.typeIn(token + "\n")
	code, text := term.end()
	require.Zero(t, code)
	require.Contains(t, text, key.ID)
	require.NotContains(t, text, token)

	term = onTerminal(t, w.command("lookup"), 100)
	term.await("Secret (not shown): ")
	term.typeIn("\x03")
	code, text = term.end()
	require.Equal(t, exitInterrupted, code)
	require.Contains(t, text, "interrupted")

	term = onTerminal(t, w.command("lookup"), 100)
	term.await("Secret (not shown): ")
	require.NoError(t, term.cmd.Process.Signal(os.Interrupt))
	code, _ = term.end()
	require.Equal(t, exitInterrupted, code)
}

// On a terminal, the secret is on stdout and the table on stderr, so that $(apikeyctl create)
// works.
func TestSecretBesideATerminal(t *testing.T) {
	w := startWorld(t)
	cmd := w.command("create", "--name", "ci")
	var stdout bytes.Buffer
	cmd.Stdout = &stdout
	term := onTerminal(t, cmd, 100)
	code, text := term.end()
	require.Zero(t, code)
	require.Regexp(t, `^oil_[0-9a-z]{26}_\w+\n$`, stdout.String())
	require.Contains(t, text, "The secret is shown only once:")
	require.NotContains(t, text, strings.TrimSpace(stdout.String()))
}

// No line is wider than the window, unless a single value is.
func TestNarrowWindow(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	for _, columns := range []uint16{40, 60, 80} {
		for _, args := range [][]string{{"list"}, {"events"}, {"--help"}, {"list", "--help"}} {
			code, text := onTerminal(t, w.command(args...), columns).end()
			require.Zero(t, code, text)
			for line := range strings.Lines(text) {
				require.LessOrEqual(t, len(strings.TrimSuffix(line, "\n")), int(columns),
					"%v in %d columns: %q", args, columns, line)
			}
		}
	}
	_, text := onTerminal(t, w.command("list"), 40).end()
	require.Contains(t, text, "OWNER    acme\n", "each cell has a line")
	_, text = onTerminal(t, w.command("list"), 70).end()
	require.Contains(t, text, "ID                          NAME  OWNER  STATE")
	require.NotContains(t, text, "SCOPES", "the last column is left out")
}

// Without NO_COLOR, too, there is no colour.
func TestNoColour(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	cmd := w.command("list")
	_, with := onTerminal(t, cmd, 100).end()
	cmd = w.command("list")
	cmd.Env = append(cmd.Env, "NO_COLOR=1")
	_, without := onTerminal(t, cmd, 100).end()
	require.Equal(t, with, without)
	require.NotContains(t, with, "\x1b")
}

// On a terminal, a bulk revocation shows a bar, which is gone at the end.
func TestBarOnATerminal(t *testing.T) {
	w := startWorld(t)
	threeKeys(w)
	code, text := onTerminal(t, w.command("revoke-all", "--all", "--reason", "x", "--yes"), 60).end()
	require.Zero(t, code)
	require.True(t, strings.HasSuffix(text, "revoked 3 keys\n"), "%q", text)
	code, text = onTerminal(t, w.command("backup", "b"), 60).end()
	require.Zero(t, code)
	require.Regexp(t, `wrote .* to b\n$`, text)
}
