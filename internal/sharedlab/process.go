package sharedlab

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The environment variables of a child: what the child runs, and the settings in JSON.
const (
	childEnv    = "SHAREDLAB_CHILD"
	settingsEnv = "SHAREDLAB_SETTINGS"
)

// ready is the line that a child prints once the child serves.
const ready = "sharedlab: ready"

// children are what a child can run. Each function returns when parent is closed: the parent wants
// the child to end, or has died.
var children = map[string]func(settings string, parent <-chan struct{}) error{
	"member": runMember,
	"store":  runStore,
}

// RunChild runs a server or a store, and never returns, if the process was started as a child of
// the laboratory. Otherwise RunChild does nothing.
func RunChild() {
	run := children[os.Getenv(childEnv)]
	if run == nil {
		return
	}
	parent := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(parent)
	}()
	if err := run(os.Getenv(settingsEnv), parent); err != nil {
		fmt.Fprintln(os.Stderr, "sharedlab:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// A process is a running child.
type process struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	ready  chan struct{} // closed when the child serves
	exited chan struct{} // closed when the child has ended

	mu   sync.Mutex
	last []string // the last lines of the standard error
}

// startProcess starts a child with start, and does not wait until the child serves.
func startProcess(what string, settings any, start func(*exec.Cmd) error) (*process, error) {
	text, err := json.Marshal(settings)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(exe), ready: make(chan struct{}), exited: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), childEnv+"="+what, settingsEnv+"="+string(text))
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, err
	}
	if err := start(p.cmd); err != nil {
		return nil, err
	}
	var reads sync.WaitGroup
	reads.Go(func() {
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if lines.Text() == ready {
				close(p.ready)
			}
		}
	})
	reads.Go(func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			p.mu.Lock()
			p.last = append(p.last[max(0, len(p.last)-maxLines+1):], lines.Text())
			p.mu.Unlock()
		}
	})
	go func() {
		reads.Wait()
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// maxLines is the number of lines of the standard error that are kept.
const maxLines = 40

// wait waits until the child serves.
func (p *process) wait() error {
	select {
	case <-p.ready:
		return nil
	case <-p.exited:
		return fmt.Errorf("the process has ended:\n%s", p.stderr())
	case <-time.After(patience):
		return fmt.Errorf("the process is not ready:\n%s", p.stderr())
	}
}

// hasExited reports whether the child has ended.
func (p *process) hasExited() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// stderr returns the last lines of the standard error.
func (p *process) stderr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.last, "\n")
}

// pause stops the child with SIGSTOP, and waits until the child has stopped.
func (p *process) pause() error {
	if err := p.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	return awaitStop(p.cmd.Process.Pid)
}

// resume ends pause.
func (p *process) resume() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// kill kills the child, as kill -9 does. stop asks the child to end. Neither waits.
func (p *process) kill() { _ = p.cmd.Process.Kill() }
func (p *process) stop() { _ = p.stdin.Close() }

// end ends the child with kill or stop, and waits.
func (p *process) end(how func(*process)) {
	how(p)
	select {
	case <-p.exited:
	case <-time.After(patience):
		p.kill()
		<-p.exited
	}
	_ = p.stdin.Close()
}

// raise sets a time, unless a later time is there.
func raise(at *atomic.Int64, to int64) {
	for {
		now := at.Load()
		if now >= to || at.CompareAndSwap(now, to) {
			return
		}
	}
}
