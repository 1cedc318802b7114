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

// A Refusal is the error that an ErrorMapper gets: why a call was refused, or why a stream has ended. It wraps the error
// of the Verifier, so that errors.Is finds those of keystore, and errors.As a *keystore.RateLimitError. A Refusal is for
// logs and for people who run the server, not for callers. It never holds the credential.
type Refusal struct {
	// Reason is one word of a closed set, fit for a label of a metric: the words of keystore.Reason, and
	//
	//	missing, scheme, several    no credential, a missing or wrong scheme, several credentials
	//	insecure                    plaintext, and RequireTLS is set
	//	scope                       the key lacks a scope
	//	throttled                   LimitFailures
	Reason string
	// KeyID is the ID of the key. It is empty unless the caller has sent the whole key, secret included: never is it an ID
	// that somebody only claims.
	KeyID string
	// Method is the full method. Where the server has a grpc.UnknownServiceHandler, callers can send any text.
	Method string
	// Addr is the address that the call came from, as AllowedNetworks are compared with; the zero Addr if it is not known.
	Addr netip.Addr
	// Proxy is the address of the trusted proxy that the call came through, or the transport of a proxy without an
	// address, such as "unix"; empty if there was none.
	Proxy string

	err error
}

// Error says what Unwrap says, and where the call came from: "API key denied: wrong network: the call came from
// 203.0.113.9 through proxy 10.0.0.4".
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

// errNoKey is what a Verifier has done that returned neither a key nor an error. It is the server's fault.
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
	case errors.As(err, &scope):
		return "scope"
	case errors.As(err, &throttled):
		return "throttled"
	default:
		return keystore.Reason(err)
	}
}

// ofToken adds the ID of the key to an error that a Verifier gave for a token, if the error proves that the token is the
// whole key. These errors are given only to a caller who has the secret.
func ofToken(text string, err error) error {
	switch keystore.Reason(err) {
	case "revoked", "expired", "disabled", "not_yet_valid", "network", "rate_limited", "changed":
		if id, ok := token.Parse(text); ok {
			return &Refusal{KeyID: id.String(), err: err}
		}
	}
	return err
}

// refusalOf completes what is known of a refusal.
func (a *Authenticator) refusalOf(ctx context.Context, fullMethod string, err error) *Refusal {
	r := &Refusal{err: err}
	if known := (*Refusal)(nil); errors.As(err, &known) {
		r.KeyID, r.err = known.KeyID, known.err
	}
	addr, through := a.origin(ctx)
	r.Reason, r.Method, r.Addr, r.Proxy = reasonOf(r.err), fullMethod, addr, through.String()
	return r
}

// mapped asks the ErrorMapper what to tell. A panic of the mapper's must not pass: about a cut, it would end the process,
// because no handler is below to recover it.
func (a *Authenticator) mapped(ctx context.Context, r *Refusal, told *status.Status) (st *status.Status) {
	if a.mapper == nil {
		return told
	}
	st = told
	defer func() {
		if p := recover(); p != nil {
			a.log.fault(ctx, "ErrorMapper panicked: the caller is told the default", "panic", bounded(fmt.Sprint(p), maxErrorText),
				"reason", r.Reason, "method", methodText(r.Method), "stack", bounded(string(debug.Stack()), 4*maxErrorText))
		}
	}()
	if mapped := a.mapper(ctx, r.Method, r, told); mapped.Code() != codes.OK { // that of a nil Status is OK
		return mapped
	}
	return told
}

// LogRefusals logs each call that is refused, and each stream that ends with its key, with the attributes
//
//	reason        a Refusal's Reason
//	key           the ID of the key, only if the caller has sent the whole key
//	method, addr, proxy    a Refusal's, where known
//	error         what went wrong, only for trouble of the server's, which callers are told as Unavailable
//	suppressed    how many refusals of this reason were left out since the line before; only if there were any
//
// Trouble of the server's is logged as an error, a call that its caller has cancelled as information, everything else as a
// warning. The credential is never logged, and no text of a caller's but the method: at most 256 bytes of it, without
// characters that do not print.
//
// A flood of refusals does not fill the disk: for each reason, 10 lines come at once and then one per second, which is at
// most 86,400 a day, about 20 MB. Ends of streams are counted apart from refusals of calls. Memory is bounded by the number
// of reasons. The count of what was left out comes with the next line of that reason, and is lost if none comes.
//
// What is logged without the option, by slog.Default and bounded in the same way, is what must be a fault in the program:
// a Verifier that returns no key and no error, and an ErrorMapper that panics.
func LogRefusals(logger *slog.Logger) Option {
	return Option{func(a *Authenticator) error {
		if logger == nil {
			return errors.New("LogRefusals: the logger is nil: give slog.Default(), for example")
		}
		a.log.logger = logger
		return nil
	}}
}

const (
	maxMethodText = 256
	maxErrorText  = 1024
	logBurst      = 10
	logPerSecond  = 1
)

// methodText returns a method for the log: bounded, and with \ufffd instead of what does not print, such as the characters
// that turn the direction of text, which the JSON handler of slog leaves as they are.
func methodText(method string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, bounded(method, maxMethodText))
}

// bounded returns text, or its first n bytes and how long it is.
func bounded(text string, n int) string {
	if len(text) > n {
		text = fmt.Sprintf("%s… (%d bytes)", text[:n], len(text))
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// A refusalLog logs a sample of refusals. The zero refusalLog logs only faults.
type refusalLog struct {
	logger *slog.Logger // nil: only faults, by slog.Default

	mu      sync.Mutex
	samples map[sampleKey]*sample
}

type sampleKey struct{ message, reason string } // both of closed sets

type sample struct {
	bucket     *rate.Limiter
	suppressed uint64
}

// take reports whether a line may be logged now, and how many were left out before it.
func (l *refusalLog) take(message, reason string) (suppressed uint64, ok bool) {
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

// refused logs a refusal, of which the caller is told a status of code.
func (l *refusalLog) refused(ctx context.Context, message string, r *Refusal, code codes.Code) {
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
		if trouble = code == codes.Unavailable; trouble {
			level = slog.LevelError
		}
	}
	attrs := []slog.Attr{slog.String("reason", r.Reason), slog.String("method", methodText(r.Method))}
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
		attrs = append(attrs, slog.String("error", bounded(r.err.Error(), maxErrorText)))
	}
	l.write(ctx, logger, level, message, r.Reason, attrs)
}

// fault logs what must be a fault in the program.
func (l *refusalLog) fault(ctx context.Context, message string, args ...any) {
	logger := l.logger
	if logger == nil {
		logger = slog.Default()
	}
	r := slog.Group("", args...)
	l.write(ctx, logger, slog.LevelError, message, "", r.Value.Group())
}

func (l *refusalLog) write(ctx context.Context, logger *slog.Logger, level slog.Level, message, reason string, attrs []slog.Attr) {
	defer func() { _ = recover() }() // the goroutine may have nobody who would recover a handler's panic
	if !logger.Enabled(ctx, level) {
		return
	}
	suppressed, ok := l.take(message, reason)
	if !ok {
		return
	}
	if suppressed > 0 {
		attrs = append(attrs, slog.Uint64("suppressed", suppressed))
	}
	logger.LogAttrs(ctx, level, message, attrs...)
}
