package badgerdb

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// childEnv holds, as JSON, what a process that a test has started is to do.
const childEnv = "BADGERDB_CHILD"

// A child is the order of such a process: to open a directory, and to say what came of that.
type child struct {
	Dir       string
	Recover   bool
	MustExist bool
	KillAt    int    // kill the process at this step of a recovery; 0 means never
	UID       int    // run as this user; 0 means the same user
	Host      string // call the host so first; empty means as it is
	Hold      bool   // hold the directory until standard input ends
}

// A verdict is the line in which the child says what came of it.
type verdict struct {
	Text                              string // of the error; empty if the directory was opened
	Locked, Corrupt, Denied, NotExist bool   // what the error matches
	Told                              string // what Options.Recover was told
	Pid                               int
}

func judgement(err error) verdict {
	v := verdict{Pid: os.Getpid()}
	if err != nil {
		v.Text = err.Error()
		v.Locked = errors.Is(err, backend.ErrLocked)
		v.Corrupt = errors.Is(err, backend.ErrCorrupt)
		v.Denied = errors.Is(err, fs.ErrPermission)
		v.NotExist = errors.Is(err, fs.ErrNotExist)
	}
	return v
}

func runChild() {
	order := os.Getenv(childEnv)
	if order == "" {
		return
	}
	var c child
	if err := json.Unmarshal([]byte(order), &c); err != nil {
		panic(err)
	}
	prepareChild(c)
	told, steps := "", 0
	opts := Options{MustExist: c.MustExist, crash: func(step string) {
		if steps++; steps == c.KillAt {
			fmt.Println("killed: " + step)
			self, _ := os.FindProcess(os.Getpid())
			_ = self.Kill()
			select {}
		}
	}}
	if c.Recover {
		opts.Recover = func(err error) {
			told = err.Error()
			fmt.Println("told")
		}
	}
	db, err := Open(c.Dir, opts)
	v := judgement(err)
	v.Told = told
	line, _ := json.Marshal(v)
	fmt.Println("done: " + string(line))
	if c.Hold {
		_ = bufio.NewScanner(os.Stdin).Scan()
	}
	if db != nil {
		if err := db.Close(); err != nil {
			panic(err)
		}
	}
	os.Exit(0)
}

// command returns the command of a child.
func (c child) command(t *testing.T) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	order, err := json.Marshal(c)
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childEnv+"="+string(order))
	cmd.Stderr = os.Stderr
	return cmd
}

// run returns what a child says: the step at which it was killed, or its verdict; and whether
// Options.Recover was called.
func (c child) run(t *testing.T) (killed string, told bool, v verdict) {
	t.Helper()
	out, err := c.command(t).Output()
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		if step, ok := strings.CutPrefix(line, "killed: "); ok {
			return step, told, v
		}
		if text, ok := strings.CutPrefix(line, "done: "); ok {
			require.NoError(t, json.Unmarshal([]byte(text), &v))
			require.NoError(t, err)
			return "", told, v
		}
		told = told || line == "told"
	}
	require.NoError(t, err)
	require.Fail(t, "the process said nothing", "%s", out)
	return "", false, v
}

// hold starts a child that holds its directory until it is killed, or the test ends, and returns
// its verdict.
func (c child) hold(t *testing.T) (*exec.Cmd, verdict) {
	t.Helper()
	c.Hold = true
	cmd := c.command(t)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait()
	})
	return cmd, readVerdict(t, bufio.NewScanner(out))
}

func readVerdict(t *testing.T, out *bufio.Scanner) (v verdict) {
	t.Helper()
	for out.Scan() {
		if text, ok := strings.CutPrefix(out.Text(), "done: "); ok {
			require.NoError(t, json.Unmarshal([]byte(text), &v))
			return v
		}
	}
	require.Fail(t, "the process said nothing")
	return v
}
