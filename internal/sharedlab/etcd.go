package sharedlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// EtcdConfig has the settings of an Etcd. The zero EtcdConfig is one member with etcd's defaults.
type EtcdConfig struct {
	// Members is the number of members; 0 means 1.
	Members int
	// QuotaBytes is the quota of the database of each member; 0 means etcd's default.
	QuotaBytes int64
	// MaxTxnOps is the largest number of operations in a transaction; 0 means etcd's default.
	MaxTxnOps uint
	// NoSync makes the members write without waiting for the disk. A member that is killed still
	// loses nothing, unless the machine ends too.
	NoSync bool
	// Certificate, Key and CA are the names of PEM files. If CA is not empty, the members use TLS
	// with the certificate, and require a certificate of the CA from each client.
	Certificate, Key, CA string
}

// An Etcd is a cluster of etcd. The members end with the test.
type Etcd struct {
	Members []*Member
	dir     string
}

// StartEtcd starts a cluster.
func StartEtcd(t testing.TB, c EtcdConfig) *Etcd {
	t.Helper()
	// The ports were free a moment ago. If another process has taken one of them, StartEtcd tries
	// other ports.
	var err error
	for range 5 {
		l := newEtcd(t, c)
		if err = l.start(); err == nil {
			t.Cleanup(l.end)
			return l
		}
		l.end()
	}
	require.NoError(t, err)
	return nil
}

func newEtcd(t testing.TB, c EtcdConfig) *Etcd {
	l := &Etcd{dir: t.TempDir()}
	scheme := "http"
	if c.CA != "" {
		scheme = "https"
	}
	var cluster []string
	ports, err := freeport.Ports(2 * max(c.Members, 1))
	require.NoError(t, err)
	for i := range max(c.Members, 1) {
		s := settings{
			Name: fmt.Sprint("m", i), Dir: filepath.Join(l.dir, fmt.Sprint("m", i)), Token: "lab",
			ClientURL:  fmt.Sprintf("%s://127.0.0.1:%d", scheme, ports[2*i]),
			PeerURL:    fmt.Sprintf("http://127.0.0.1:%d", ports[2*i+1]),
			QuotaBytes: c.QuotaBytes, MaxTxnOps: c.MaxTxnOps, NoSync: c.NoSync,
			Certificate: c.Certificate, Key: c.Key, CA: c.CA,
		}
		cluster = append(cluster, s.Name+"="+s.PeerURL)
		l.Members = append(l.Members, &Member{settings: s})
	}
	for _, m := range l.Members {
		m.settings.Cluster = strings.Join(cluster, ",")
	}
	return l
}

// start starts all members, and waits until they serve clients.
func (l *Etcd) start() error {
	for _, m := range l.Members {
		if err := m.start(); err != nil {
			return err
		}
	}
	for _, m := range l.Members {
		if err := m.wait(); err != nil {
			return err
		}
	}
	return nil
}

func (l *Etcd) end() {
	for _, m := range l.Members {
		m.Kill()
	}
}

// Endpoints returns the URLs of all members.
func (l *Etcd) Endpoints() (urls []string) {
	for _, m := range l.Members {
		urls = append(urls, m.URL())
	}
	return urls
}

// Addresses implements Engine.
func (l *Etcd) Addresses() (hostports []string) {
	for _, url := range l.Endpoints() {
		_, hostport, _ := strings.Cut(url, "://")
		hostports = append(hostports, hostport)
	}
	return hostports
}

// Client returns a client of all members, with the settings that the documentation of etcdstore
// recommends. Each change of the settings is optional. The client is closed at the end of the test.
func (l *Etcd) Client(t testing.TB, changes ...func(*clientv3.Config)) *clientv3.Client {
	t.Helper()
	c := clientConfig(l.Endpoints())
	for _, change := range changes {
		change(&c)
	}
	client, err := clientv3.New(c)
	require.NoError(t, err)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

// Leader returns the member that leads, according to the members that answer.
func (l *Etcd) Leader(t testing.TB, client *clientv3.Client) *Member {
	t.Helper()
	deadline := time.Now().Add(patience)
	for time.Now().Before(deadline) {
		for _, m := range l.Members {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			r, err := client.Status(ctx, m.URL())
			cancel()
			if err == nil && r.Leader == r.Header.MemberId {
				return m
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	require.Fail(t, "etcd has no leader")
	return nil
}

// Snapshot writes a snapshot of the database of the first member to a file, as etcdctl snapshot
// save does.
func (l *Etcd) Snapshot(t testing.TB) (file string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	file, err := l.snapshot(ctx)
	require.NoError(t, err)
	return file
}

// snapshot also makes sure that the member has every change that was confirmed before: a snapshot
// has what one member has, and the member may lag behind.
func (l *Etcd) snapshot(ctx context.Context) (file string, err error) {
	client, err := clientv3.New(clientConfig(l.Endpoints()[:1]))
	if err != nil {
		return "", err
	}
	defer client.Close()
	if _, err := client.Get(ctx, "/"); err != nil {
		return "", err
	}
	r, err := client.Snapshot(ctx)
	if err != nil {
		return "", err
	}
	defer r.Close()
	f, err := os.CreateTemp(l.dir, "*.snapshot")
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, r)
	return f.Name(), errors.Join(err, f.Close())
}

// Restore kills all members, replaces their data by a snapshot, as etcdutl snapshot restore does,
// and starts the members. The cluster has another cluster ID if the token is another one; the first
// token is "lab".
func (l *Etcd) Restore(t testing.TB, file, token string) {
	t.Helper()
	for _, m := range l.Members {
		m.Kill()
	}
	for _, m := range l.Members {
		require.NoError(t, m.wipe())
		m.settings.Token = token
		require.NoError(t, snapshot.NewV3(zap.NewNop()).Restore(snapshot.RestoreConfig{
			SnapshotPath: file, Name: m.settings.Name, OutputDataDir: m.settings.Dir,
			PeerURLs: []string{m.settings.PeerURL}, InitialCluster: m.settings.Cluster,
			InitialClusterToken: token,
		}))
	}
	require.NoError(t, l.start())
}
