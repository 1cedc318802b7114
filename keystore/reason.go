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
//	credits_exhausted       a *CreditsError
//	narrowed                ErrNarrowed
//	key_revoked             ErrKeyRevoked
//	conflict                ErrConflict
//	not_everywhere          ErrNotEverywhere
//	not_found, invalid      ErrNotFound, ErrInvalid
//	locked, corrupt         ErrLocked, ErrCorrupt
//	closed, unavailable     ErrClosed, ErrUnavailable
//	canceled, deadline      the errors of a context
//	other                   every other error
func Reason(err error) string {
	if err == nil {
		return ""
	}
	return reasons[reasonOf(err)].word
}

// reasonOf returns the number of the reason in reasons.
func reasonOf(err error) int {
	for i := range reasons {
		if err == reasons[i].err {
			return i // most refusals are the error itself, and errors.Is takes longer
		}
	}
	for i := range reasons {
		if errors.Is(err, reasons[i].err) {
			return i
		}
	}
	if limited := (*RateLimitError)(nil); errors.As(err, &limited) {
		return reasonRateLimited
	}
	if short := (*CreditsError)(nil); errors.As(err, &short) {
		return reasonExhausted
	}
	return reasonOther
}

// The uses of a reason.
const (
	refusal    = 1 << iota // by Verify and Bind
	sessionEnd             // the cause of the end of a session from Bind
)

// The numbers of the reasons that have no error to compare with.
const (
	reasonExhausted   = numReasons - 3
	reasonRateLimited = numReasons - 2
	reasonOther       = numReasons - 1
)

// reasons has the more precise errors first, because ErrUnavailable wraps every error of the
// backend.
var reasons = [...]struct {
	err  error // nil: see reasonOf
	word string
	of   int // the uses
}{
	{ErrMalformed, "malformed", refusal},
	{ErrUnknown, "unknown", refusal},
	{ErrRevoked, "revoked", refusal | sessionEnd},
	{ErrExpired, "expired", refusal | sessionEnd},
	{ErrDisabled, "disabled", refusal | sessionEnd},
	{ErrNotYetValid, "not_yet_valid", refusal | sessionEnd},
	{ErrNetworkNotAllowed, "network", refusal},
	{ErrNarrowed, "narrowed", refusal | sessionEnd},
	{ErrKeyRevoked, "key_revoked", 0},
	{ErrConflict, "conflict", 0},
	{ErrNotEverywhere, "not_everywhere", 0},
	{ErrNotFound, "not_found", 0},
	{ErrInvalid, "invalid", 0},
	{ErrLocked, "locked", 0},
	{ErrCorrupt, "corrupt", refusal},
	{ErrClosed, "closed", refusal | sessionEnd},
	{ErrUnavailable, "unavailable", refusal},
	{context.Canceled, "canceled", refusal},
	{context.DeadlineExceeded, "deadline", refusal},
	{nil, "credits_exhausted", refusal},
	{nil, "rate_limited", refusal},
	{nil, "other", refusal},
}

const numReasons = len(reasons)
