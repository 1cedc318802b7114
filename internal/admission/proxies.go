package admission

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
)

// Proxies finds the address of a caller behind trusted proxies. The zero value trusts no proxy.
type Proxies struct {
	header     string // lower case
	networks   []netip.Prefix
	transports []string // names of net.Addr.Network, for proxies without an address
}

// TrustNetworks trusts the proxies in the networks, for the option TrustProxy.
func (p *Proxies) TrustNetworks(header string, networks []netip.Prefix) error {
	switch {
	case len(p.networks) > 0:
		return errors.New(
			"TrustProxy is given twice: name all proxies in one TrustProxy option",
		)
	case len(networks) == 0:
		return errors.New("TrustProxy: no proxies: name the networks of the proxies")
	}
	for _, n := range networks {
		switch {
		case !n.IsValid() || n.Addr().Is4In6():
			return fmt.Errorf("TrustProxy: %v is not a network", n)
		case n.Masked() != n:
			return fmt.Errorf("TrustProxy: %v has address bits after the mask: "+
				"write %v, or %v/%d for one address",
				n, n.Masked(), n.Addr(), n.Addr().BitLen())
		case n.Bits() == 0:
			return fmt.Errorf("TrustProxy: %v contains every caller, "+
				"so every caller could claim every address: name the networks of the proxies",
				n)
		}
	}
	p.networks = slices.Clone(networks)
	return p.setHeader("TrustProxy", header)
}

// TrustTransports trusts all callers over the transports, for the option TrustProxyTransport.
func (p *Proxies) TrustTransports(header string, transports []string) error {
	switch {
	case len(p.transports) > 0:
		return errors.New("TrustProxyTransport is given twice: " +
			"name all transports in one TrustProxyTransport option")
	case len(transports) == 0:
		return errors.New("TrustProxyTransport: no transports: name the transports, " +
			"such as unix or bufconn")
	}
	for _, n := range transports {
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
	p.transports = slices.Clone(transports)
	return p.setHeader("TrustProxyTransport", header)
}

// setHeader sets the header for an option. All options must name the same header.
func (p *Proxies) setHeader(option, header string) error {
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

// A Proxy is the trusted proxy that sent a call. The zero value means that the caller connects
// directly.
type Proxy struct {
	addr      netip.Addr
	transport string // for a proxy without an address
}

// String returns the address or the transport, or "" for the zero value.
func (p Proxy) String() string {
	if p.addr.IsValid() {
		return p.addr.String()
	}
	return p.transport
}

// Client returns the address of the caller, or the zero Addr if the address is not known, and the
// proxy that sent the call. The addresses remote and local are those of the connection, and may be
// nil. The function values returns the values of a header, by its name in lower case.
func (p *Proxies) Client(
	remote, local net.Addr, values func(lower string) []string,
) (netip.Addr, Proxy) {
	if remote == nil {
		return netip.Addr{}, Proxy{}
	}
	addr := peerAddr(remote, local)
	var through Proxy
	switch {
	case p.header == "":
		return addr, Proxy{}
	case addr.IsValid() && p.isProxy(addr):
		through.addr = addr
	case !addr.IsValid() && p.isTransport(remote):
		through.transport = remote.Network()
	case !addr.IsValid() && local != nil && p.isTransport(local):
		through.transport = local.Network()
	default:
		return addr, Proxy{}
	}
	return p.forwarded(values(p.header)), through
}

// peerAddr returns the address of the other end of a connection, or the zero Addr if the other end
// has no address.
func peerAddr(remote, local net.Addr) netip.Addr {
	// A client can bind its end of a unix socket to any name, such as "192.0.2.1:80". In net/http,
	// only the address of the server end has the network "unix".
	for _, end := range []net.Addr{remote, local} {
		if end != nil && strings.HasPrefix(end.Network(), "unix") {
			return netip.Addr{}
		}
	}
	if tcp, ok := remote.(*net.TCPAddr); ok {
		return normalizeAddr(tcp.AddrPort().Addr())
	}
	// In net/http, the address is the RemoteAddr of the request. Middleware may have removed the
	// port.
	return parseAddr(remote.String())
}

func (p *Proxies) isTransport(end net.Addr) bool {
	return slices.Contains(p.transports, end.Network())
}

// normalizeAddr returns an IPv4-mapped IPv6 address as IPv4, and an address without its zone.
func normalizeAddr(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func (p *Proxies) isProxy(addr netip.Addr) bool {
	return slices.ContainsFunc(p.networks, func(n netip.Prefix) bool { return n.Contains(addr) })
}

// forwarded returns the last address in the values of the header that is not an address of a proxy.
// If all addresses belong to proxies, forwarded returns the first one.
func (p *Proxies) forwarded(values []string) (addr netip.Addr) {
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

// Origin returns the text of an error about where a call came from. addr and proxy are those of a
// Refusal: an invalid addr is not known, and an empty proxy means that no trusted proxy sent the
// call.
func Origin(addr netip.Addr, proxy string) string {
	from := "an unknown address"
	if addr.IsValid() {
		from = addr.String()
	}
	if proxy != "" {
		from += " through proxy " + proxy
	}
	return from
}
