package keystore

import (
	"errors"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// ErrDenied means that the token does not admit the bearer. The reasons below wrap ErrDenied.
var ErrDenied = errors.New("API key denied")

// Why a token is denied. The store returns ErrMalformed and ErrUnknown to every bearer, and the
// rest only to a bearer who has proved to hold the whole secret. Do not tell callers which of these
// errors it was: see [github.com/grpc-api-key/grpc-api-key/interceptor].
var (
	// ErrMalformed means that the token is not the text of a key: the token was mistyped or cut
	// off, or never was a key.
	ErrMalformed = fmt.Errorf("%w: malformed", ErrDenied)
	// ErrUnknown means that this store does not have the key, or that the secret is not the key's.
	ErrUnknown = fmt.Errorf("%w: unknown", ErrDenied)
	// ErrRevoked means that the key was revoked.
	ErrRevoked = fmt.Errorf("%w: revoked", ErrDenied)
	// ErrExpired means that the key has expired.
	ErrExpired = fmt.Errorf("%w: expired", ErrDenied)
	// ErrDisabled means that the key is disabled for now.
	ErrDisabled = fmt.Errorf("%w: disabled", ErrDenied)
	// ErrNotYetValid means that the time from which the key is valid has not come.
	ErrNotYetValid = fmt.Errorf("%w: not yet valid", ErrDenied)
	// ErrNetworkNotAllowed means that the key may not be used from the caller's address, or that
	// the address is not known.
	ErrNetworkNotAllowed = fmt.Errorf("%w: wrong network", ErrDenied)
)

// A RateLimitError means that the key is valid, but was used more often than its RateLimit allows.
// RateLimitError does not wrap ErrDenied, because nothing is wrong with the key.
type RateLimitError struct {
	RetryAfter time.Duration // when the next use may succeed
}

func (e *RateLimitError) Error() string {
	return fmt.Sprintf("API key used too often: try again in %v", e.RetryAfter)
}

// What is wrong with a call or with the store. None of these errors wraps ErrDenied.
var (
	// ErrInvalid means that an argument cannot be used. The text names the argument and the reason.
	// The call has done nothing.
	ErrInvalid = errors.New("invalid argument")
	// ErrUnavailable means that the store could not do its work now: the storage failed, is full,
	// or did not answer in time; the process has lost contact with the other processes; too many
	// calls compete; or a Hasher has panicked. The text gives the reason.
	ErrUnavailable = errors.New("API key store unavailable")

	// ErrNarrowed means that a change has narrowed the key while Bind ran, or while a session was
	// open. The change removed a scope, for example, or set an earlier expiry. The caller may bind
	// the key again.
	ErrNarrowed = errors.New("API key narrowed")
	// ErrNotEverywhere means that a change was made and is durable, but that the call ended before
	// every process was known to have taken the change. In this process, the change is in force. In
	// every other process, the change is in force 1.2 times the freshness of the store after the
	// call has made the change, whatever happens: see Options.Freshness. The error also wraps the
	// reason why the call ended: the error of the context, ErrUnavailable after Options.Timeout, or
	// ErrClosed.
	//
	// To wait, call Revoke, Disable, Enable, RevokeAll, Purge or Restore again, without IfRevision:
	// the second call has nothing left to change, and waits for the other processes. After Rotate,
	// SetCredits or AddCredits, a second call would make a second change. Call Update instead, with
	// a function that changes nothing.
	ErrNotEverywhere = errors.New("the change is made, but may not be in force in every process yet")
	// ErrKeyRevoked means that a method such as Update, Rotate, Enable or SetCredits cannot change
	// the key, because the key is revoked. ErrKeyRevoked is about the key that the call names, and
	// not about the caller, so ErrKeyRevoked does not wrap ErrDenied. Verify, Bind and Spend return
	// ErrRevoked instead.
	ErrKeyRevoked = errors.New("the API key is revoked and cannot be changed")
	// ErrConflict means that the key does not have the revision that IfRevision requires. The call
	// has done nothing. Get returns the key as the key is now.
	ErrConflict = errors.New("the key has changed")
	// ErrNotFound means that no key has the ID.
	ErrNotFound = backend.ErrNotFound
	// ErrCorrupt means that the stored data differs from the data that was written.
	ErrCorrupt = backend.ErrCorrupt
	// ErrLocked means that the directory is open already. The text names the process and the host
	// that have the directory open.
	ErrLocked = backend.ErrLocked
	// ErrClosed means that Close was called.
	ErrClosed = backend.ErrClosed
)

// A messageError wraps an error, but its text does not contain the text of the wrapped error.
type messageError struct {
	text string
	err  error
}

func (e *messageError) Error() string { return e.text }
func (e *messageError) Unwrap() error { return e.err }

// noKey returns the ErrNotFound of a call that named a key.
func noKey(doing string, id token.ID) error {
	return &messageError{fmt.Sprintf("keystore: %s: there is no key %s", doing, id), ErrNotFound}
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("keystore: %w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// wrapErr converts an error of a backend into an error of this package. An unknown error becomes
// ErrUnavailable, so that a caller never takes the error of a backend for a denial. A function that
// returns the error of a caller's context checks the context before the call of wrapErr.
func wrapErr(doing string, err error) error {
	if errors.Is(err, ErrDenied) {
		err = errors.New(err.Error()) // another store's answer to the backend
	}
	switch {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrCorrupt), errors.Is(err, ErrNotFound),
		errors.Is(err, ErrUnavailable):
		return fmt.Errorf("keystore: %s: %w", doing, err)
	default:
		return fmt.Errorf("keystore: %s: %w: %w", doing, ErrUnavailable, err)
	}
}
