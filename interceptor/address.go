package interceptor

import (
	"context"
	"net/netip"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
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
	return Option{func(c *config) error { return c.proxies.TrustNetworks(header, proxies) }}
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
	return Option{func(c *config) error { return c.proxies.TrustTransports(header, networks) }}
}

// client returns the address of the caller of a call, or the zero Addr if the address is not known,
// and the proxy that sent the call. On a unix socket, for example, the address is not known.
func (a *Authenticator) client(ctx context.Context) (netip.Addr, admission.Proxy) {
	from, ok := peer.FromContext(ctx)
	if !ok {
		return netip.Addr{}, admission.Proxy{}
	}
	return a.proxies.Client(from.Addr, from.LocalAddr, func(lower string) []string {
		return metadata.ValueFromIncomingContext(ctx, lower)
	})
}

// clientAddr returns the address of the caller of a call, as client does.
func (a *Authenticator) clientAddr(ctx context.Context) netip.Addr {
	addr, _ := a.client(ctx)
	return addr
}
