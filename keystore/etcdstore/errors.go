package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
)

// wrap returns the error of a call. If the context of the caller has ended, or the Backend was
// closed, wrap returns that. After a deadline, the text also says what is known of the reason.
func (b *Backend) wrap(ctx context.Context, op string, err error) error {
	switch ended := b.calls.Ended(ctx); {
	case errors.Is(ended, context.DeadlineExceeded):
		text := explain(b.client, b.prefix, "etcdstore: "+op, err).Error()
		return &remote.Error{Text: text, Err: ended}
	case ended != nil:
		return ended
	}
	if errors.Is(err, errRestored) {
		return fmt.Errorf("etcdstore: %s: %w while the call was under way", op, err)
	}
	return explain(b.client, b.prefix, "etcdstore: "+op, err)
}

// explain returns a remote.Error that begins with what was done. Its Err is the error of etcd.
func explain(client *clientv3.Client, prefix, doing string, err error) error {
	if err == nil {
		return nil
	}
	err = rpctypes.Error(err)
	text := redact(client, rpctypes.ErrorDesc(err))
	if advice := advise(prefix, err, text); advice != "" {
		text += ": " + advice
	}
	return &remote.Error{Text: doing + ": " + text, Err: err}
}

// advise returns what to do about an error of etcd or of the connection, or "".
func advise(prefix string, err error, text string) string {
	has := func(part string) bool { return strings.Contains(text, part) }
	switch {
	case errors.Is(err, rpctypes.ErrAuthFailed):
		return "etcd refuses the user name or the password: check Username and Password of the " +
			"client's Config"
	case errors.Is(err, rpctypes.ErrUserEmpty):
		return "etcd requires a user: set Username and Password of the client's Config, or use a " +
			"client certificate whose common name is the user"
	case errors.Is(err, rpctypes.ErrPermissionDenied):
		return fmt.Sprintf("the role of the user has too few rights: grant the rights with "+
			"\"etcdctl role grant-permission ROLE --prefix=true readwrite %s\"", prefix)
	case errors.Is(err, rpctypes.ErrInvalidAuthToken), errors.Is(err, rpctypes.ErrAuthOldRevision):
		return "etcd no longer accepts the token of the client"
	case errors.Is(err, rpctypes.ErrTooManyOps):
		return "the store needs 128 operations in a transaction: start etcd without --max-txn-ops"
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return "the store needs etcd's default request size: start etcd without --max-request-bytes"
	case errors.Is(err, rpctypes.ErrNoLeader), errors.Is(err, rpctypes.ErrTimeout),
		errors.Is(err, rpctypes.ErrTimeoutDueToLeaderFail),
		errors.Is(err, rpctypes.ErrTimeoutDueToConnectionLost):
		return "etcd has no leader now: check that a majority of its members is running"
	case has("remote error: tls:"):
		return "the server requires a client certificate that it trusts: set Certificates in TLS " +
			"of the client's Config"
	case has("failed to verify certificate"):
		return "the client does not trust the certificate of the server: check RootCAs and " +
			"ServerName in TLS of the client's Config"
	case has("authentication handshake failed"): // EOF, or no TLS record
		return "if the server does not use TLS, begin the endpoint with http://, and leave TLS " +
			"of the client's Config nil"
	case has("error reading server preface"):
		return "if the server uses TLS, begin the endpoint with https://, or set TLS of the " +
			"client's Config"
	case status.Code(err) == codes.Unimplemented, has("unexpected HTTP status code"):
		return "the endpoint is not a client URL of an etcd server"
	case has("connection refused"), has("no such host"), has("i/o timeout"):
		return "check the endpoints of the client's Config"
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded:
		return "etcd has not answered in time: check the network, and that a majority of the " +
			"members is running"
	case has(connClosing):
		return "the etcd client was closed before the store"
	}
	return ""
}

// connClosing is in the error of a call on a client that was closed.
const connClosing = "the client connection is closing"

// redact removes the credentials of the client from a text.
func redact(client *clientv3.Client, text string) string {
	secrets := []string{client.Password, client.Token}
	for _, endpoint := range client.Endpoints() {
		if u, err := url.Parse(endpoint); err == nil && u.User != nil {
			password, _ := u.User.Password()
			secrets = append(secrets, u.User.String(), password)
		}
	}
	for _, secret := range secrets {
		if secret != "" {
			text = strings.ReplaceAll(text, secret, "REDACTED")
		}
	}
	return text
}

// codeOf returns the gRPC code of an error of etcd or of the connection.
func codeOf(err error) codes.Code {
	var e rpctypes.EtcdError
	if errors.As(err, &e) {
		return e.Code()
	}
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus().Code()
	}
	return codes.Unknown
}

// isTransient reports whether the same call may succeed later although no person changes anything.
func isTransient(err error) bool {
	if e := (*remote.Error)(nil); !errors.As(err, &e) && !errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	if strings.Contains(err.Error(), connClosing) {
		return false
	}
	switch codeOf(err) {
	case codes.Unavailable, codes.Unknown, codes.Canceled, codes.Aborted, codes.DeadlineExceeded,
		codes.Internal, codes.ResourceExhausted:
		return true
	}
	return false
}

// cancelError returns the error that etcd names as the reason for the end of a watch. The text of
// the reason is that of a gRPC error.
func cancelError(reason string) error {
	for _, err := range []error{
		rpctypes.ErrGRPCPermissionDenied, rpctypes.ErrGRPCInvalidAuthToken,
		rpctypes.ErrGRPCAuthOldRevision, rpctypes.ErrGRPCUserEmpty, rpctypes.ErrGRPCNoLeader,
	} {
		if reason == err.Error() || reason == rpctypes.ErrorDesc(err) {
			return err
		}
	}
	if reason == "" {
		reason = "etcd has ended the watch"
	}
	return status.Error(codes.Unavailable, reason)
}
