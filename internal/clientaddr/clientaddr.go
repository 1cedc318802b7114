// Package clientaddr carries the address of a caller in a context. Package interceptor knows the
// connection and sets the address; package keystore reads the address.
package clientaddr

import (
	"context"
	"net/netip"
)

// Key is the context key of the address. The value is a netip.Addr. Key is exported so that a
// context type can return the address from its method Value. To wrap that context with NewContext
// would cost every call an allocation.
type Key struct{}

// NewContext returns a context with the address.
func NewContext(ctx context.Context, addr netip.Addr) context.Context {
	return context.WithValue(ctx, Key{}, addr)
}

// FromContext returns the address in ctx, without a zone. An IPv4-mapped IPv6 address is returned
// as IPv4. If ctx has no address, FromContext returns the zero Addr.
func FromContext(ctx context.Context) netip.Addr {
	addr, _ := ctx.Value(Key{}).(netip.Addr)
	return addr.Unmap().WithZone("")
}
