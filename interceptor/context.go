package interceptor

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
	"github.com/grpc-api-key/grpc-api-key/internal/credit"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// FromContext returns the key of the caller. Use FromContext in a handler, or in an interceptor
// that runs after the Authenticator. FromContext returns false if the method is Public, and if the
// method is Optional and the call has no credential.
func FromContext(ctx context.Context) (*keystore.Key, bool) {
	k, ok := ctx.Value(admission.KeyContext{}).(*keystore.Key)
	return k, ok && k != nil
}

// NewContext returns a context for which FromContext returns k. Use NewContext to test a handler
// without a server.
func NewContext(ctx context.Context, k *keystore.Key) context.Context {
	return context.WithValue(ctx, admission.KeyContext{}, k)
}

// A callContext is the context of a handler. It has the key of the caller, and the incoming
// metadata without the credential.
//
// Value removes the credential from a copy of the metadata, on each request for the metadata. Most
// handlers never read metadata, and a copy for every call would cost more than verifying the key.
// The context key that gRPC uses for metadata is private, so Value copies every value of the type
// metadata.MD.
//
// The Verifier and the ErrorMapper get a callContext too. A key store reads the address of the
// caller from it.
type callContext struct {
	context.Context
	auth *Authenticator
	key  *keystore.Key // nil in a public method, and before the key is verified

	// stream is the stream whose handler has this context. It is nil in public methods, for
	// unary calls without CancelUnary, and for the Verifier and the ErrorMapper.
	stream *stream

	md     metadata.MD // for incoming only; nil at all other times
	waited bool        // verify has waited for credits: see payment
}

// incoming returns the incoming metadata of the call, with the credential. The metadata are not a
// copy, so the caller must not change the metadata. Do not call incoming once the handler has c.
//
// Package metadata returns only copies, which cost an allocation for each header of each call. So
// incoming gives package metadata a context that notes the metadata and withholds the metadata.
func (c *callContext) incoming() metadata.MD {
	metadata.ValueFromIncomingContext((*metadataNoter)(c), "")
	md := c.md
	c.md = nil
	return md
}

// A metadataNoter is a callContext whose method Value puts metadata into the field md. Both types
// have the same memory, so incoming allocates nothing.
type metadataNoter callContext

func (n *metadataNoter) Value(key any) any {
	n.md, _ = n.Context.Value(key).(metadata.MD)
	return nil
}

func (c *callContext) Value(key any) any {
	if key == (admission.KeyContext{}) && c.key != nil {
		return c.key
	}
	if key == (admission.SeenContext{}) {
		return c
	}
	if key == (credit.Key{}) {
		return nil // what the handler verifies is another call
	}
	if key == (clientaddr.Key{}) {
		return c.auth.clientAddr(c.Context)
	}
	value := c.Context.Value(key)
	if md, ok := value.(metadata.MD); ok {
		return c.auth.credentials.strip(md)
	}
	if c.stream != nil {
		if t, ok := value.(grpc.ServerTransportStream); ok && c.stream.hasEnded() {
			return endedTransport{t, c.stream}
		}
	}
	return value
}

// A freeContext is the callContext for the Verifier, which takes no credits: the interceptor takes
// the cost of the call after all checks.
type freeContext struct{ *callContext }

func (c freeContext) Value(key any) any {
	if key == (credit.Key{}) {
		return int64(0)
	}
	return c.callContext.Value(key)
}

// A payment is the callContext for Key.Spend, and then for a Verifier that takes nothing again.
type payment struct{ *callContext }

func (p payment) Value(key any) any {
	switch key {
	case credit.Waits{}:
		return func() { p.waited = true }
	case credit.Key{}:
		return credit.Paid{}
	}
	return p.callContext.Value(key)
}

// String prevents fmt from printing the parent contexts, because one of them contains the
// credential.
func (c *callContext) String() string { return "interceptor.callContext" }

// GoString is String for %#v.
func (c *callContext) GoString() string { return c.String() }
