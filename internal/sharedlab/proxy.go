package sharedlab

import (
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// A Cut says which bytes a Proxy keeps back. The connections stay open, as they do when a network
// drops packets.
type Cut struct {
	ToMember, ToClient bool
}

// A Proxy is the network between one process and one member of etcd.
type Proxy struct {
	member   string // host and port
	listener net.Listener
	running  sync.WaitGroup

	mu      sync.Mutex // guards all below
	cut     Cut
	changed chan struct{} // closed when cut changes
	conns   map[net.Conn]struct{}
	closed  bool
}

// A Network has a Proxy for each member.
type Network []*Proxy

// Network returns the network of one process. The network ends with the test.
func (l *Lab) Network(t testing.TB) Network {
	var n Network
	for _, m := range l.Members {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		_, member, _ := strings.Cut(m.URL(), "://")
		p := &Proxy{member: member, listener: listener, changed: make(chan struct{}),
			conns: make(map[net.Conn]struct{})}
		p.running.Go(p.serve)
		t.Cleanup(p.close)
		n = append(n, p)
	}
	return n
}

// Endpoints returns the URLs of the proxies, for the client of the process.
func (n Network) Endpoints() (urls []string) {
	for _, p := range n {
		urls = append(urls, "http://"+p.listener.Addr().String())
	}
	return urls
}

// Cut cuts the network between the process and all members. The zero Cut heals the network, and
// what was kept back arrives late.
func (n Network) Cut(c Cut) {
	for _, p := range n {
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
			member, err := net.Dial("tcp", p.member)
			if err != nil {
				return
			}
			if !p.add(member) {
				_ = member.Close()
				return
			}
			defer p.remove(member)
			var both sync.WaitGroup
			both.Go(func() { p.copy(member, client, func(c Cut) bool { return c.ToMember }) })
			both.Go(func() { p.copy(client, member, func(c Cut) bool { return c.ToClient }) })
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
