package interceptor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const domain = "github.com/grpc-api-key/grpc-api-key"

// What callers are told. See the package's comment.
var (
	invalidStatus = newStatus(codes.Unauthenticated, "API_KEY_INVALID", "invalid API key", nil)
	severalStatus = newStatus(codes.Unauthenticated, "CREDENTIALS_SEVERAL", "the call carries several credentials: send one; "+
		"gRPC adds the credentials of a call to those of its connection", nil)
	insecureStatus = newStatus(codes.Unauthenticated, "INSECURE_TRANSPORT", "API keys are taken over TLS only", nil)
	revokedStatus  = newStatus(codes.Unauthenticated, "API_KEY_REVOKED", "the API key was revoked", nil)
	expiredStatus  = newStatus(codes.Unauthenticated, "API_KEY_EXPIRED", "the API key, or this secret of it, has expired", nil)
	changedStatus  = newStatus(codes.Unavailable, "API_KEY_CHANGED", "the API key was changed: open the stream again", nil,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(0)})
	unavailableStatus = newStatus(codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE", "API keys cannot be checked now: try again", nil,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
)

// syntaxStatuses are what callers are told who do not send a key as they must. Each says which header to use.
type syntaxStatuses struct{ missing, noScheme, wrongScheme *status.Status }

func newSyntaxStatuses(h header) syntaxStatuses {
	send := fmt.Sprintf("send it as metadata, %s: %s", h.name, strings.TrimLeft(h.schemes[0]+" <key>", " "))
	refuse := func(reason, text string) *status.Status {
		return newStatus(codes.Unauthenticated, reason, text+": "+send, nil)
	}
	return syntaxStatuses{
		missing:     refuse("CREDENTIALS_MISSING", "an API key is needed"),
		noScheme:    refuse("CREDENTIALS_SCHEME_MISSING", "the API key has no scheme before it"),
		wrongScheme: refuse("CREDENTIALS_SCHEME_INVALID", "the API key is sent with a scheme that this server does not accept"),
	}
}

func scopeStatus(scopes []string) *status.Status {
	return newStatus(codes.PermissionDenied, "INSUFFICIENT_SCOPE", "the API key lacks a scope that this method needs",
		map[string]string{"scopes": strings.Join(scopes, " ")})
}

func retryStatus(reason, text string, after time.Duration) *status.Status {
	return newStatus(codes.ResourceExhausted, reason, text, nil, &errdetails.RetryInfo{RetryDelay: durationpb.New(max(0, after))})
}

func newStatus(code codes.Code, reason, text string, metadata map[string]string, more ...protoadapt.MessageV1) *status.Status {
	info := &errdetails.ErrorInfo{Reason: reason, Domain: domain, Metadata: metadata}
	st, err := status.New(code, text).WithDetails(append([]protoadapt.MessageV1{info}, more...)...)
	if err != nil {
		panic(err) // not for any message that is linked in, as these are
	}
	return st
}

// A scopeError says that a valid key lacks a scope.
type scopeError struct{ status *status.Status }

func (e *scopeError) Error() string { return e.status.Message() }

// refusalStatus returns what a caller whose call is refused is told.
func (a *Authenticator) refusalStatus(ctx context.Context, fullMethod string, err error) *status.Status {
	return a.report(ctx, callRefused, fullMethod, err)
}

// report logs that a call was refused, or a stream ended, for err, and returns what the caller is
// told.
func (a *Authenticator) report(ctx context.Context, message, fullMethod string, err error) *status.Status {
	r, byDefault := a.newRefusal(ctx, fullMethod, err), a.defaultStatus(ctx, err)
	a.log.logRefusal(ctx, message, r, byDefault.Code())
	return a.mapStatus(ctx, r, byDefault)
}

func (a *Authenticator) defaultStatus(ctx context.Context, err error) *status.Status {
	var scope *scopeError
	var used *keystore.RateLimitError
	var throttled *throttledError
	switch {
	case errors.Is(err, errMissing):
		return a.syntax.missing
	case errors.Is(err, errSeveral):
		return severalStatus
	case errors.Is(err, errNoScheme):
		return a.syntax.noScheme
	case errors.Is(err, errWrongScheme):
		return a.syntax.wrongScheme
	case errors.Is(err, errInsecure):
		return insecureStatus
	case errors.Is(err, errNoRule):
		return noRuleStatus
	case errors.Is(err, errTwice):
		return twiceStatus
	case errors.As(err, &scope):
		return scope.status
	case errors.Is(err, keystore.ErrDenied):
		return invalidStatus
	case errors.As(err, &used):
		return retryStatus("RATE_LIMIT_EXCEEDED", "the API key is used too often", used.RetryAfter)
	case errors.As(err, &throttled):
		return retryStatus("AUTH_THROTTLED", "too many calls with bad credentials", throttled.retryAfter)
	case errors.Is(err, keystore.ErrChanged):
		return changedStatus
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err())
	default:
		return unavailableStatus
	}
}

// endedByStore reports whether a bound context that ended with cause was ended by the store.
func endedByStore(cause error) bool {
	for _, ours := range []error{keystore.ErrDenied, keystore.ErrChanged, keystore.ErrClosed, keystore.ErrUnavailable} {
		if errors.Is(cause, ours) {
			return true
		}
	}
	return false
}

// endStatus returns what the caller of a stream that is cut is told by default.
func endStatus(cause error) *status.Status {
	switch {
	case errors.Is(cause, keystore.ErrRevoked):
		return revokedStatus
	case errors.Is(cause, keystore.ErrExpired):
		return expiredStatus
	case errors.Is(cause, keystore.ErrDenied):
		return invalidStatus
	case errors.Is(cause, keystore.ErrChanged):
		return changedStatus
	default:
		return unavailableStatus
	}
}
