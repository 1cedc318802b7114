package interceptor

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/errinfo"
)

// statuses are the default statuses of refused calls and ended streams, as far as they are
// constant. The package comment lists all of them.
var statuses = [admission.NumKinds]*status.Status{
	admission.Several:   kindStatus(codes.Unauthenticated, admission.Several),
	admission.Insecure:  kindStatus(codes.Unauthenticated, admission.Insecure),
	admission.NoRule:    kindStatus(codes.PermissionDenied, admission.NoRule),
	admission.Twice:     kindStatus(codes.Internal, admission.Twice),
	admission.Invalid:   kindStatus(codes.Unauthenticated, admission.Invalid),
	admission.Revoked:   kindStatus(codes.Unauthenticated, admission.Revoked),
	admission.Expired:   kindStatus(codes.Unauthenticated, admission.Expired),
	admission.Exhausted: kindStatus(codes.ResourceExhausted, admission.Exhausted),
	admission.Changed: kindStatus(codes.Unavailable, admission.Changed,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(0)}),
}

var unavailableStatuses = newUnavailableStatuses()

// kindStatus returns a status with the reason and the text of a Kind.
func kindStatus(
	code codes.Code, k admission.Kind, more ...protoadapt.MessageV1,
) *status.Status {
	return errinfo.New(code, k.Reason(), k.Text(), nil, more...)
}

// newUnavailableStatuses returns statuses that differ in the delay of the RetryInfo: from half a
// second to one and a half seconds. All clients of a server may be refused at the same moment, and
// must not all come back at the same moment.
func newUnavailableStatuses() (all [16]*status.Status) {
	for i := range all {
		delay := time.Second/2 + time.Second*time.Duration(i)/time.Duration(len(all)-1)
		all[i] = kindStatus(codes.Unavailable, admission.Unavailable,
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

func newSyntaxStatuses(h admission.Headers) syntaxStatuses {
	send := ": send it as metadata, " + h.SendHint()
	refuse := func(k admission.Kind) *status.Status {
		return errinfo.New(codes.Unauthenticated, k.Reason(), k.Text()+send, nil)
	}
	return syntaxStatuses{
		missing:     refuse(admission.Missing),
		noScheme:    refuse(admission.NoScheme),
		wrongScheme: refuse(admission.WrongScheme),
	}
}

// retryStatus returns the status for a call that exceeds a limit.
func retryStatus(k admission.Kind, after time.Duration) *status.Status {
	return kindStatus(codes.ResourceExhausted, k,
		&errdetails.RetryInfo{RetryDelay: durationpb.New(max(0, after))})
}

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
	a.log.Refusal(ctx, admission.Line{
		Message: message, Where: methodAttr(r.Method), Reason: r.Reason, KeyID: r.KeyID,
		Addr: r.Addr, Proxy: r.Proxy, Err: r.err,
		Fault: code == codes.Unavailable || code == codes.Internal,
	})
	if len(a.observers) > 0 {
		a.notify(ctx, newCall(message, known, r))
	}
}

// defaultStatus returns the status for a refused call, before an ErrorMapper changes it.
func (a *Authenticator) defaultStatus(ctx context.Context, err error) *status.Status {
	switch k := admission.KindOf(err); k {
	case admission.Missing:
		return a.syntax.missing
	case admission.NoScheme:
		return a.syntax.noScheme
	case admission.WrongScheme:
		return a.syntax.wrongScheme
	case admission.Scope:
		var scope *admission.ScopeError
		errors.As(err, &scope)
		return errinfo.MissingScope(scope.Scopes)
	case admission.RateLimited, admission.Throttled:
		return retryStatus(k, admission.RetryAfter(err))
	case admission.Exhausted:
		after := admission.RetryAfter(err)
		if after == 0 {
			return statuses[k] // no refill ends the refusal
		}
		return retryStatus(k, after)
	case admission.Unavailable:
		if ctx.Err() != nil {
			return status.FromContextError(ctx.Err())
		}
		return unavailableStatus()
	default:
		return statuses[k]
	}
}

// endStatus returns the status for the client of a stream that ended with its key, before an
// ErrorMapper changes it.
func endStatus(cause error) *status.Status {
	if k := admission.EndKind(cause); k != admission.Unavailable {
		return statuses[k]
	}
	return unavailableStatus()
}
