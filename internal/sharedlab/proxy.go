package sharedlab

import (
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// A Cut says in which directions nothing passes.
type Cut struct {
	ToServer, ToProcess bool
}

// A Proxy is the network between one process and one server of the store.
type Proxy struct {
	server   string // host and port
	listener net.Listener
	running  sync.WaitGroup

	mu      sync.Mutex // guards all below
	cut     Cut
	changed chan struct{} // closed when cut changes
	conns   map[net.Conn]struct{}
	closed  bool
}

// A Network is the network between one process and all servers: a Proxy for each server. With a
// link, the process lives in a network namespace, and the packets to the proxies can get lost.
type Network struct {
	proxies []*Proxy
	link    *link // nil: the process and the proxies use 127.0.0.1
}

// NewNetwork returns the network of one process. The network ends with the test.
func NewNetwork(t testing.TB, servers Engine) *Network {
	return newNetwork(t, servers, nil)
}

func newNetwork(t testing.TB, servers Engine, over *link) *Network {
	n := &Network{link: over}
	for _, server := range servers.Addresses() {
		listener, err := over.listen()
		require.NoError(t, err)
		p := &Proxy{server: server, listener: listener, changed: make(chan struct{}),
			conns: make(map[net.Conn]struct{})}
		p.running.Go(p.serve)
		t.Cleanup(p.close)
		n.proxies = append(n.proxies, p)
	}
	return n
}

// Addresses returns the addresses of the proxies, for the process.
func (n *Network) Addresses() (hostports []string) {
	for _, p := range n.proxies {
		hostports = append(hostports, p.listener.Addr().String())
	}
	return hostports
}

// Cut makes the proxies keep back what they receive, while the connections stay open. The zero Cut
// ends this, and what was kept back arrives late.
func (n *Network) Cut(c Cut) {
	for _, p := range n.proxies {
		p.mu.Lock()
		p.cut = c
		close(p.changed)
		p.changed = make(chan struct{})
		p.mu.Unlock()
	}
}

// add notes a connection, unless the Proxy is closed.
func (p *Proxy) add(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) remove(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

// serve accepts connections until close.
func (p *Proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		if !p.add(client) {
			_ = client.Close()
			return
		}
		p.running.Go(func() {
			defer p.remove(client)
			server, err := net.Dial("tcp", p.server)
			if err != nil {
				return
			}
			if !p.add(server) {
				_ = server.Close()
				return
			}
			defer p.remove(server)
			var both sync.WaitGroup
			both.Go(func() { p.copy(server, client, func(c Cut) bool { return c.ToServer }) })
			both.Go(func() { p.copy(client, server, func(c Cut) bool { return c.ToProcess }) })
			both.Wait()
		})
	}
}

// copy copies bytes until an end of the connection is closed, and waits while the network is cut.
func (p *Proxy) copy(to, from net.Conn, isCut func(Cut) bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if !p.pass(isCut) {
				return
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// pass waits while the network is cut, and returns false if the Proxy is closed.
func (p *Proxy) pass(isCut func(Cut) bool) bool {
	for {
		p.mu.Lock()
		waits, changed, closed := isCut(p.cut), p.changed, p.closed
		p.mu.Unlock()
		if closed || !waits {
			return !closed
		}
		<-changed
	}
}

func (p *Proxy) close() {
	_ = p.listener.Close()
	p.mu.Lock()
	p.closed = true
	close(p.changed)
	p.changed = make(chan struct{})
	for c := range p.conns {
		_ = c.Close()
	}
	p.mu.Unlock()
	p.running.Wait()
}
