package admin

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/errinfo"
	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A refusal is an error with a status for the caller. A refusal is not the error type of package
// status: a storage engine may wrap such an error of another server.
type refusal struct {
	status *status.Status
	cause  error // for the logger; may be nil
}

func (e *refusal) Error() string {
	if e.cause != nil {
		return e.status.Message() + ": " + e.cause.Error()
	}
	return e.status.Message()
}

func refuse(code codes.Code, reason, text string, metadata map[string]string) error {
	return &refusal{status: errinfo.New(code, reason, text, metadata)}
}

// invalid is the error for a field that cannot be used. The text must not contain a secret.
func invalid(format string, args ...any) error {
	return refuse(codes.InvalidArgument, "INVALID_ARGUMENT", fmt.Sprintf(format, args...), nil)
}

var (
	errNoPrincipal = refuse(codes.Unauthenticated, "PRINCIPAL_MISSING",
		"this call names no principal: serve the service behind an Authenticator, "+
			"or on a unix socket with PeerCredentials", nil)
	errPageToken = refuse(codes.InvalidArgument, "PAGE_TOKEN_INVALID",
		"page_token is not from a response to the same request: "+
			"leave it empty for the first page", nil)
	stoppingStatus = errinfo.New(codes.Unavailable, "STORE_CLOSED", "the server is stopping", nil)

	errNothingSelected = refuse(codes.InvalidArgument, "SELECTION_EMPTY",
		"the filter is empty: set a field of the filter, or set all to revoke every key", nil)
)

// statusOf returns the status for the caller of a method that failed. For errors of the caller, the
// text says what is wrong. For trouble of the server, the text is constant, and the reason goes to
// the logger: see answer.
func statusOf(err error, writes bool) *status.Status {
	var own *refusal
	var ceiling *manage.CeilingError
	switch {
	case errors.As(err, &own):
		return own.status
	case errors.As(err, &ceiling):
		return ceilingStatus(ceiling)
	case errors.Is(err, manage.ErrRequestReused):
		return errinfo.New(codes.InvalidArgument, "REQUEST_ID_REUSED",
			"request_id was used for a request with other content: make a new UUID", nil)
	case errors.Is(err, manage.ErrManyRequests):
		return errinfo.New(codes.ResourceExhausted, "REQUESTS_IN_PROGRESS",
			"too many calls with a request_id are in progress: try again", nil, errinfo.Soon())
	case errors.Is(err, keystore.ErrNotEverywhere):
		return errinfo.New(codes.Unavailable, "NOT_EVERYWHERE",
			"the change is made, but another process of the store may not know the change yet: "+
				"repeat the call, without an etag, to wait", nil, errinfo.Soon())
	case errors.Is(err, keystore.ErrInvalid):
		return errinfo.New(codes.InvalidArgument, "INVALID_ARGUMENT", textOf(err), nil)
	case errors.Is(err, keystore.ErrNotFound):
		return errinfo.New(codes.NotFound, "KEY_NOT_FOUND", withoutOperation(textOf(err)), nil)
	case errors.Is(err, keystore.ErrKeyRevoked):
		return errinfo.New(codes.FailedPrecondition, "KEY_REVOKED",
			withoutOperation(textOf(err)), nil)
	case errors.Is(err, keystore.ErrConflict):
		return errinfo.New(codes.Aborted, "ETAG_MISMATCH",
			withoutOperation(textOf(err))+": get the key, and decide again", nil)
	case errors.Is(err, keystore.ErrCorrupt):
		return errinfo.New(codes.DataLoss, "STORE_CORRUPT", textOf(err), nil)
	case errors.Is(err, keystore.ErrClosed):
		return stoppingStatus
	case errors.Is(err, syscall.ENOSPC):
		return errinfo.New(codes.Unavailable, "STORE_FULL",
			"the disk of the server is full, and nothing was changed: make space on the disk", nil)
	case errors.Is(err, context.Canceled):
		return status.New(codes.Canceled, "the call was cancelled")
	case errors.Is(err, context.DeadlineExceeded):
		return status.New(codes.DeadlineExceeded, "the deadline of the call has passed")
	case writes:
		return errinfo.New(codes.Unavailable, "OUTCOME_UNKNOWN",
			"the store did not answer, so the change may have been made or not: "+
				"look at the key, and try again", nil, errinfo.Soon())
	default:
		return errinfo.New(codes.Unavailable, "STORE_UNAVAILABLE",
			"the store did not answer: try again", nil, errinfo.Soon())
	}
}

func ceilingStatus(e *manage.CeilingError) *status.Status {
	metadata := map[string]string{"scopes": strings.Join(e.Scopes, " ")}
	if len(e.Scopes) == 0 {
		metadata = map[string]string{"expire_time": e.ExpiresAt.UTC().Format(time.RFC3339Nano)}
	}
	return errinfo.New(codes.PermissionDenied, "SCOPE_CEILING", e.Error(), metadata)
}

// textOf returns the text of an error of the store without the words that the code and the reason
// of the status repeat, and with the names of the fields that the caller has set.
func textOf(err error) string {
	text := strings.TrimPrefix(err.Error(), "keystore: ")
	text = strings.TrimPrefix(text, keystore.ErrInvalid.Error()+": ")
	return fieldNames.Replace(text)
}

// withoutOperation returns a text of the store without the operation that begins the text. One
// method makes several operations, and the caller knows the method.
func withoutOperation(text string) string { return storeOperation.ReplaceAllString(text, "") }

var storeOperation = regexp.MustCompile(`^[a-z ]+: `)

var fieldNames = strings.NewReplacer(
	"Spec.Name", "display_name",
	"Spec.Owner", "owner",
	"Spec.Scopes", "scopes",
	"Spec.Metadata", "metadata",
	"Spec.ExpiresAt", "expire_time",
	"Spec.NotBefore", "start_time",
	"Spec.AllowedNetworks", "allowed_networks",
	"Spec.RateLimit", "rate_limit",
)
