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

// TrustProxy lets a server behind reverse proxies see the addresses of the real callers. If a
// call comes from an address in proxies, the address of the caller is the last address in the
// metadata header that is not an address of a proxy. The header is, for example, "x-forwarded-for".
// On calls from other addresses the header is ignored, because every client can send the header. If
// a proxy sends no header, or a header that is not a list of addresses, the address of the caller
// is unknown, and keys with AllowedNetworks are refused.
//
// Every proxy on the way must append to the header or replace it. Ports in the header are ignored.
//
// Every host in the networks can claim every address. If you name the pod network of a Kubernetes
// cluster, every pod can claim every address, and AllowedNetworks and LimitFailures restrict only
// callers from outside the cluster. So name the addresses of the proxies, or a subnet that contains
// only proxies, or let only the proxies connect by a network policy.
//
// New returns an error for a network with address bits after the mask, for a network that contains
// every address, and for a header with another syntax, such as "forwarded" (RFC 7239). For a proxy
// that has no address, see TrustProxyTransport.
func TrustProxy(header string, proxies ...netip.Prefix) Option {
	return Option{func(c *config) error {
		switch {
		case len(c.proxies.networks) > 0:
			return errors.New(
				"TrustProxy is given twice: name all proxies in one TrustProxy option",
			)
		case len(proxies) == 0:
			return errors.New("TrustProxy: no proxies: name the networks of the proxies")
		}
		for _, p := range proxies {
			switch {
			case !p.IsValid() || p.Addr().Is4In6():
				return fmt.Errorf("TrustProxy: %v is not a network", p)
			case p.Masked() != p:
				return fmt.Errorf("TrustProxy: %v has address bits after the mask: "+
					"write %v, or %v/%d for one address",
					p, p.Masked(), p.Addr(), p.Addr().BitLen())
			case p.Bits() == 0:
				return fmt.Errorf("TrustProxy: %v contains every caller, "+
					"so every caller could claim every address: name the networks of the proxies",
					p)
			}
		}
		c.proxies.networks = slices.Clone(proxies)
		return c.proxies.setHeader("TrustProxy", header)
	}}
}

// TrustProxyTransport is TrustProxy for a proxy that connects over a transport without addresses.
// Name the transport as net.Addr.Network does: "unix" for nginx or Envoy on a unix socket,
// "bufconn" for a gateway in the same process. You may give both TrustProxyTransport and
// TrustProxy, with the same header.
//
// TrustProxyTransport is safe only if no process except the proxy can connect. Every process that
// connects over the transport can claim every address. A unix socket is safe in a directory that
// only the server and the proxy may enter. An abstract unix socket of Linux has no permissions and
// is not safe. A bufconn listener is safe, because only the process itself can connect.
func TrustProxyTransport(header string, networks ...string) Option {
	return Option{func(c *config) error {
		switch {
		case len(c.proxies.transports) > 0:
			return errors.New("TrustProxyTransport is given twice: " +
				"name all transports in one TrustProxyTransport option")
		case len(networks) == 0:
			return errors.New("TrustProxyTransport: no transports: name the transports, " +
				"such as unix or bufconn")
		}
		for _, n := range networks {
			switch {
			case n == "" || strings.Trim(n, "abcdefghijklmnopqrstuvwxyz0123456789-_+.") != "":
				return fmt.Errorf("TrustProxyTransport: %q is not the name of a transport, "+
					"such as unix or bufconn", n)
			case strings.HasPrefix(n, "tcp"), strings.HasPrefix(n, "udp"),
				strings.HasPrefix(n, "ip"):
				return fmt.Errorf("TrustProxyTransport: callers over %s have addresses: "+
					"name the proxies with TrustProxy", n)
			}
		}
		c.proxies.transports = slices.Clone(networks)
		return c.proxies.setHeader("TrustProxyTransport", header)
	}}
}

// proxies finds the address of a caller behind trusted proxies. The zero value trusts no proxy.
type proxies struct {
	header     string // lower case
	networks   []netip.Prefix
	transports []string // names of net.Addr.Network, for proxies without an address
}

// setHeader sets the header for an option. All options must name the same header.
func (p *proxies) setHeader(option, header string) error {
	lower := strings.ToLower(header)
	if err := checkHeader(lower); err != nil {
		return fmt.Errorf("%s: the header %q: %w", option, header, err)
	}
	switch lower {
	case "forwarded":
		return fmt.Errorf("%s: the header %q has the syntax of RFC 7239, which is not supported: "+
			"make the proxies send X-Forwarded-For", option, header)
	case "via", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto":
		return fmt.Errorf("%s: the header %q does not contain the address of a caller: "+
			"name a header that does, such as X-Forwarded-For", option, header)
	}
	if p.header != "" && p.header != lower {
		return fmt.Errorf("%s: the header %q differs from %q: all proxies must set the same header",
			option, header, p.header)
	}
	p.header = lower
	return nil
}

// clientAddr returns the address of the caller, or the zero Addr if the address is not known. On a
// unix socket, for example, it is not.
func (p *proxies) clientAddr(ctx context.Context) netip.Addr {
	addr, _ := p.client(ctx)
	return addr
}

// A proxy is the trusted proxy that sent a call. The zero value means that the caller connects
// directly.
type proxy struct {
	addr      netip.Addr
	transport string // for a proxy without an address
}

// String returns the address or the transport, or "" for the zero value.
func (p proxy) String() string {
	if p.addr.IsValid() {
		return p.addr.String()
	}
	return p.transport
}

// client returns the address of the caller, or the zero Addr if the address is not known, and the
// proxy that sent the call.
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

// peerAddr returns the address of the other end of a connection, or the zero Addr if the other end
// has no address.
func peerAddr(p *peer.Peer) netip.Addr {
	// A client can bind its end of a unix socket to any name, such as "192.0.2.1:80". Under
	// ServeHTTP, only the address of the server end has the network "unix".
	for _, end := range []net.Addr{p.Addr, p.LocalAddr} {
		if end != nil && strings.HasPrefix(end.Network(), "unix") {
			return netip.Addr{}
		}
	}
	if tcp, ok := p.Addr.(*net.TCPAddr); ok {
		return normalizeAddr(tcp.AddrPort().Addr())
	}
	// Under ServeHTTP, the address is the RemoteAddr of the request. Middleware may have removed
	// the port.
	return parseAddr(p.Addr.String())
}

func (p *proxies) isTransport(end net.Addr) bool {
	return slices.Contains(p.transports, end.Network())
}

// normalizeAddr returns an IPv4-mapped IPv6 address as IPv4, and an address without its zone.
func normalizeAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func (p *proxies) isProxy(addr netip.Addr) bool {
	return slices.ContainsFunc(p.networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// forwarded returns the last address in the values of the header that is not an address of a proxy.
// If all addresses belong to proxies, forwarded returns the first one.
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

// parseAddr parses an address with or without a port: 192.0.2.1, 192.0.2.1:80, 2001:db8::1,
// [2001:db8::1], [2001:db8::1]:80. For any other text, parseAddr returns the zero Addr.
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
