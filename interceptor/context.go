package interceptor

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

type contextKey struct{}

// A callKey is where the context of a call that an Authenticator has seen has its callContext.
type callKey struct{}

// FromContext returns the key that the call was admitted with, in a handler or an interceptor
// behind the Authenticator. It is false for a call of a public method, and for a call without a
// credential of an Optional one.
func FromContext(ctx context.Context) (*keystore.Key, bool) {
	k, ok := ctx.Value(contextKey{}).(*keystore.Key)
	return k, ok && k != nil
}

// NewContext returns a context from which FromContext gets k: for testing a handler without a server.
func NewContext(ctx context.Context, k *keystore.Key) context.Context {
	return context.WithValue(ctx, contextKey{}, k)
}

// A callContext is what a handler gets: it has the key, and incoming metadata without the credential.
//
// The metadata is stripped when somebody asks for it, and each time, because most handlers never do, and a copy for
// every call would cost more than verifying the key. To do that it need not know under which key gRPC keeps metadata:
// whatever value is a metadata.MD is stripped.
//
// The Verifier gets one too, which tells a key store the caller's address, when that asks for it, and so does the
// ErrorMapper.
type callContext struct {
	context.Context
	auth *Authenticator
	key  *keystore.Key // nil in a public method, and before the call is admitted

	stream *stream // whose handler has this context; nil for unary calls, public methods and mappers
}

func (c *callContext) Value(key any) any {
	if key == (contextKey{}) && c.key != nil {
		return c.key
	}
	if key == (callKey{}) {
		return c
	}
	if key == (clientaddr.Key{}) {
		return c.auth.proxies.clientAddr(c.Context)
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

// String keeps fmt from printing the contexts below, one of which holds the credential.
func (c *callContext) String() string { return "interceptor.callContext" }

// GoString is String for %#v.
func (c *callContext) GoString() string { return c.String() }
