package interceptor

import (
	"context"

	"google.golang.org/grpc"
)

// CancelUnary ends unary calls with their key, as streams end. When the key is revoked, disabled,
// changed to admit less, or expires, the context of the handler is cancelled, and the client gets
// the status that the client of a stream gets, also if the handler does not return. Once Revoke has
// returned, the reply of a handler that returns later is not sent; the reply of a handler that
// returned before may still arrive. Each call costs what opening a stream costs the store, a few
// microseconds. Without CancelUnary, a unary call that was admitted runs to its end. Calls of
// Public methods, and calls without a credential of Optional methods, are not ended.
func CancelUnary() Option {
	return Option{func(c *config) error {
		c.cancelUnary = true
		return nil
	}}
}

// A unaryCall is a unary call in the form that newStream takes. It has no messages: the handler
// never sees the stream.
type unaryCall struct {
	grpc.ServerStream
	ctx context.Context
}

func (u unaryCall) Context() context.Context { return u.ctx }

// callBound calls the handler with a context that ends when the key no longer admits the call.
func (a *Authenticator) callBound(
	call *callContext, r rule, method string, req any, handler grpc.UnaryHandler,
) (any, error) {
	bound, key, release, err := a.bind(call, r)
	if err != nil {
		return nil, a.refusalStatus(call, method, err).Err()
	}
	defer release()
	s := a.newStream(unaryCall{ctx: call.Context}, bound, call, key, method)
	defer s.finish()
	reply, err := handler(s.ctx, req)
	if ended := s.ended(); ended != nil {
		return nil, ended
	}
	return reply, err
}
