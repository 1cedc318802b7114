package admission

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// ErrNoKey replaces the result of a faulty Verifier that returned neither a key nor an error.
var ErrNoKey = fmt.Errorf("the Verifier returned no key and no error: %w", keystore.ErrUnavailable)

// A ScopeError means that a valid key lacks a scope.
type ScopeError struct{ Scopes []string } // that the rule names

func (e *ScopeError) Error() string { return "the API key lacks a scope that this method needs" }

// CheckScopes returns nil if the key has all the scopes, or, with anyOf, at least one of them.
// Every key has an empty list of scopes. The error is a *ScopeError.
func CheckScopes(k *keystore.Key, scopes []string, anyOf bool) error {
	if len(scopes) == 0 {
		return nil
	}
	for _, s := range scopes {
		if k.HasScope(s) != anyOf {
			continue // does not decide yet
		}
		if anyOf {
			return nil
		}
		return &ScopeError{scopes}
	}
	if anyOf {
		return &ScopeError{scopes}
	}
	return nil
}

// A Kind is what a caller may learn about a refusal. The zero Kind is Unavailable.
type Kind int

// The kinds of refusals, and of ends of a session.
const (
	Unavailable Kind = iota
	Missing
	Several
	NoScheme
	WrongScheme
	Insecure
	NoRule
	Path // only in net/http
	Twice
	Scope
	Invalid
	RateLimited
	Exhausted
	Throttled
	Changed
	Revoked // only a session that has ended
	Expired // only a session that has ended
	NumKinds
)

// kinds has the reason and the text for each Kind. The package comment of interceptor lists the
// reasons.
var kinds = [NumKinds]struct{ reason, text string }{
	Unavailable: {"AUTH_BACKEND_UNAVAILABLE", "the server cannot check API keys now: try again"},
	Missing:     {"CREDENTIALS_MISSING", "the call has no API key"},
	Several: {"CREDENTIALS_SEVERAL",
		"the call carries several credentials: send one (gRPC sends the credentials of a call " +
			"in addition to those of the connection)"},
	NoScheme: {"CREDENTIALS_SCHEME_MISSING", "the API key has no scheme before it"},
	WrongScheme: {"CREDENTIALS_SCHEME_INVALID",
		"the API key has a scheme that this server does not accept"},
	Insecure: {"INSECURE_TRANSPORT", "this server accepts API keys over TLS only"},
	NoRule: {"METHOD_HAS_NO_RULE",
		"this method has no rule, and the server refuses methods without a rule"},
	Path: {"PATH_AMBIGUOUS",
		"the path can be read in two ways: send it without dot segments and double slashes"},
	Twice: {"AUTHENTICATED_TWICE", "the call passed two Authenticators: " +
		"give the server the ServerOptions of one Authenticator, once"},
	Scope:       {"INSUFFICIENT_SCOPE", "the API key lacks a scope that this method needs"},
	Invalid:     {"API_KEY_INVALID", "invalid API key"},
	RateLimited: {"RATE_LIMIT_EXCEEDED", "the API key exceeds its rate limit"},
	Exhausted:   {"CREDITS_EXHAUSTED", "the API key has too few credits for this call"},
	Throttled:   {"AUTH_THROTTLED", "too many calls with bad credentials"},
	Changed:     {"API_KEY_CHANGED", "the API key was changed: open the stream again"},
	Revoked:     {"API_KEY_REVOKED", "the API key was revoked"},
	Expired:     {"API_KEY_EXPIRED", "the API key, or this secret of the key, has expired"},
}

// Reason returns the reason that callers get, such as API_KEY_INVALID.
func (k Kind) Reason() string { return kinds[k].reason }

// Text returns the text that callers get. The text is constant: it says nothing about a key.
func (k Kind) Text() string { return kinds[k].text }

// KindOf returns the Kind of a refusal. The Kind of an unknown error is Unavailable: trouble of the
// server never looks like a bad key. The error may also wrap the end of the caller's context, which
// is Unavailable too.
func KindOf(err error) Kind {
	var scope *ScopeError
	var limited *keystore.RateLimitError
	var short *keystore.CreditsError
	var throttled *ThrottledError
	switch {
	case errors.Is(err, ErrMissing):
		return Missing
	case errors.Is(err, ErrSeveral):
		return Several
	case errors.Is(err, ErrNoScheme):
		return NoScheme
	case errors.Is(err, ErrWrongScheme):
		return WrongScheme
	case errors.Is(err, ErrInsecure):
		return Insecure
	case errors.Is(err, ErrNoRule):
		return NoRule
	case errors.Is(err, ErrPath):
		return Path
	case errors.Is(err, ErrTwice):
		return Twice
	case errors.As(err, &scope):
		return Scope
	case errors.Is(err, keystore.ErrDenied):
		return Invalid
	case errors.As(err, &limited):
		return RateLimited
	case errors.As(err, &short):
		return Exhausted
	case errors.As(err, &throttled):
		return Throttled
	case errors.Is(err, keystore.ErrNarrowed):
		return Changed
	default:
		return Unavailable
	}
}

// RetryAfter returns the time after which a call may succeed that was refused with err: zero if err
// is neither a *keystore.RateLimitError, nor a *ThrottledError, nor a *keystore.CreditsError that a
// refill ends.
func RetryAfter(err error) time.Duration {
	if short := (*keystore.CreditsError)(nil); errors.As(err, &short) && !short.RefillAt.IsZero() {
		return max(0, time.Until(short.RefillAt))
	}
	if limited := (*keystore.RateLimitError)(nil); errors.As(err, &limited) {
		return max(0, limited.RetryAfter)
	}
	if throttled := (*ThrottledError)(nil); errors.As(err, &throttled) {
		return max(0, throttled.RetryAfter)
	}
	return 0
}

// EndedByStore reports whether the store ended a session that has the cause. Otherwise the session
// is still live, or the context of the caller has ended.
func EndedByStore(cause error) bool {
	for _, storeErr := range []error{
		keystore.ErrDenied, keystore.ErrNarrowed, keystore.ErrClosed, keystore.ErrUnavailable,
	} {
		if errors.Is(cause, storeErr) {
			return true
		}
	}
	return false
}

// EndKind returns the Kind for the caller whose session ended with the cause.
func EndKind(cause error) Kind {
	switch {
	case errors.Is(cause, keystore.ErrRevoked):
		return Revoked
	case errors.Is(cause, keystore.ErrExpired):
		return Expired
	case errors.Is(cause, keystore.ErrDenied):
		return Invalid
	case errors.Is(cause, keystore.ErrNarrowed):
		return Changed
	default:
		return Unavailable
	}
}

// ReasonOf returns one word of a fixed set for why a call was refused: for operators, and not for
// callers. interceptor.Refusal lists the words.
func ReasonOf(err error) string {
	switch KindOf(err) {
	case Missing:
		return "missing"
	case NoScheme, WrongScheme:
		return "scheme"
	case Several:
		return "several"
	case Insecure:
		return "insecure"
	case NoRule:
		return "no_rule"
	case Path:
		return "path"
	case Twice:
		return "twice"
	case Scope:
		return "scope"
	case Throttled:
		return "throttled"
	default:
		return keystore.Reason(err)
	}
}

// ProvenKeyID returns the ID of the key in text, if the error of the Verifier proves that the
// caller has the secret of the key. Otherwise ProvenKeyID returns "". The proof is the kind of the
// error: a Verifier returns these errors only after a comparison of the secrets.
func ProvenKeyID(verifier any, text string, err error) string {
	switch keystore.Reason(err) {
	case "revoked", "expired", "disabled", "not_yet_valid", "network", "rate_limited",
		"credits_exhausted", "narrowed":
		id, _ := KeyID(verifier, text)
		return id
	}
	return ""
}

// KeyID returns the ID of the key in the text of a token. A Verifier that accepts tokens of other
// systems, as a *keystore.Store may, has a method for the ID.
func KeyID(verifier any, text string) (id string, ok bool) {
	if v, ok := verifier.(interface{ KeyID(string) (string, bool) }); ok {
		return v.KeyID(text)
	}
	return keystore.ParseID(text)
}

// SendHint returns what a caller has to send, such as "authorization: Bearer <key>".
func (h Headers) SendHint() string {
	return h[0].Name + ": " + strings.TrimLeft(h[0].Schemes[0]+" <key>", " ")
}
