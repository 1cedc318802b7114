package interceptor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"strings"
	"sync"
	"unicode"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Refusal is the error that an ErrorMapper gets. A Refusal says why a call was refused, or why a
// stream ended with its key. A Refusal wraps the error of the Verifier: errors.Is finds the errors
// of package keystore, and errors.As finds a *keystore.RateLimitError. A Refusal is for logs and
// for people who run the server. Do not show its text to callers. A Refusal never holds the
// credential.
type Refusal struct {
	// Reason is one word of a closed set, and may be the label of a metric. The set is the words of
	// keystore.Reason and
	//
	//	missing, scheme, several    no credential, a missing or wrong scheme, several credentials
	//	insecure                    plaintext, and RequireTLS is set
	//	scope                       the key lacks a scope
	//	throttled                   LimitFailures
	//	no_rule                     RequireRules is set, and no rule names the method
	//	twice                       the server has two Authenticators
	Reason string
	// KeyID is the ID of the key. KeyID is empty unless the caller sent the whole key with its
	// secret. So a caller cannot put the ID of another caller's key here.
	KeyID string
	// Method is the full method. If the server has a grpc.UnknownServiceHandler, callers can send
	// any text as the method.
	Method string
	// Addr is the address of the caller, as compared with the AllowedNetworks of keys. The zero
	// Addr means that the address is not known.
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
	from, through := "an unknown address", ""
	if r.Addr.IsValid() {
		from = r.Addr.String()
	}
	if r.Proxy != "" {
		through = " through proxy " + r.Proxy
	}
	return fmt.Sprintf("%v: the call came from %s%s", r.err, from, through)
}

// Unwrap returns the error of the Verifier, or one of this package's own.
func (r *Refusal) Unwrap() error { return r.err }

// errNoKey stands for the answer of a Verifier that returned neither a key nor an error.
var errNoKey = fmt.Errorf("the Verifier returned no key and no error: %w", keystore.ErrUnavailable)

// reasonOf returns the Reason of a Refusal.
func reasonOf(err error) string {
	var scope *scopeError
	var throttled *throttledError
	switch {
	case errors.Is(err, errMissing):
		return "missing"
	case errors.Is(err, errNoScheme), errors.Is(err, errWrongScheme):
		return "scheme"
	case errors.Is(err, errSeveral):
		return "several"
	case errors.Is(err, errInsecure):
		return "insecure"
	case errors.Is(err, errNoRule):
		return "no_rule"
	case errors.Is(err, errTwice):
		return "twice"
	case errors.As(err, &scope):
		return "scope"
	case errors.As(err, &throttled):
		return "throttled"
	default:
		return keystore.Reason(err)
	}
}

// withKeyID adds the ID of the key to the error of a Verifier for a token, if the error proves that
// the token has the secret of the key: a Verifier returns these errors only after it has compared
// the secret.
func withKeyID(text string, err error) error {
	switch keystore.Reason(err) {
	case "revoked", "expired", "disabled", "not_yet_valid", "network", "rate_limited", "changed":
		if id, ok := token.Parse(text); ok {
			return &Refusal{KeyID: id.String(), err: err}
		}
	}
	return err
}

// newRefusal returns the Refusal for err, which may be a Refusal that has only the ID of the key.
func (a *Authenticator) newRefusal(ctx context.Context, fullMethod string, err error) *Refusal {
	r := &Refusal{err: err}
	if known := (*Refusal)(nil); errors.As(err, &known) {
		r.KeyID, r.err = known.KeyID, known.err
	}
	addr, through := a.proxies.client(ctx)
	r.Reason, r.Method, r.Addr, r.Proxy = reasonOf(r.err), fullMethod, addr, through.String()
	return r
}

// mapStatus asks the ErrorMapper for a status. If the mapper panics, mapStatus returns the default: the
// goroutine may be the store's, where no interceptor recovers a panic, and the panic would end the
// process.
func (a *Authenticator) mapStatus(
	ctx context.Context, r *Refusal, byDefault *status.Status,
) (st *status.Status) {
	if a.mapper == nil {
		return byDefault
	}
	st = byDefault
	defer func() {
		if p := recover(); p != nil {
			a.log.logFault(ctx, "ErrorMapper panicked: the caller is told the default",
				"panic", truncate(fmt.Sprint(p), maxErrorText),
				"reason", r.Reason,
				"method", printableMethod(r.Method),
				"stack", truncate(string(debug.Stack()), 4*maxErrorText))
		}
	}()
	mapped := a.mapper(ctx, r.Method, r, byDefault)
	if mapped.Code() != codes.OK { // the code of a nil Status is OK
		return mapped
	}
	return byDefault
}

// LogRefusals logs each call that is refused, and each stream that ends with its key. A line has
// these attributes:
//
//	reason                 the Reason of a Refusal
//	key                    the ID of the key, if the caller sent the whole key
//	method, addr, proxy    the Method, Addr and Proxy of a Refusal; addr and proxy only where known
//	error                  the text of the error, only if callers are told Unavailable or Internal
//	suppressed             how many lines of this reason were left out since the line before
//
// The level is Error if the server or the store has a fault, Info if the caller has cancelled the
// call, and Warn for every other reason. The log never holds the credential. The log holds no text
// of a caller except the method: at most 256 bytes, without characters that do not print.
//
// A flood of refusals does not fill the disk. Each reason has a bucket of 10 lines, and gets one
// more line per second: at most 86,400 lines a day, about 20 MB. Calls and streams have separate
// buckets. Memory is bounded by the number of reasons. The next line of a reason has the count of
// lines that were left out. If no further line of the reason comes, the count is lost.
//
// Without this option, two faults of the program are logged to slog.Default, with the same bounds:
// a Verifier that returns no key and no error, and an ErrorMapper that panics. A nil logger is an
// error of New.
func LogRefusals(logger *slog.Logger) Option {
	return Option{func(c *config) error {
		if logger == nil {
			return errors.New("LogRefusals: the logger is nil: give slog.Default(), for example")
		}
		c.logger = logger
		return nil
	}}
}

const (
	maxMethodText = 256
	maxErrorText  = 1024
	logBurst      = 10
	logPerSecond  = 1
)

// printableMethod returns a method for the log: bounded, and with \ufffd for each character that does
// not print. The JSON handler of slog does not escape the characters that reverse the direction of
// text.
func printableMethod(method string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, truncate(method, maxMethodText))
}

// truncate returns text, or its first n bytes and how long it is.
func truncate(text string, n int) string {
	if len(text) > n {
		text = fmt.Sprintf("%s… (%d bytes)", text[:n], len(text))
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// A refusalLog logs a sample of refusals. The zero refusalLog logs only faults of the program.
type refusalLog struct {
	logger *slog.Logger // nil: LogRefusals was not given

	mu      sync.Mutex
	samples map[sampleKey]*sample
}

type sampleKey struct{ message, reason string } // both of closed sets

type sample struct {
	bucket     *rate.Limiter
	suppressed uint64
}

// allow reports whether a line may be logged now, and how many were left out before it.
func (l *refusalLog) allow(message, reason string) (suppressed uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := sampleKey{message, reason}
	s := l.samples[key]
	if s == nil {
		s = &sample{bucket: rate.NewLimiter(logPerSecond, logBurst)}
		if l.samples == nil {
			l.samples = make(map[sampleKey]*sample)
		}
		l.samples[key] = s
	}
	if !s.bucket.Allow() {
		s.suppressed++
		return 0, false
	}
	suppressed, s.suppressed = s.suppressed, 0
	return suppressed, true
}

const (
	callRefused = "gRPC call refused"
	callEnded   = "gRPC call ended with its API key"
)

// logRefusal logs a refusal. The code is the one that the caller gets by default.
func (l *refusalLog) logRefusal(ctx context.Context, message string, r *Refusal, code codes.Code) {
	logger := l.logger
	if logger == nil {
		if !errors.Is(r.err, errNoKey) {
			return
		}
		logger = slog.Default()
	}
	level, trouble := slog.LevelWarn, false
	switch r.Reason {
	case "canceled", "deadline":
		level = slog.LevelInfo
	case "changed":
	default:
		if trouble = code == codes.Unavailable || code == codes.Internal; trouble {
			level = slog.LevelError
		}
	}
	attrs := []slog.Attr{
		slog.String("reason", r.Reason),
		slog.String("method", printableMethod(r.Method)),
	}
	if r.KeyID != "" {
		attrs = append(attrs, slog.String("key", r.KeyID))
	}
	if r.Addr.IsValid() {
		attrs = append(attrs, slog.String("addr", r.Addr.String()))
	}
	if r.Proxy != "" {
		attrs = append(attrs, slog.String("proxy", r.Proxy))
	}
	if trouble {
		attrs = append(attrs, slog.String("error", truncate(r.err.Error(), maxErrorText)))
	}
	l.write(ctx, logger, level, message, r.Reason, attrs)
}

// logFault logs a fault of the program.
func (l *refusalLog) logFault(ctx context.Context, message string, args ...any) {
	logger := l.logger
	if logger == nil {
		logger = slog.Default()
	}
	attrs := slog.Group("", args...).Value.Group()
	l.write(ctx, logger, slog.LevelError, message, "", attrs)
}

// write logs a line if the bucket of the reason has one, and counts the line otherwise.
func (l *refusalLog) write(
	ctx context.Context, logger *slog.Logger, level slog.Level, message, reason string, attrs []slog.Attr,
) {
	defer func() { _ = recover() }() // as for the ErrorMapper
	if !logger.Enabled(ctx, level) {
		return
	}
	suppressed, ok := l.allow(message, reason)
	if !ok {
		return
	}
	if suppressed > 0 {
		attrs = append(attrs, slog.Uint64("suppressed", suppressed))
	}
	logger.LogAttrs(ctx, level, message, attrs...)
}
