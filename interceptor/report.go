package interceptor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

// A Refusal is the error that an ErrorMapper gets. It contains the reason why a call was refused,
// or why a stream ended with its key. A Refusal wraps the error of the Verifier: errors.Is finds
// the errors of package keystore, and errors.As finds a *keystore.RateLimitError or a
// *keystore.CreditsError. A Refusal is meant for logs and for operators of the server. Do not show
// the text to callers. A Refusal never contains the credential.
type Refusal struct {
	// Reason is one word of a fixed set, and so may be the label of a metric. The words are those
	// of keystore.Reason and
	//
	//	missing, scheme, several    no credential, a missing or wrong scheme, several credentials
	//	insecure                    plaintext, and RequireTLS is set
	//	scope                       the key lacks a scope
	//	throttled                   LimitFailures
	//	no_rule                     RequireRules is set, and no rule names the method
	//	twice                       the server has two Authenticators in a row
	Reason string
	// KeyID is the ID of the key. KeyID is empty unless the caller sent the whole key with its
	// secret. So a caller cannot blame the key of another caller.
	KeyID string
	// Method is the full method name. If the server has a grpc.UnknownServiceHandler, callers can
	// send any text as the method.
	Method string
	// Addr is the address of the caller: the address that is compared with the AllowedNetworks of
	// keys. The zero Addr means that the address is not known.
	Addr netip.Addr
	// Proxy is the address of the trusted proxy that sent the call: see TrustProxy. For a proxy
	// without an address, Proxy is the name of the transport, such as "unix": see
	// TrustProxyTransport. Empty means that no such proxy sent the call.
	Proxy string

	err error
}

// Error returns the text of the wrapped error and the address of the caller, for example "API key
// denied: wrong network: the call came from 203.0.113.9 through proxy 10.0.0.4".
func (r *Refusal) Error() string {
	return fmt.Sprintf("%v: the call came from %s", r.err, admission.Origin(r.Addr, r.Proxy))
}

// Unwrap returns the error of the Verifier, or an unexported error of this package.
func (r *Refusal) Unwrap() error { return r.err }

// withKeyID adds the ID of the key to an error of the Verifier, if the error proves that the token
// has the secret of the key.
func (a *Authenticator) withKeyID(text string, err error) error {
	if id := admission.ProvenKeyID(a.verifier, text, err); id != "" {
		return &Refusal{KeyID: id, err: err}
	}
	return err
}

// newRefusal returns a complete Refusal for err. The error may be a Refusal that has only the ID of
// the key.
func (a *Authenticator) newRefusal(ctx context.Context, fullMethod string, err error) *Refusal {
	r := &Refusal{err: err}
	if known := (*Refusal)(nil); errors.As(err, &known) {
		r.KeyID, r.err = known.KeyID, known.err
	}
	addr, through := a.client(ctx)
	r.Reason, r.Method, r.Addr, r.Proxy = admission.ReasonOf(r.err), fullMethod, addr, through.String()
	return r
}

// mapStatus returns the status that the ErrorMapper chooses, or byDefault without an ErrorMapper.
// If the ErrorMapper panics, mapStatus recovers the panic and returns byDefault. The goroutine may
// belong to the store, where no interceptor recovers panics, so the panic would end the process.
func (a *Authenticator) mapStatus(
	ctx context.Context, r *Refusal, byDefault *status.Status,
) (st *status.Status) {
	if a.mapper == nil {
		return byDefault
	}
	st = byDefault
	defer a.log.Recovered(ctx, "ErrorMapper panicked: the caller gets the default status",
		r.Reason, methodAttr(r.Method))
	mapped := a.mapper(ctx, r.Method, r, byDefault)
	if mapped.Code() != codes.OK { // the code of a nil Status is OK
		return mapped
	}
	return byDefault
}

// LogRefusals logs each refused call, and each stream that ends with its key, to logger. A line has
// these attributes:
//
//	reason                 the Reason of a Refusal
//	key                    the ID of the key, if the caller sent the whole key
//	scopes                 the scopes that the rule names, only if the key lacks a scope
//	method, addr, proxy    the Method, Addr and Proxy of a Refusal; addr and proxy only if known
//	error                  the text of the error, only if the code is Unavailable or Internal
//	suppressed             the number of lines of this reason that were dropped before this line
//
// The level is Error if the server or the store has a fault, Info if the caller cancelled the call
// or its deadline has passed, and Warn for every other reason. The log never contains the
// credential. The only text of a caller in the log is the method: at most 256 bytes, without
// unprintable characters.
//
// A flood of refusals does not fill the disk. Each reason has a bucket of 10 lines, and gets one
// more line per second: at most 86,400 lines a day, about 20 MB. Refused calls and ended streams
// have separate buckets. The number of reasons bounds the memory. The next line of a reason reports
// the number of dropped lines. If no line of the reason follows, this number is lost.
//
// The logger's handler gets the context of the call, without the credential. So a handler that adds
// the IDs of the trace and the span to each line adds the IDs to these lines too: see LogHandler of
// package otelkeys.
//
// Without LogRefusals, only three faults of the program are logged, to slog.Default and with the
// same limits: a Verifier that returns no key and no error, an ErrorMapper that panics, and a
// function of Observe that panics. If logger is nil, New returns an error.
func LogRefusals(logger *slog.Logger) Option {
	return Option{func(c *config) error {
		if logger == nil {
			return errors.New(
				"LogRefusals: the logger is nil: give a logger, such as slog.Default()",
			)
		}
		c.logger = logger
		return nil
	}}
}

const (
	callRefused = "gRPC call refused"
	callEnded   = "gRPC call ended with its API key"
)

// methodAttr is the attribute for a method in the log.
func methodAttr(method string) slog.Attr {
	return slog.String("method", admission.Printable(method))
}
