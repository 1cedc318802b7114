package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// A process is this program once more, in another process. The process ends with its standard
// input, and so with this process.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	lines  chan string  // the standard output; closed when the process has ended
	errors bytes.Buffer // the standard error; may be read once lines is closed
}

// start starts a process.
func start(args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &process{cmd: exec.Command(self, args...), lines: make(chan string, 1)}
	p.cmd.Stderr = &p.errors
	// A Ctrl-C on the terminal reaches this process alone, which then stops the others in order.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			p.lines <- lines.Text()
		}
		_ = p.cmd.Wait() // the standard error says why a process has failed
		close(p.lines)
	}()
	return p, nil
}

// answer returns the next line of the standard output without its first word, which must be want.
func (p *process) answer(ctx context.Context, want string) (string, error) {
	select {
	case line, ok := <-p.lines:
		if !ok {
			return "", fmt.Errorf("a process has ended: %s", p.errors.String())
		}
		word, rest, _ := strings.Cut(line, " ")
		if word != want {
			return "", fmt.Errorf("a process has failed: %s", rest)
		}
		return rest, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// ask writes a line to the standard input, and returns the answer.
func (p *process) ask(ctx context.Context, question, want string) (string, error) {
	if _, err := fmt.Fprintln(p.in, question); err != nil {
		return "", err
	}
	return p.answer(ctx, want)
}

// pause stops the process, as a debugger or an overloaded machine does. Its connections stay open.
func (p *process) pause() error { return p.cmd.Process.Signal(syscall.SIGSTOP) }

// wake ends pause.
func (p *process) wake() error { return p.cmd.Process.Signal(syscall.SIGCONT) }

// stop ends the process, and returns once it has ended.
func (p *process) stop() {
	_ = p.wake()
	_ = p.in.Close()
	kill := time.AfterFunc(10*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer kill.Stop()
	for range p.lines {
	}
}
