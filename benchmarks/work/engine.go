package work

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// An engine is a storage that several processes share. Each server of an engine is a process.
type engine struct {
	pids func() []int // of the processes of the servers
	// open connects to the engine, as a process does. The name tells the stores of an engine apart.
	open func(ctx context.Context, name string) (backend.Feeder, func() error, error)
	// work returns what the servers have done so far, for the clients and among themselves.
	work  func(ctx context.Context) (engineWork, error)
	close func() error

	// lookUps starts the peers that look credentials up in the engine, without a store.
	lookUps func(ctx context.Context) ([]*peers.SharedPeer, error)
}

// An engineWork counts what the servers of an engine have done.
type engineWork struct {
	Writes float64 // transactions that the engine has committed
	Client float64 // bytes from and to clients
	Log    float64 // bytes that all servers have written to their logs
}

// engines are the engines by name.
var engines = map[string]func(ctx context.Context, dir string) (*engine, error){
	"etcd":     startEtcd,
	"postgres": startPostgres,
}

// Engines returns the names of the engines.
func Engines() (names []string) {
	for name := range engines {
		names = append(names, name)
	}
	return names
}

func (e *Env) startEngine(ctx context.Context) (*engine, error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	return engines[e.Engine](ctx, dir)
}

// openStore opens a store as a process does: with a new connection.
func (n *engine) openStore(
	ctx context.Context, name string, opts *keystore.Options,
) (*keystore.Store, func() error, error) {
	return n.openStoreOn(ctx, name, opts, func(b backend.Feeder) backend.Feeder { return b })
}

// openStoreOn is openStore with a layer between the store and the engine.
func (n *engine) openStoreOn(
	ctx context.Context, name string, opts *keystore.Options,
	layer func(backend.Feeder) backend.Feeder,
) (*keystore.Store, func() error, error) {
	b, disconnect, err := n.open(ctx, name)
	if err != nil {
		return nil, nil, err
	}
	store, err := keystore.New(layer(b), opts)
	if err != nil {
		return nil, nil, errors.Join(err, b.Close(), disconnect())
	}
	return store, func() error { return errors.Join(store.Close(), disconnect()) }, nil
}

// openStores opens a store in several processes.
func (n *engine) openStores(
	ctx context.Context, processes int, name string, opts *keystore.Options, end *closer,
) (stores []*keystore.Store, err error) {
	for range processes {
		s, closeStore, err := n.openStore(ctx, name, opts)
		if err != nil {
			return nil, err
		}
		end.add(closeStore)
		stores = append(stores, s)
	}
	return stores, nil
}

// An etcdMember contains the settings of a member of etcd, for its process.
type etcdMember struct{ Name, Dir, Client, Peer, Cluster string }

// etcdQuota is the quota of the database. The workloads do not compact.
const etcdQuota = 8 << 30

// startEtcd starts an etcd of three members on the loopback interface.
func startEtcd(ctx context.Context, dir string) (_ *engine, err error) {
	var end closer
	defer func() {
		if err != nil {
			end.into(&err)
		}
	}()
	var members []etcdMember
	var endpoints, cluster []string
	ports, err := freeport.Ports(6)
	if err != nil {
		return nil, err
	}
	for i := range 3 {
		m := etcdMember{
			Name:   fmt.Sprint("m", i),
			Dir:    filepath.Join(dir, fmt.Sprint("m", i)),
			Client: fmt.Sprint("http://127.0.0.1:", ports[2*i]),
			Peer:   fmt.Sprint("http://127.0.0.1:", ports[2*i+1]),
		}
		members = append(members, m)
		endpoints = append(endpoints, m.Client)
		cluster = append(cluster, m.Name+"="+m.Peer)
	}
	n := &engine{}
	var pids []int
	var outs []*bufio.Reader
	for _, m := range members {
		m.Cluster = strings.Join(cluster, ",")
		// The members outlast an interrupt: the stores need them for Close.
		cmd, err := childCommand(context.WithoutCancel(ctx), "etcd", dir)
		if err != nil {
			return nil, err
		}
		cmd.Stderr = os.Stderr
		in, out, err := startChild(cmd)
		if err != nil {
			return nil, err
		}
		end.add(func() error { return errors.Join(in.Close(), cmd.Wait()) })
		if err := json.NewEncoder(in).Encode(m); err != nil {
			return nil, err
		}
		pids, outs = append(pids, cmd.Process.Pid), append(outs, bufio.NewReader(out))
	}
	for _, out := range outs {
		if _, err := out.ReadString('\n'); err != nil {
			return nil, fmt.Errorf("a member of etcd does not start: %w", err)
		}
	}
	connect := func() (*clientv3.Client, error) {
		return clientv3.New(clientv3.Config{
			Endpoints: endpoints, DialKeepAliveTime: 10 * time.Second,
			DialKeepAliveTimeout: 3 * time.Second, PermitWithoutStream: true, Logger: zap.NewNop(),
		})
	}
	client, err := connect()
	if err != nil {
		return nil, err
	}
	end.add(client.Close)
	n.pids = func() []int { return pids }
	n.lookUps = func(ctx context.Context) ([]*peers.SharedPeer, error) {
		return peers.StartEtcd(ctx, client)
	}
	n.open = func(ctx context.Context, name string) (backend.Feeder, func() error, error) {
		client, err := connect()
		if err != nil {
			return nil, nil, err
		}
		b, err := etcdstore.Open(ctx, client, "/"+name+"/", nil)
		if err != nil {
			return nil, nil, errors.Join(err, client.Close())
		}
		return b, client.Close, nil
	}
	n.work = func(ctx context.Context) (engineWork, error) { return etcdWork(ctx, endpoints) }
	n.close = func() (err error) {
		end.into(&err)
		return err
	}
	return n, nil
}

// startChild starts a child process.
func startChild(cmd *exec.Cmd) (in io.WriteCloser, out io.Reader, err error) {
	if in, err = cmd.StdinPipe(); err != nil {
		return nil, nil, err
	}
	if out, err = cmd.StdoutPipe(); err != nil {
		return nil, nil, err
	}
	return in, out, cmd.Start()
}

// runEtcd runs a member of etcd until the standard input ends. The first line of the input contains
// the settings.
func runEtcd(string) error {
	signal.Ignore(os.Interrupt) // which a terminal sends to each process of the group
	in := json.NewDecoder(os.Stdin)
	var m etcdMember
	if err := in.Decode(&m); err != nil {
		return err
	}
	client, err := url.Parse(m.Client)
	if err != nil {
		return err
	}
	peer, err := url.Parse(m.Peer)
	if err != nil {
		return err
	}
	c := embed.NewConfig()
	c.Name, c.Dir, c.InitialCluster = m.Name, m.Dir, m.Cluster
	c.ListenClientUrls, c.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	c.ListenPeerUrls, c.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	c.QuotaBackendBytes = etcdQuota
	c.LogLevel, c.LogOutputs = "fatal", []string{"stderr"}
	e, err := embed.StartEtcd(c)
	if err != nil {
		return err
	}
	defer e.Close()
	select {
	case <-e.Server.ReadyNotify():
		fmt.Println("ready")
	case err := <-e.Err():
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// etcdWork reads the metrics of all members. Each member counts all transactions.
func etcdWork(ctx context.Context, endpoints []string) (w engineWork, err error) {
	for i, endpoint := range endpoints {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, endpoint+"/metrics", nil)
		if err != nil {
			return w, err
		}
		reply, err := http.DefaultClient.Do(r)
		if err != nil {
			return w, err
		}
		defer reply.Body.Close()
		for lines := bufio.NewScanner(reply.Body); lines.Scan(); {
			var value float64
			name, text, _ := strings.Cut(lines.Text(), " ")
			if _, err := fmt.Sscan(text, &value); err != nil {
				continue // a comment
			}
			switch name {
			case "etcd_server_proposals_applied_total":
				if i == 0 {
					w.Writes += value
				}
			case "etcd_network_client_grpc_received_bytes_total",
				"etcd_network_client_grpc_sent_bytes_total":
				w.Client += value
			case "etcd_disk_wal_write_bytes_total":
				w.Log += value
			}
		}
	}
	return w, nil
}

// cpu returns the processor time of the servers so far in seconds, or false on systems without
// /proc.
func (n *engine) cpu() (seconds float64, ok bool) {
	for _, pid := range n.pids() {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, false
		}
		// The name of the program is in parentheses, and may contain spaces.
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 13 {
			return 0, false
		}
		var user, system float64
		if _, err := fmt.Sscan(fields[11], &user); err != nil {
			return 0, false
		}
		if _, err := fmt.Sscan(fields[12], &system); err != nil {
			return 0, false
		}
		seconds += (user + system) / 100 // USER_HZ is 100 on all Linux systems
	}
	return seconds, true
}
