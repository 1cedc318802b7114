package interceptor

import (
	"context"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/tap"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Tap returns a tap handle that refuses calls without a plausible key before gRPC reads the
// request. The interceptors of unary calls run after gRPC has read and decompressed the request. So
// without Tap, a stranger can make the server inflate 88 KB of gzip to the size that
// grpc.MaxRecvMsgSize allows. (The interceptors of streams run before gRPC reads messages.) Use the
// handle in addition to the interceptors:
//
//	server := grpc.NewServer(append(auth.ServerOptions(), grpc.InTapHandle(auth.Tap()))...)
//
// A plausible key has the form of a key of package keystore and a correct checksum, or a format in
// Options.Legacy of the store. Do not use Tap with another Verifier that accepts other keys. Tap
// does not ask the Verifier. Tap checks only what needs no store: the rule of the method,
// RequireTLS, LimitFailures, the number of credentials, and the form of the key. Callers get the
// same statuses as from the interceptors, even for methods that the server does not have. An
// ErrorMapper runs on the goroutine that reads the connection, and delays the other calls of the
// connection. The Observer of the store does not see the refusals of Tap.
//
// Tap does not refuse invented keys with a correct checksum, which every client can compute. Tap
// does not refuse calls of Public methods, or calls of Optional methods without a credential. Under
// grpc.Server.ServeHTTP, gRPC calls no tap handle.
//
// In grpc-go 1.85, a refused call with a deadline leaves a timer until the deadline. So Tap refuses
// at most 4,096 such calls at any time, and leaves the others to the interceptors. A client that
// sends 4,096 calls with a long deadline therefore disables Tap for calls with a deadline.
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
		known := a.rules.names(info.FullMethodName)
		return ctx, a.refusalStatus(call, info.FullMethodName, known, err).Err()
	}
}

// checkPlausible returns an error if the call can be refused without the store.
func (a *Authenticator) checkPlausible(call *callContext, r rule) error {
	text, err := a.credentialFor(call, r)
	if err != nil {
		return err
	}
	_, native := token.Parse(text)
	plausible := native && token.ChecksumOK(text)
	if !native {
		_, plausible = admission.KeyID(a.verifier, text)
	}
	if !plausible {
		return a.countFailure(call, keystore.ErrMalformed)
	}
	return nil
}

// maxHeld limits the memory that refused calls retain. Each timer retains a few hundred bytes, and
// the connection, even after the connection has ended.
const maxHeld = 4096

// heldTimers counts the timers that grpc-go does not stop: http2Server.operateHeaders does not
// cancel the context of a call that a tap handle refuses. A context without a deadline is then
// garbage. The timer of a deadline retains its context until the deadline.
type heldTimers struct{ n atomic.Int64 }

// atLimit reports whether the tap handle must not refuse the call, because the call has a deadline
// and the limit is reached.
func (h *heldTimers) atLimit(ctx context.Context) bool {
	_, ok := ctx.Deadline()
	return ok && h.n.Load() >= maxHeld
}

// add counts the call until the deadline of the call. It does not use context.AfterFunc, which
// would retain the metadata of the call too.
func (h *heldTimers) add(ctx context.Context) {
	if deadline, ok := ctx.Deadline(); ok {
		h.n.Add(1)
		time.AfterFunc(time.Until(deadline), func() { h.n.Add(-1) })
	}
}
