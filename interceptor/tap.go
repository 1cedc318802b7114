package interceptor

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/tap"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Tap returns a handle that refuses calls without a plausible key before gRPC reads their messages.
// The interceptors of unary calls run after gRPC has read and decompressed the request, so that a
// stranger makes the server inflate 83 KB of gzip to as much as grpc.MaxRecvMsgSize allows. (The
// interceptors of streams run before.) Use the handle beside the interceptors:
//
//	server := grpc.NewServer(append(auth.ServerOptions(), grpc.InTapHandle(auth.Tap()))...)
//
// A plausible key has the form of a key of package keystore, and its checksum, which anybody can
// compute; a Verifier that takes other keys cannot have Tap. Tap does not ask the Verifier. It
// looks at what needs no store: the rule of the method, RequireTLS, LimitFailures, whether there is
// one credential, and its form. Callers are told the same as by the interceptors, also of methods
// that the server does not have. An ErrorMapper runs on the goroutine that reads the connection,
// and holds up its other calls. The Observer of the store does not see what Tap refuses.
//
// What Tap does not catch: keys that are made up with a right checksum, calls of Public and
// Optional methods, and calls through grpc.Server.ServeHTTP, which runs no tap handle. In grpc-go
// 1.85, a call that is refused and has a deadline leaves a timer until the deadline. So Tap refuses
// 4,096 such calls at most at any time, and leaves further ones to the interceptors: whoever sends
// 4,096 calls with a long deadline ends what Tap does about calls with a deadline.
func (a *Authenticator) Tap() tap.ServerInHandle {
	held := new(heldTimers)
	return func(ctx context.Context, info *tap.Info) (context.Context, error) {
		r := a.rules.forMethod(info.FullMethodName)
		if a.needsNoKey(ctx, r) || held.atLimit(ctx) {
			return ctx, nil
		}
		call := &callContext{Context: ctx, auth: a}
		err := a.checkPlausible(call, r)
		if err == nil {
			return ctx, nil
		}
		held.add(ctx)
		return ctx, a.refusalStatus(call, info.FullMethodName, err).Err()
	}
}

// checkPlausible returns why the call is refused, as far as that shows without the store.
func (a *Authenticator) checkPlausible(call *callContext, r rule) error {
	text, err := a.credentialFor(call, r)
	if err != nil {
		return err
	}
	if _, ok := token.Parse(text); !ok || !token.ChecksumOK(text) {
		return a.countFailure(call, keystore.ErrMalformed)
	}
	return nil
}

// maxHeld bounds the memory that refused calls hold: a few hundred bytes each, and the connection
// if it has ended.
const maxHeld = 4096

// heldTimers counts the timers that grpc-go leaves behind: http2Server.operateHeaders does not
// cancel the context of a call that a tap handle refuses. A context without a deadline is garbage
// then; the timer of a deadline holds its context.
type heldTimers struct{ n atomic.Int64 }

// atLimit reports whether the call has a deadline and must not be refused by the tap handle.
func (h *heldTimers) atLimit(ctx context.Context) bool {
	_, ok := ctx.Deadline()
	return ok && h.n.Load() >= maxHeld
}

// add counts the call until its deadline. It does not use context.AfterFunc, which would hold the
// metadata of the call too.
func (h *heldTimers) add(ctx context.Context) {
	if deadline, ok := ctx.Deadline(); ok {
		h.n.Add(1)
		time.AfterFunc(time.Until(deadline), func() { h.n.Add(-1) })
	}
}
