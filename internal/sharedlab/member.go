package sharedlab

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/crypto/bcrypt"
)

// memberEnv names the environment variable that has the settings of a member. The variable makes
// the process a member.
const memberEnv = "SHAREDLAB_MEMBER"

// ready is the line that a member prints once the member serves clients.
const ready = "sharedlab: ready"

// patience is the longest time for which the lab waits for a step of etcd.
const patience = time.Minute

// settings are the settings of a member, for its process.
type settings struct {
	Name, Dir, Token, ClientURL, PeerURL, Cluster string
	QuotaBytes                                    int64
	MaxTxnOps                                     uint
	NoSync                                        bool
	Certificate, Key, CA                          string // files, if the clients must use TLS
}

// RunMember runs a member of etcd, and never returns, if the process was started as a member.
// Otherwise RunMember does nothing.
func RunMember() {
	text, ok := os.LookupEnv(memberEnv)
	if !ok {
		return
	}
	if err := runMember(text); err != nil {
		fmt.Fprintln(os.Stderr, "sharedlab:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func runMember(text string) error {
	var s settings
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return err
	}
	client, err := url.Parse(s.ClientURL)
	if err != nil {
		return err
	}
	peer, err := url.Parse(s.PeerURL)
	if err != nil {
		return err
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialClusterToken, c.InitialCluster = s.Name, s.Dir, s.Token, s.Cluster
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	c.QuotaBackendBytes, c.UnsafeNoFsync = s.QuotaBytes, s.NoSync
	if s.MaxTxnOps > 0 {
		c.MaxTxnOps = s.MaxTxnOps
	}
	c.BcryptCost = uint(bcrypt.MinCost) // the tests have no password that is worth a guess
	c.LogLevel, c.LogOutputs = "error", []string{"stderr"}
	c.WarningApplyDuration, c.WarningUnaryRequestDuration = time.Hour, time.Hour
	if s.CA != "" {
		c.ClientTLSInfo.CertFile, c.ClientTLSInfo.KeyFile = s.Certificate, s.Key
		c.ClientTLSInfo.TrustedCAFile, c.ClientTLSInfo.ClientCertAuth = s.CA, true
	}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	defer e.Close()
	// The parent holds the other end of the standard input. If the parent dies, the member ends.
	orphaned := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(orphaned)
	}()
	select {
	case <-e.Server.ReadyNotify():
		fmt.Println(ready)
	case <-orphaned:
		return nil
	case err := <-e.Err():
		return err
	}
	select {
	case <-orphaned:
		return nil
	case err := <-e.Err():
		return err
	}
}

// A Member is one server of etcd, in a separate process. The methods must not be called
// concurrently.
type Member struct {
	settings settings
	process  *process // nil: the member does not run
}

// A process is a running member.
type process struct {
	cmd    *exec.Cmd
	stdin  io.Closer
	ready  chan struct{} // closed when the member serves clients
	exited chan struct{} // closed when the process has ended

	mu   sync.Mutex
	last []string // the last lines of the standard error
}

// URL returns the URL for clients.
func (m *Member) URL() string { return m.settings.ClientURL }

// start starts the process, and does not wait.
func (m *Member) start() error {
	if m.process != nil {
		return errors.New("the member runs already")
	}
	text, err := json.Marshal(m.settings)
	if err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	p := &process{cmd: exec.Command(exe), ready: make(chan struct{}), exited: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), memberEnv+"="+string(text))
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
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
			p.last = append(p.last[max(0, len(p.last)-9):], lines.Text())
			p.mu.Unlock()
		}
	})
	go func() {
		reads.Wait()
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	m.process = p
	return nil
}

// wait waits until the member serves clients.
func (m *Member) wait() error {
	p := m.process
	var what string
	select {
	case <-p.ready:
		return nil
	case <-p.exited:
		m.process, what = nil, "has ended"
	case <-time.After(patience):
		what = "is not ready"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("member %s %s:\n%s", m.settings.Name, what, strings.Join(p.last, "\n"))
}

// Start starts a member that does not run, and waits until the member serves clients.
func (m *Member) Start() error {
	if err := m.start(); err != nil {
		return err
	}
	return m.wait()
}

// Kill kills the member, as kill -9 does.
func (m *Member) Kill() { m.end(func(p *process) { _ = p.cmd.Process.Kill() }) }

// Stop stops the member in order.
func (m *Member) Stop() { m.end(func(p *process) { _ = p.stdin.Close() }) }

func (m *Member) end(end func(*process)) {
	p := m.process
	if p == nil {
		return
	}
	end(p)
	select {
	case <-p.exited:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
	_ = p.stdin.Close()
	m.process = nil
}

// Pause stops the process, as SIGSTOP does. The connections stay open.
func (m *Member) Pause() error { return m.process.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (m *Member) Resume() error { return m.process.cmd.Process.Signal(syscall.SIGCONT) }

// wipe removes the data of a member that does not run.
func (m *Member) wipe() error { return os.RemoveAll(filepath.Clean(m.settings.Dir)) }
