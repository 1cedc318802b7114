package interceptor

import (
	"context"
	"errors"
)

// A Call describes a call that was refused, or that ended with its key.
type Call struct {
	// Method is the full method name if the server has the method, and OtherMethod if not: see
	// OtherMethod. So Method may be the label of a metric. Refusal.Method is the text that the
	// caller sent.
	Method string
	// Ended is false if the call was refused before the handler ran. Ended is true if the handler
	// ran, and the key then ended the call: a stream, or, with CancelUnary, a unary call.
	Ended bool
	// Refusal has the reason, the key if it is known, and the address of the caller.
	Refusal *Refusal
}

// OtherMethod is the Call.Method of every method that the server does not have. Callers can
// send any text as the method if the server has a grpc.UnknownServiceHandler, or a tap handle:
// see Authenticator.Tap. Tap does not know the methods of the server, so a method that Tap refuses
// counts as known only if a rule names the method. OpenTelemetry has the same word.
const OtherMethod = "_OTHER"

// Observe makes the Authenticator call f for each refused call, and for each call that ends with
// its key, to count the calls or to trace them. Every f is called if Observe is given several
// times. Accepted calls do not reach f: keystore.Stats counts these calls, at no cost.
//
// The context is the context of the call, without the credential. A refused call reaches f before
// the client gets the status, on the goroutine of the call; a call that Tap refuses delays the
// other calls of its connection. A call that has ended reaches f once, before the interceptor
// returns, on any goroutine.
//
// f must be quick and safe for concurrent use, and must not change the Refusal. If f panics, the
// panic is logged: see LogRefusals. If f is nil, New returns an error.
func Observe(f func(context.Context, Call)) Option {
	return Option{func(c *config) error {
		if f == nil {
			return errors.New("Observe: the function is nil")
		}
		c.observers = append(c.observers, f)
		return nil
	}}
}

// observers are the functions of Observe.
type observers []func(context.Context, Call)

func newCall(message string, known bool, r *Refusal) Call {
	c := Call{Method: OtherMethod, Ended: message == callEnded, Refusal: r}
	if known {
		c.Method = r.Method
	}
	return c
}

// notify calls each observer.
func (a *Authenticator) notify(ctx context.Context, c Call) {
	for _, f := range a.observers {
		a.notifyOne(ctx, c, f)
	}
}

// notifyOne calls one observer, and recovers its panic for the reason that mapStatus gives.
func (a *Authenticator) notifyOne(ctx context.Context, c Call, f func(context.Context, Call)) {
	defer a.log.Recovered(ctx, "function of Observe panicked",
		c.Refusal.Reason, methodAttr(c.Refusal.Method))
	f(ctx, c)
}
