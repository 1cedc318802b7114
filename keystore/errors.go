package keystore

import (
	"errors"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// ErrDenied is what the reasons below wrap: the token does not admit its bearer.
var ErrDenied = errors.New("API key denied")

// Why a token is denied. All but the first two are given only to a bearer who has proved to hold the whole secret. Tell a
// caller none of them apart: see [github.com/grpc-api-key/grpc-api-key/interceptor].
var (
	// ErrMalformed means that it is not the text of a key: it was mistyped, cut off, or never was one.
	ErrMalformed = fmt.Errorf("%w: malformed", ErrDenied)
	// ErrUnknown means that this store has no such key, or that the secret is not the key's.
	ErrUnknown = fmt.Errorf("%w: unknown", ErrDenied)
	// ErrRevoked means that the key was revoked.
	ErrRevoked = fmt.Errorf("%w: revoked", ErrDenied)
	// ErrExpired means that the key's time is over.
	ErrExpired = fmt.Errorf("%w: expired", ErrDenied)
	// ErrDisabled means that the key is switched off for now.
	ErrDisabled = fmt.Errorf("%w: disabled", ErrDenied)
	// ErrNotYetValid means that the key's time has not come.
	ErrNotYetValid = fmt.Errorf("%w: not yet valid", ErrDenied)
	// ErrNetworkNotAllowed means that the key may not be used from the caller's address, or that
	// the address is not known.
	ErrNetworkNotAllowed = fmt.Errorf("%w: wrong network", ErrDenied)
)

// A RateLimitError means that a key which would be admitted was used more often than its RateLimit allows. It does not
// wrap ErrDenied: there is nothing wrong with the key.
type RateLimitError struct {
	RetryAfter time.Duration // when the next use may succeed
}

func (e *RateLimitError) Error() string {
	return fmt.Sprintf("API key used too often: try again in %v", e.RetryAfter)
}

// What is wrong with a call or with the store. None of them wraps ErrDenied.
var (
	// ErrInvalid means that an argument cannot be used; the text says which, and why. Nothing was done.
	ErrInvalid = errors.New("invalid argument")
	// ErrUnavailable means that the store could not do its work now: its disk failed, or did not answer in time.
	ErrUnavailable = errors.New("API key store unavailable")

	// ErrNarrowed means that a change has narrowed the key while Bind ran, or while a context from
	// Bind was in use: a scope less, for example, or an earlier expiry. The caller may bind the key
	// again.
	ErrNarrowed = errors.New("API key narrowed")
	// ErrKeyRevoked means that Update, Rotate, Disable or Enable cannot change the key, because the
	// key is revoked. ErrKeyRevoked is about the key that the call names, and not about the caller,
	// so it does not wrap ErrDenied. Verify and Bind return ErrRevoked.
	ErrKeyRevoked = errors.New("the API key is revoked and cannot be changed")
	// ErrNotFound means that no key has the ID.
	ErrNotFound = backend.ErrNotFound
	// ErrCorrupt means that what is stored is not what was written.
	ErrCorrupt = backend.ErrCorrupt
	// ErrLocked means that the directory is open already; the text says which process of which host
	// has it open.
	ErrLocked = backend.ErrLocked
	// ErrClosed means that Close was called.
	ErrClosed = backend.ErrClosed
)

// A plainError is another error in words of its own.
type plainError struct {
	text string
	err  error
}

func (e *plainError) Error() string { return e.text }
func (e *plainError) Unwrap() error { return e.err }

// noKey is the ErrNotFound of a call that named a key.
func noKey(doing string, id token.ID) error {
	return &plainError{fmt.Sprintf("keystore: %s: there is no key %s", doing, id), ErrNotFound}
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("keystore: %w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// trouble turns a backend's error into one of this package's. An error that is neither known nor the context's own is
// ErrUnavailable, so that nothing a backend says can be taken for a denial.
func trouble(doing string, err error) error {
	if errors.Is(err, ErrDenied) {
		err = errors.New(err.Error()) // another store's answer to the backend
	}
	switch {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrCorrupt), errors.Is(err, ErrNotFound), errors.Is(err, ErrUnavailable):
		return fmt.Errorf("keystore: %s: %w", doing, err)
	default:
		return fmt.Errorf("keystore: %s: %w: %w", doing, ErrUnavailable, err)
	}
}
