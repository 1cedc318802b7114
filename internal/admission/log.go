package admission

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"unicode"

	"golang.org/x/time/rate"
)

const (
	maxPrintable = 256
	maxErrorText = 1024
	logBurst     = 10
	logPerSecond = 1
)

// Printable returns text of a caller for the log: truncated, and with \ufffd in place of each
// unprintable character. The JSON handler of slog does not escape the characters that reverse the
// direction of text.
func Printable(text string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, truncate(text, maxPrintable))
}

// truncate returns text if text has at most n bytes. Otherwise truncate returns the first n bytes,
// and the length of text.
func truncate(text string, n int) string {
	if len(text) > n {
		text = fmt.Sprintf("%s… (%d bytes)", text[:n], len(text))
	}
	return strings.ToValidUTF8(text, "\ufffd")
}

// A Log logs refusals, but drops lines in a flood. The zero value logs only faults of the program.
type Log struct {
	Logger *slog.Logger // nil: LogRefusals was not given

	mu      sync.Mutex
	samples map[sampleKey]*sample
}

// A sampleKey identifies lines that share a bucket. Both fields have few different values.
type sampleKey struct{ message, reason string }

type sample struct {
	bucket     *rate.Limiter
	suppressed uint64
}

// allow reports whether a line may be logged now, and how many lines were dropped before this line.
func (l *Log) allow(message, reason string) (suppressed uint64, ok bool) {
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

// A Line is what a line about a refusal says. The credential is in none of the fields.
type Line struct {
	Message string    // such as "gRPC call refused"
	Where   slog.Attr // such as the method; see Printable
	Reason  string    // of ReasonOf
	KeyID   string    // empty: not known
	Addr    netip.Addr
	Proxy   string // empty: none
	Err     error
	Fault   bool // the server or the store has a fault
}

// Refusal logs a refusal. Without a Logger, Refusal logs only ErrNoKey.
func (l *Log) Refusal(ctx context.Context, line Line) {
	logger := l.Logger
	if logger == nil {
		if !errors.Is(line.Err, ErrNoKey) {
			return
		}
		logger = slog.Default()
	}
	level, fault := slog.LevelWarn, false
	switch line.Reason {
	case "canceled", "deadline":
		level = slog.LevelInfo
	case "narrowed":
	default:
		if fault = line.Fault; fault {
			level = slog.LevelError
		}
	}
	attrs := []slog.Attr{slog.String("reason", line.Reason), line.Where}
	if line.KeyID != "" {
		attrs = append(attrs, slog.String("key", line.KeyID))
	}
	if lacks := (*ScopeError)(nil); errors.As(line.Err, &lacks) {
		attrs = append(attrs, slog.String("scopes", strings.Join(lacks.Scopes, " ")))
	}
	if line.Addr.IsValid() {
		attrs = append(attrs, slog.String("addr", line.Addr.String()))
	}
	if line.Proxy != "" {
		attrs = append(attrs, slog.String("proxy", line.Proxy))
	}
	if fault {
		attrs = append(attrs, slog.String("error", truncate(line.Err.Error(), maxErrorText)))
	}
	l.write(ctx, logger, level, line.Message, line.Reason, attrs)
}

// Recovered recovers a panic of the application's code, and logs the panic. The caller must defer
// Recovered directly. The goroutine may belong to the store, where nothing else recovers panics, so
// the panic would end the process.
func (l *Log) Recovered(ctx context.Context, message, reason string, where slog.Attr) {
	p := recover()
	if p == nil {
		return
	}
	logger := l.Logger
	if logger == nil {
		logger = slog.Default()
	}
	l.write(ctx, logger, slog.LevelError, message, "", []slog.Attr{
		slog.String("panic", describePanic(p)),
		slog.String("reason", reason),
		where,
		slog.String("stack", truncate(string(debug.Stack()), 4*maxErrorText)),
	})
}

// describePanic returns the type of a panic's value, as the store logs it. The value itself may
// hold a credential. So describePanic adds the text only of errors of the Go runtime.
func describePanic(value any) string {
	text := fmt.Sprintf("%T", value)
	err, ok := value.(runtime.Error)
	if ok && strings.HasPrefix(strings.TrimPrefix(text, "*"), "runtime.") {
		text += ": " + truncate(err.Error(), maxErrorText)
	}
	return text
}

// write logs a line if the bucket of the message and reason allows one. Otherwise write counts the
// line.
func (l *Log) write(
	ctx context.Context, logger *slog.Logger, level slog.Level,
	message, reason string, attrs []slog.Attr,
) {
	defer func() { _ = recover() }() // for the reason that Recovered gives
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
