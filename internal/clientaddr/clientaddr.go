// Package clientaddr carries a caller's address in a context, from whoever knows the connection to the key store.
package clientaddr

import (
	"context"
	"net/netip"
)

// Key is what a context is asked for; the value is a netip.Addr. It is exported so that a context type can answer
// without being wrapped in another, which every call would pay for.
type Key struct{}

// NewContext returns a context with the address.
func NewContext(ctx context.Context, addr netip.Addr) context.Context {
	return context.WithValue(ctx, Key{}, addr)
}

// FromContext returns the address, as IPv4 if it is one in IPv6's clothes, and without a zone. It is the zero Addr if
// none is known.
func FromContext(ctx context.Context) netip.Addr {
	addr, _ := ctx.Value(Key{}).(netip.Addr)
	return addr.Unmap().WithZone("")
}
