package sharedlab

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"golang.org/x/crypto/bcrypt"
)

// patience is the longest time for which the lab waits for a step of etcd.
const patience = 2 * time.Minute

// settings are the settings of a member, for its process.
type settings struct {
	Name, Dir, Token, ClientURL, PeerURL, Cluster string
	QuotaBytes                                    int64
	MaxTxnOps                                     uint
	NoSync                                        bool
	Certificate, Key, CA                          string // files, if the clients must use TLS
}

// runMember runs a member of etcd until the parent ends it.
func runMember(text string, parent <-chan struct{}) error {
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
	select {
	case <-e.Server.ReadyNotify():
		fmt.Println(ready)
	case <-parent:
		return nil
	case err := <-e.Err():
		return err
	}
	select {
	case <-parent:
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

// URL returns the URL for clients.
func (m *Member) URL() string { return m.settings.ClientURL }

// start starts the process, and does not wait.
func (m *Member) start() (err error) {
	if m.process != nil {
		return errors.New("the member runs already")
	}
	m.process, err = startProcess("member", m.settings, (*exec.Cmd).Start)
	return err
}

// wait waits until the member serves clients.
func (m *Member) wait() error {
	if err := m.process.wait(); err != nil {
		m.process.end((*process).kill)
		m.process = nil
		return fmt.Errorf("member %s: %w", m.settings.Name, err)
	}
	return nil
}

// Start starts a member that does not run, and waits until the member serves clients.
func (m *Member) Start() error {
	if err := m.start(); err != nil {
		return err
	}
	return m.wait()
}

// Kill kills the member, as kill -9 does.
func (m *Member) Kill() { m.end((*process).kill) }

// Stop stops the member in order.
func (m *Member) Stop() { m.end((*process).stop) }

func (m *Member) end(how func(*process)) {
	if m.process != nil {
		m.process.end(how)
		m.process = nil
	}
}

// Pause stops the process, as SIGSTOP does. The connections stay open.
func (m *Member) Pause() error { return m.process.pause() }

// Resume ends Pause.
func (m *Member) Resume() error { return m.process.resume() }

// wipe removes the data of a member that does not run.
func (m *Member) wipe() error { return os.RemoveAll(filepath.Clean(m.settings.Dir)) }
