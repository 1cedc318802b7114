package keystore

import (
	"context"
	"errors"
)

// Reason returns one word for why a call was refused. The set of words is closed. Use the words
// as values of log attributes and as labels of metrics. Do not show the words to callers, because
// callers must not learn which keys exist. Reason of nil is empty.
//
//	malformed, unknown, revoked, expired, disabled, not_yet_valid, network
//	                        errors that wrap ErrDenied
//	rate_limited            a *RateLimitError
//	narrowed                ErrNarrowed
//	key_revoked             ErrKeyRevoked
//	conflict                ErrConflict
//	not_found, invalid      ErrNotFound, ErrInvalid
//	locked, corrupt         ErrLocked, ErrCorrupt
//	closed, unavailable     ErrClosed, ErrUnavailable
//	canceled, deadline      the errors of a context
//	other                   every other error
func Reason(err error) string {
	if err == nil {
		return ""
	}
	for _, r := range reasons {
		if errors.Is(err, r.err) {
			return r.word
		}
	}
	if limited := (*RateLimitError)(nil); errors.As(err, &limited) {
		return "rate_limited"
	}
	return "other"
}

// reasons has the more precise errors first, because ErrUnavailable wraps every error of the
// backend.
var reasons = []struct {
	err  error
	word string
}{
	{ErrMalformed, "malformed"},
	{ErrUnknown, "unknown"},
	{ErrRevoked, "revoked"},
	{ErrExpired, "expired"},
	{ErrDisabled, "disabled"},
	{ErrNotYetValid, "not_yet_valid"},
	{ErrNetworkNotAllowed, "network"},
	{ErrNarrowed, "narrowed"},
	{ErrKeyRevoked, "key_revoked"},
	{ErrConflict, "conflict"},
	{ErrNotFound, "not_found"},
	{ErrInvalid, "invalid"},
	{ErrLocked, "locked"},
	{ErrCorrupt, "corrupt"},
	{ErrClosed, "closed"},
	{ErrUnavailable, "unavailable"},
	{context.Canceled, "canceled"},
	{context.DeadlineExceeded, "deadline"},
}
