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
func TrustProxy(header string, proxies ...netip.Prefix) Option {
	return Option{func(a *Authenticator) error {
		switch {
		case a.proxyHeader != "":
			return errors.New("TrustProxy is given twice: name all proxies in one")
		case header == "":
			return errors.New("TrustProxy: the header has no name")
		case len(proxies) == 0:
			return errors.New("TrustProxy: name the networks of the proxies")
		}
		for _, p := range proxies {
			if !p.IsValid() || p.Addr().Is4In6() {
				return fmt.Errorf("TrustProxy: %v is not a network", p)
			}
		}
		a.proxyHeader = strings.ToLower(header)
		a.proxies = slices.Clone(proxies)
		return nil
	}}
}

// clientAddr returns the address that a call comes from, or the zero Addr if it is not known: on a unix socket, for
// example.
func (a *Authenticator) clientAddr(ctx context.Context) netip.Addr {
	p, ok := peer.FromContext(ctx)
	if !ok || p.Addr == nil {
		return netip.Addr{}
	}
	// A client binds its end of a unix socket to a name of its choice, such as "192.0.2.1:80". Of a call through ServeHTTP
	// only the server's end says that it is one.
	for _, end := range []net.Addr{p.Addr, p.LocalAddr} {
		if end != nil && strings.HasPrefix(end.Network(), "unix") {
			return netip.Addr{}
		}
	}
	addr := addrOf(p.Addr)
	if a.proxyHeader == "" || !a.isProxy(addr) {
		return addr
	}
	return a.forwarded(metadata.ValueFromIncomingContext(ctx, a.proxyHeader))
}

func addrOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return clean(tcp.AddrPort().Addr())
	}
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	return clean(ap.Addr())
}

func clean(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func (a *Authenticator) isProxy(addr netip.Addr) bool {
	return slices.ContainsFunc(a.proxies, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// forwarded returns the last address in a header's values that is not a proxy's, or, if all are, the first.
func (a *Authenticator) forwarded(values []string) (addr netip.Addr) {
	for _, value := range slices.Backward(values) {
		for more := true; more; {
			i := strings.LastIndexByte(value, ',')
			addr = parseForwarded(strings.Trim(value[i+1:], " \t"))
			if !addr.IsValid() || !a.isProxy(addr) {
				return addr
			}
			if more = i >= 0; more {
				value = value[:i]
			}
		}
	}
	return addr
}

// parseForwarded parses an address, with or without a port: 192.0.2.1, 192.0.2.1:80, 2001:db8::1, [2001:db8::1],
// [2001:db8::1]:80.
func parseForwarded(s string) netip.Addr {
	if addr, err := netip.ParseAddr(s); err == nil {
		return clean(addr)
	}
	if ap, err := netip.ParseAddrPort(s); err == nil {
		return clean(ap.Addr())
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		if inner, ok = strings.CutSuffix(inner, "]"); ok {
			if addr, err := netip.ParseAddr(inner); err == nil && addr.Is6() {
				return clean(addr)
			}
		}
	}
	return netip.Addr{}
}
