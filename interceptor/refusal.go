package interceptor

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-api-key/grpc-api-key/internal/errinfo"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The default statuses of refused calls and ended streams. The package comment lists all of them.
var (
	invalidStatus = errinfo.New(codes.Unauthenticated, "API_KEY_INVALID", "invalid API key", nil)
	severalStatus = errinfo.New(codes.Unauthenticated, "CREDENTIALS_SEVERAL",
		"the call carries several credentials: send one (gRPC sends the credentials of a call "+
			"in addition to those of the connection)", nil)
	insecureStatus = errinfo.New(codes.Unauthenticated, "INSECURE_TRANSPORT",
		"this server accepts API keys over TLS only", nil)
	revokedStatus = errinfo.New(codes.Unauthenticated, "API_KEY_REVOKED",
		"the API key was revoked", nil)
	expiredStatus = errinfo.New(codes.Unauthenticated, "API_KEY_EXPIRED",
		"the API key, or this secret of the key, has expired", nil)
	changedStatus = errinfo.New(codes.Unavailable, "API_KEY_CHANGED",
		"the API key was changed: open the stream again", nil,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(0)})
	unavailableStatuses = newUnavailableStatuses()
)

// newUnavailableStatuses returns statuses that differ in the delay of the RetryInfo: from half a
// second to one and a half seconds. All clients of a server may be refused at the same moment, and
// must not all come back at the same moment.
func newUnavailableStatuses() (all [16]*status.Status) {
	for i := range all {
		delay := time.Second/2 + time.Second*time.Duration(i)/time.Duration(len(all)-1)
		all[i] = errinfo.New(codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE",
			"the server cannot check API keys now: try again", nil,
			&errdetails.RetryInfo{RetryDelay: durationpb.New(delay)})
	}
	return all
}

// unavailableStatus returns one of the unavailableStatuses by chance.
func unavailableStatus() *status.Status {
	return unavailableStatuses[rand.IntN(len(unavailableStatuses))]
}

// syntaxStatuses are the statuses for mistakes in the syntax of a credential. The text of each one
// tells the client which header to send.
type syntaxStatuses struct{ missing, noScheme, wrongScheme *status.Status }

func newSyntaxStatuses(h header) syntaxStatuses {
	value := strings.TrimLeft(h.schemes[0]+" <key>", " ")
	send := fmt.Sprintf("send it as metadata, %s: %s", h.name, value)
	refuse := func(reason, text string) *status.Status {
		return errinfo.New(codes.Unauthenticated, reason, text+": "+send, nil)
	}
	return syntaxStatuses{
		missing: refuse("CREDENTIALS_MISSING", "the call has no API key"),
		noScheme: refuse("CREDENTIALS_SCHEME_MISSING",
			"the API key has no scheme before it"),
		wrongScheme: refuse("CREDENTIALS_SCHEME_INVALID",
			"the API key has a scheme that this server does not accept"),
	}
}

func retryStatus(reason, text string, after time.Duration) *status.Status {
	return errinfo.New(codes.ResourceExhausted, reason, text, nil,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(max(0, after))})
}

// A scopeError means that a valid key lacks a scope.
type scopeError struct{ status *status.Status }

func (e *scopeError) Error() string { return e.status.Message() }

// refusalStatus reports a refused call and returns the status for the client. known says that the
// server has the method: see Call.
func (a *Authenticator) refusalStatus(
	ctx context.Context, fullMethod string, known bool, err error,
) *status.Status {
	r, byDefault := a.newRefusal(ctx, fullMethod, err), a.defaultStatus(ctx, err)
	a.report(ctx, callRefused, known, r, byDefault.Code())
	return a.mapStatus(ctx, r, byDefault)
}

// report logs a call that was refused, or that ended with its key, and notifies the observers. The
// message is callRefused or callEnded. The code is the code before an ErrorMapper changes the
// status.
func (a *Authenticator) report(
	ctx context.Context, message string, known bool, r *Refusal, code codes.Code,
) {
	a.log.logRefusal(ctx, message, r, code)
	if len(a.observers) > 0 {
		a.notify(ctx, newCall(message, known, r))
	}
}

// defaultStatus returns the status for a refused call, before an ErrorMapper changes it.
func (a *Authenticator) defaultStatus(ctx context.Context, err error) *status.Status {
	var scope *scopeError
	var limited *keystore.RateLimitError
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
	case errors.As(err, &limited):
		return retryStatus("RATE_LIMIT_EXCEEDED", "the API key exceeds its rate limit",
			limited.RetryAfter)
	case errors.As(err, &throttled):
		return retryStatus("AUTH_THROTTLED", "too many calls with bad credentials",
			throttled.retryAfter)
	case errors.Is(err, keystore.ErrNarrowed):
		return changedStatus
	case ctx.Err() != nil:
		return status.FromContextError(ctx.Err())
	default:
		return unavailableStatus()
	}
}

// endedByStore reports whether the store ended a bound context that has the cause. Otherwise the
// context is still live, or its parent has ended.
func endedByStore(cause error) bool {
	for _, storeErr := range []error{
		keystore.ErrDenied, keystore.ErrNarrowed, keystore.ErrClosed, keystore.ErrUnavailable,
	} {
		if errors.Is(cause, storeErr) {
			return true
		}
	}
	return false
}

// endStatus returns the status for the client of a stream that ended with its key, before an
// ErrorMapper changes it.
func endStatus(cause error) *status.Status {
	switch {
	case errors.Is(cause, keystore.ErrRevoked):
		return revokedStatus
	case errors.Is(cause, keystore.ErrExpired):
		return expiredStatus
	case errors.Is(cause, keystore.ErrDenied):
		return invalidStatus
	case errors.Is(cause, keystore.ErrNarrowed):
		return changedStatus
	default:
		return unavailableStatus()
	}
}
