package interceptor

import (
	"context"

	"google.golang.org/grpc"
)

// CancelUnary ends a unary call when its key ends, as a stream ends. A key ends when the key is
// revoked, disabled or narrowed, or when the key expires. The context of the handler is then
// cancelled. The client gets the same status as the client of a stream, even if the handler does
// not return. After Revoke has returned, the server does not send the reply of a handler that
// returns later. The reply of a handler that returned before may still arrive.
//
// Each call costs the store as much as opening a stream, a few microseconds. Without CancelUnary, a
// unary call that was accepted runs to completion. CancelUnary does not end calls without a key:
// calls of Public methods, and calls of Optional methods without a credential.
func CancelUnary() Option {
	return Option{func(c *config) error {
		c.cancelUnary = true
		return nil
	}}
}

// A unaryCall adapts a unary call to newStream. Only Context works, and the handler never sees the
// stream.
type unaryCall struct {
	grpc.ServerStream
	ctx context.Context
}

func (u unaryCall) Context() context.Context { return u.ctx }

// callBound calls the handler of a unary call with a context that ends with the key.
func (a *Authenticator) callBound(
	call *callContext, r rule, method string, req any, handler grpc.UnaryHandler,
) (any, error) {
	session, err := a.bind(call, r)
	if err != nil {
		return nil, a.refusalStatus(call, method, true, err).Err()
	}
	defer session.Close()
	s := a.newStream(unaryCall{ctx: call.Context}, session, call, method, true)
	defer s.finish()
	reply, err := handler(s.ctx, req)
	if ended := s.ended(); ended != nil {
		return nil, ended
	}
	return reply, err
}
