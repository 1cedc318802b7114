// Package remote has the parts that the Backends on servers share: the calls that end with Close, a
// logger, and errors that say what to do.
package remote

import (
	"context"
	"log/slog"
	"time"
)

// An Error is an error of a server or of a connection, with a text that says what to do. The text
// has no credential.
type Error struct {
	Text string
	Err  error // the error of the client library; may be nil
}

func (e *Error) Error() string { return e.Text }

// Unwrap returns the error of the client library, or nil.
func (e *Error) Unwrap() error { return e.Err }

// A Logger writes to a slog.Logger that may be nil. A Backend may log in a background goroutine,
// where a panic of a slog.Handler would end the process, so a Logger drops the panic.
type Logger struct{ To *slog.Logger }

// Log writes a message, unless To is nil.
func (l Logger) Log(level slog.Level, text string, args ...any) {
	if l.To == nil {
		return
	}
	defer func() { _ = recover() }()
	l.To.Log(context.Background(), level, text, args...)
}

// Sleep waits for d, or until the context ends.
func Sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
