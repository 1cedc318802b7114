package interceptor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// TrustProxy takes the address of a caller who comes through one of the proxies from the metadata header that they set, such
// as "x-forwarded-for": the last address in it that is not a proxy's. From anybody else the header is ignored, as everyone
// can send it. A proxy that sends none, or something that is not a list of addresses, makes the caller's address
// unknown, and a key with AllowedNetworks is then refused.
//
// Every proxy on the way must append to the header, or replace it. Ports behind the addresses are ignored.
//
// Every host in the networks can claim every address. If the networks are a whole pod network of
// Kubernetes, each pod can: then AllowedNetworks and LimitFailures bind only callers from outside
// the network. So name the proxies' own addresses or a subnet that only proxies are in, or make a
// network policy let only the proxies connect.
//
// New refuses a network with bits behind its mask, a network of all addresses, and headers of
// another syntax, such as "forwarded" (RFC 7239). For a proxy that has no address, see
// TrustProxyTransport.
func TrustProxy(header string, proxies ...netip.Prefix) Option {
	return Option{func(c *config) error {
		switch {
		case len(c.proxies.networks) > 0:
			return errors.New("TrustProxy is given twice: name all proxies in one")
		case len(proxies) == 0:
			return errors.New("TrustProxy: name the networks of the proxies")
		}
		for _, p := range proxies {
			switch {
			case !p.IsValid() || p.Addr().Is4In6():
				return fmt.Errorf("TrustProxy: %v is not a network", p)
			case p.Masked() != p:
				return fmt.Errorf("TrustProxy: %v has bits behind its mask: write %v, or %v/%d for one address",
					p, p.Masked(), p.Addr(), p.Addr().BitLen())
			case p.Bits() == 0:
				return fmt.Errorf("TrustProxy: every caller is in %v, and could claim every address: name the proxies' networks", p)
			}
		}
		c.proxies.networks = slices.Clone(proxies)
		return c.proxies.setHeader("TrustProxy", header)
	}}
}

// TrustProxyTransport does what TrustProxy does, for a proxy that connects over a transport without
// addresses. Name the transport as net.Addr.Network does: "unix" for nginx or Envoy on a unix
// socket, "bufconn" for a gateway in the same process. TrustProxyTransport and TrustProxy may both
// be given, for the same header.
//
// This is safe only if nobody but the proxy can connect. Whoever connects to the transport can
// claim every address. A unix socket is safe in a directory that only the server and the proxy may
// enter; an abstract unix socket of Linux has no permissions, and is not safe. A bufconn listener
// is safe, because only the process itself has it.
func TrustProxyTransport(header string, networks ...string) Option {
	return Option{func(c *config) error {
		switch {
		case len(c.proxies.transports) > 0:
			return errors.New("TrustProxyTransport is given twice: name all transports in one")
		case len(networks) == 0:
			return errors.New(`TrustProxyTransport: name the transports, such as "unix" or "bufconn"`)
		}
		for _, n := range networks {
			switch {
			case n == "" || strings.Trim(n, "abcdefghijklmnopqrstuvwxyz0123456789-_+.") != "":
				return fmt.Errorf("TrustProxyTransport: %q is not the name of a transport, such as unix or bufconn", n)
			case strings.HasPrefix(n, "tcp"), strings.HasPrefix(n, "udp"), strings.HasPrefix(n, "ip"):
				return fmt.Errorf("TrustProxyTransport: callers over %s have addresses: name the proxies with TrustProxy", n)
			}
		}
		c.proxies.transports = slices.Clone(networks)
		return c.proxies.setHeader("TrustProxyTransport", header)
	}}
}

// proxies are the trusted proxies of a server. The zero proxies trust no proxy.
type proxies struct {
	header     string // lower case
	networks   []netip.Prefix
	transports []string // of proxies without an address, as net.Addr.Network names them
}

func (p *proxies) setHeader(option, header string) error {
	lower := strings.ToLower(header)
	if err := checkHeader(lower); err != nil {
		return fmt.Errorf("%s: the header %q: %w", option, header, err)
	}
	switch lower {
	case "forwarded":
		return fmt.Errorf("%s: the header %q has the syntax of RFC 7239, which is not read here: have the proxies send X-Forwarded-For",
			option, header)
	case "via", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto":
		return fmt.Errorf("%s: the header %q does not hold the address of a caller: name one that does, such as X-Forwarded-For",
			option, header)
	}
	if p.header != "" && p.header != lower {
		return fmt.Errorf("%s: the header %q is another than %q: all proxies must set the same", option, header, p.header)
	}
	p.header = lower
	return nil
}

// clientAddr returns the address that a call comes from, or the zero Addr if it is not known: on a unix socket, for
// example.
func (p *proxies) clientAddr(ctx context.Context) netip.Addr {
	addr, _ := p.client(ctx)
	return addr
}

// A proxy is the trusted proxy that a call came through; the zero proxy is none.
type proxy struct {
	addr      netip.Addr
	transport string // if it has no address
}

// String returns the address or the transport, or "" for none.
func (p proxy) String() string {
	if p.addr.IsValid() {
		return p.addr.String()
	}
	return p.transport
}

// client returns the address that a call comes from, or the zero Addr, and the proxy that it came
// through.
func (p *proxies) client(ctx context.Context) (netip.Addr, proxy) {
	from, ok := peer.FromContext(ctx)
	if !ok || from.Addr == nil {
		return netip.Addr{}, proxy{}
	}
	addr := peerAddr(from)
	var through proxy
	switch {
	case p.header == "":
		return addr, proxy{}
	case addr.IsValid() && p.isProxy(addr):
		through.addr = addr
	case !addr.IsValid() && p.isTransport(from.Addr):
		through.transport = from.Addr.Network()
	case !addr.IsValid() && from.LocalAddr != nil && p.isTransport(from.LocalAddr):
		through.transport = from.LocalAddr.Network()
	default:
		return addr, proxy{}
	}
	return p.forwarded(metadata.ValueFromIncomingContext(ctx, p.header)), through
}

// peerAddr returns the address of the other end of a connection, or the zero Addr if that end has
// none.
func peerAddr(p *peer.Peer) netip.Addr {
	// A client binds its end of a unix socket to a name of its choice, such as "192.0.2.1:80". Of a call through ServeHTTP
	// only the server's end says that it is one.
	for _, end := range []net.Addr{p.Addr, p.LocalAddr} {
		if end != nil && strings.HasPrefix(end.Network(), "unix") {
			return netip.Addr{}
		}
	}
	if tcp, ok := p.Addr.(*net.TCPAddr); ok {
		return normalizeAddr(tcp.AddrPort().Addr())
	}
	// Under ServeHTTP, it is the RemoteAddr of the request. Middleware may have set that to an
	// address without a port.
	return parseAddr(p.Addr.String())
}

func (p *proxies) isTransport(end net.Addr) bool {
	return slices.Contains(p.transports, end.Network())
}

func normalizeAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func (p *proxies) isProxy(addr netip.Addr) bool {
	return slices.ContainsFunc(p.networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// forwarded returns the last address in a header's values that is not a proxy's, or, if all are, the first.
func (p *proxies) forwarded(values []string) (addr netip.Addr) {
	for _, value := range slices.Backward(values) {
		for more := true; more; {
			i := strings.LastIndexByte(value, ',')
			addr = parseAddr(strings.Trim(value[i+1:], " \t"))
			if !addr.IsValid() || !p.isProxy(addr) {
				return addr
			}
			if more = i >= 0; more {
				value = value[:i]
			}
		}
	}
	return addr
}

// parseAddr parses an address, with or without a port: 192.0.2.1, 192.0.2.1:80, 2001:db8::1,
// [2001:db8::1], [2001:db8::1]:80.
func parseAddr(s string) netip.Addr {
	if addr, err := netip.ParseAddr(s); err == nil {
		return normalizeAddr(addr)
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return normalizeAddr(ap.Addr())
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		if inner, ok = strings.CutSuffix(inner, "]"); ok {
			if addr, err := netip.ParseAddr(inner); err == nil && addr.Is6() {
				return normalizeAddr(addr)
			}
		}
	}
	return netip.Addr{}
}
