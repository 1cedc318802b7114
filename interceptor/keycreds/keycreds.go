package keycreds

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// maxKeyLen is the length of the longest key that a server accepts. Package internal/token has the
// same limit, but is not imported here, so that clients depend on gRPC alone.
const maxKeyLen = 512

// All errors are statuses, because gRPC replaces the code of every other error: by Unauthenticated
// for the credentials of a connection, and by Internal for those of a call.
var (
	errEmpty = status.Error(codes.Unauthenticated,
		"keycreds: the API key is empty: check the variable or the file that the key comes from")
	errCharacters = status.Error(codes.Unauthenticated,
		"keycreds: the API key contains white space, or characters other than printable ASCII: "+
			"give the key alone, without a scheme such as Bearer")
	errLength = status.Errorf(codes.Unauthenticated,
		"keycreds: the API key is longer than %d bytes: check that the text is an API key",
		maxKeyLen)
	errNoSecurityInfo = status.Error(codes.Unauthenticated,
		"keycreds: the API key is not sent over an insecure connection: "+
			"use TLS (the transport credentials do not report the security level)")
	errNilSource = status.Error(codes.Internal, "keycreds: FromSource: the source is nil")
)

// New returns credentials that send the key token with every call. White space around the key, such
// as the line break at the end of a file, is removed.
//
// If token cannot be a key, or if an option is bad, calls fail; see the package comment. The
// credentials are safe for concurrent use, and several connections may share them. Printed, the
// credentials show the header, but not the key.
func New(token string, opts ...Option) credentials.PerRPCCredentials {
	key, err := parseKey(token)
	return newCreds(func(context.Context) (string, error) { return key, err }, opts)
}

// FromSource returns credentials that call source for the key of every call. Otherwise the
// credentials are those of [New]. For a key in a file, use [FromFile].
//
// Each unary call, each new stream and each retry calls source before anything is sent, unless the
// connection is not secure enough for a key. The source gets the context of the call, and must
// return when this context ends. The source must be safe for concurrent use. The source must be
// quick, or cache the key.
//
// If source returns an error or panics, the call fails with the code Unavailable. The text of the
// error is passed on, so the text must not contain the key.
func FromSource(
	source func(context.Context) (string, error), opts ...Option,
) credentials.PerRPCCredentials {
	return newCreds(func(ctx context.Context) (string, error) {
		if source == nil {
			return "", errNilSource
		}
		token, failed := callSource(ctx, source)
		switch {
		case failed == nil:
			return parseKey(token)
		case ctx.Err() != nil: // the caller ended the call, so the source is not to blame
			return "", status.FromContextError(ctx.Err()).Err()
		default:
			return "", failed
		}
	}, opts)
}

// callSource calls the source. A panic of the source, or of the method Error of its error, becomes
// an error: gRPC also calls credentials on internal goroutines, which do not recover panics. The
// text of a panic may contain the key, so callSource passes on only the text of a runtime error.
func callSource(
	ctx context.Context, source func(context.Context) (string, error),
) (token string, failed *sourceError) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case runtime.Error:
			failed = &sourceError{p, "panic: " + p.Error()}
		case error:
			failed = &sourceError{p, fmt.Sprintf("panic with a value of type %T", p)}
		default:
			failed = &sourceError{nil, fmt.Sprintf("panic with a value of type %T", p)}
		}
	}()
	token, err := source(ctx)
	if err != nil {
		return "", &sourceError{err, err.Error()}
	}
	return token, nil
}

// parseKey returns the key in token, without the white space around the key.
func parseKey(token string) (string, error) {
	key := strings.TrimSpace(token)
	switch {
	case key == "":
		return "", errEmpty
	case len(key) > maxKeyLen:
		return "", errLength
	}
	if err := checkMistake(key); err != nil {
		return "", err
	}
	if strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errCharacters
	}
	return key, nil
}

// A sourceError is the failure of a source. Unlike a plain status error, it wraps the cause, for
// errors.Is. It also hides the code of the cause: the code NotFound of a secret manager would look
// like an answer of the server that was called.
type sourceError struct {
	cause error // nil after a panic with a value that is not an error
	text  string
}

func (e *sourceError) Error() string { return e.GRPCStatus().String() }
func (e *sourceError) Unwrap() error { return e.cause }
func (e *sourceError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, "keycreds: the source of the API key failed: "+e.text)
}

// creds is immutable.
type creds struct {
	// key is a closure over the key, because fmt, encoding/json and reflect see the fields of a
	// struct, but not the variables that a function captures.
	key func(context.Context) (string, error)

	header, scheme string
	allowInsecure  bool
	err            error // of a bad option; nil if the options are good
}

// newCreds returns credentials with the options. The function key returns the checked key.
func newCreds(key func(context.Context) (string, error), opts []Option) *creds {
	c := &creds{key: key, header: "authorization", scheme: "Bearer"}
	for _, o := range opts {
		if o.apply != nil {
			o.apply(c)
		}
	}
	return c
}

// GetRequestMetadata implements [credentials.PerRPCCredentials].
func (c *creds) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	if c.err != nil {
		return nil, c.err
	}
	// gRPC makes a similar check if RequireTransportSecurity returns true. But a wrapper around
	// these credentials may return false. And credentials.CheckSecurityLevel accepts a connection
	// that does not report a security level.
	if !c.allowInsecure {
		switch level := securityLevel(ctx); level {
		case credentials.PrivacyAndIntegrity:
		case credentials.InvalidSecurityLevel:
			return nil, errNoSecurityInfo
		default:
			return nil, status.Errorf(codes.Unauthenticated,
				"keycreds: the API key is not sent over an insecure connection: "+
					"use TLS (the security level is %v)", level)
		}
	}
	value, err := c.key(ctx)
	if err != nil {
		return nil, err
	}
	if c.scheme != "" {
		value = c.scheme + " " + value
	}
	return map[string]string{c.header: value}, nil
}

// securityLevel returns the security level that the connection of a call reports, or
// InvalidSecurityLevel if the connection reports none.
func securityLevel(ctx context.Context) credentials.SecurityLevel {
	ri, _ := credentials.RequestInfoFromContext(ctx)
	info, ok := ri.AuthInfo.(interface {
		GetCommonAuthInfo() credentials.CommonAuthInfo
	})
	if !ok {
		return credentials.InvalidSecurityLevel
	}
	return info.GetCommonAuthInfo().SecurityLevel
}

// RequireTransportSecurity implements [credentials.PerRPCCredentials].
func (c *creds) RequireTransportSecurity() bool { return !c.allowInsecure }

func (c *creds) String() string { return "keycreds(" + c.header + ", redacted)" }

// An Option is a setting for New, FromSource and FromFile. The zero Option has no effect.
type Option struct {
	apply func(*creds)
}

// AllowInsecure sends the key over plaintext connections too. Every host on the way can then read
// the key and use it. Use AllowInsecure for tests, and for links that are secured otherwise.
func AllowInsecure() Option {
	return Option{func(c *creds) { c.allowInsecure = true }}
}

// WithHeader sends the key in the metadata header name, after scheme and a space. If scheme is
// empty, the header contains the key alone, as in WithHeader("x-api-key", ""). The default is
// WithHeader("authorization", "Bearer"). If WithHeader is given several times, the last one counts.
//
// The name consists of letters, digits, '-', '_' and '.'. Upper-case letters become lower case. The
// name must not be one that gRPC or HTTP/2 uses: "grpc-…", "…-bin", "connection", "host", "te",
// "content-type" or "user-agent". The scheme is a token of RFC 9110, section 5.6.2. If the name or
// the scheme is bad, calls fail with the code Internal.
func WithHeader(name, scheme string) Option {
	return Option{func(c *creds) {
		lower := strings.ToLower(name)
		if err := checkHeader(lower, scheme); err != nil {
			c.err = status.Error(codes.Internal, "keycreds: WithHeader: "+err.Error())
			return
		}
		c.header, c.scheme, c.err = lower, scheme, nil
	}}
}

const (
	nameChars   = "abcdefghijklmnopqrstuvwxyz0123456789-_."
	schemeChars = nameChars + "ABCDEFGHIJKLMNOPQRSTUVWXYZ!#$%&'*+^`|~"
)

// checkHeader returns an error if the header is bad. The error does not quote the scheme: a bad
// scheme may be "Bearer <key>".
func checkHeader(name, scheme string) error {
	switch name {
	case "":
		return errors.New("the name is empty")
	case "connection", "content-type", "host", "te", "user-agent":
		return errors.New("gRPC or HTTP/2 uses this header name: choose another")
	}
	switch { // strings.Trim returns "" if, and only if, all characters are in the set
	case strings.Trim(name, nameChars) != "":
		return errors.New("the name has characters other than letters, digits, '-', '_' and '.'")
	case strings.HasPrefix(name, "grpc-"):
		return errors.New("gRPC reserves names that begin with grpc-: choose another")
	case strings.HasSuffix(name, "-bin"):
		return errors.New("gRPC encodes headers whose name ends in -bin: choose another")
	case strings.Trim(scheme, schemeChars) != "":
		return errors.New("the scheme is not an RFC 9110 token: " +
			"give one word, such as Bearer, without a space and without the key")
	}
	return nil
}
