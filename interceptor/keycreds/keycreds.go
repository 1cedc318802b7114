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

// maxKey is the longest key that a server takes: internal/token has the same limit, and is not imported, so that
// clients depend on gRPC alone.
const maxKeyLen = 512

// Errors are statuses, because gRPC turns any other into Unauthenticated for a connection's credentials, and into
// Internal for a call's.
var (
	errEmpty = status.Error(codes.Unauthenticated,
		"keycreds: the API key is empty: is the variable or the file set that it is read from?")
	errCharacters = status.Error(codes.Unauthenticated,
		"keycreds: the API key has white space inside, or characters other than printable ASCII: "+
			"give the key alone, without a scheme such as Bearer")
	errLength = status.Errorf(codes.Unauthenticated,
		"keycreds: the API key is longer than %d bytes: is it an API key?", maxKeyLen)
	errNoSecurityInfo = status.Error(codes.Unauthenticated,
		"keycreds: the API key does not go over an insecure connection: "+
			"use TLS (the transport credentials do not say how secure this one is)")
	errNilSource = status.Error(codes.Internal, "keycreds: FromSource: the source is nil")
)

// New returns credentials that send the key token. White space around it, such as the line break at the end of a
// file, is cut off.
//
// If the token cannot be a key, or an option is bad, calls fail; see the package's comment. The credentials are safe
// for concurrent use, also by several connections. They print as their header, without the key.
func New(token string, opts ...Option) credentials.PerRPCCredentials {
	key, err := parseKey(token)
	return newCreds(func(context.Context) (string, error) { return key, err }, opts)
}

// FromSource returns credentials that ask source for the key, and are otherwise those of [New].
//
// The source is asked on every call, every opening of a stream, and every retry, before anything is
// sent, unless the connection may not carry a key. It must be quick, or keep the key for a while,
// be safe for concurrent use, and return when its context, which is the call's, ends. If it returns
// an error, the call fails with code Unavailable; the text is passed on, so it must not hold the
// key. If it panics, the call fails with code Unavailable too. For a key in a file, use [FromFile].
func FromSource(source func(context.Context) (string, error), opts ...Option) credentials.PerRPCCredentials {
	return newCreds(func(ctx context.Context) (string, error) {
		if source == nil {
			return "", errNilSource
		}
		token, failed := callSource(ctx, source)
		switch {
		case failed == nil:
			return parseKey(token)
		case ctx.Err() != nil: // the caller's own doing
			return "", status.FromContextError(ctx.Err()).Err()
		default:
			return "", failed
		}
	}, opts)
}

// callSource calls the source. A panic of the source, or of its error, becomes an error: gRPC asks
// credentials on goroutines of its own too, where nobody recovers. The text of a panic may hold the
// key, except that of a runtime error.
func callSource(
	ctx context.Context, source func(context.Context) (string, error),
) (token string, failed *sourceError) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case runtime.Error:
			failed = &sourceError{p, "it panicked: " + p.Error()}
		case error:
			failed = &sourceError{p, fmt.Sprintf("it panicked with a value of type %T", p)}
		default:
			failed = &sourceError{nil, fmt.Sprintf("it panicked with a value of type %T", p)}
		}
	}()
	token, err := source(ctx)
	if err != nil {
		return "", &sourceError{err, err.Error()}
	}
	return token, nil
}

// parseKey returns the key in token.
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

// A sourceError is the failure of a source. Unlike a plain status it keeps the cause for errors.Is, and the status
// hides the code that the cause may have: NotFound, from a secret manager, is not the called server's answer.
type sourceError struct {
	cause error // nil: a panic with a value that is no error
	text  string
}

func (e *sourceError) Error() string { return e.GRPCStatus().String() }
func (e *sourceError) Unwrap() error { return e.cause }
func (e *sourceError) GRPCStatus() *status.Status {
	return status.New(codes.Unavailable, "keycreds: the source of the API key failed: "+e.text)
}

// creds is immutable.
type creds struct {
	// A closure over the key, because fmt, encoding/json and reflect see the fields of a struct, but not what a
	// function captured.
	key func(context.Context) (string, error)

	header, scheme string
	allowInsecure  bool
	err            error // what is wrong with the options
}

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
	// gRPC asks RequireTransportSecurity and checks this by itself; but what wraps these credentials may answer for
	// them, and credentials.CheckSecurityLevel lets a connection pass that does not say how secure it is.
	if !c.allowInsecure {
		switch level := securityLevel(ctx); level {
		case credentials.PrivacyAndIntegrity:
		case credentials.InvalidSecurityLevel:
			return nil, errNoSecurityInfo
		default:
			return nil, status.Errorf(codes.Unauthenticated,
				"keycreds: the API key does not go over an insecure connection: use TLS (this one has %v)", level)
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

// securityLevel returns what the connection of a call says about itself; if that is nothing, InvalidSecurityLevel.
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

// An Option is a setting for New, FromSource and FromFile. The zero Option changes nothing.
type Option struct {
	apply func(*creds)
}

// AllowInsecure lets the key go over plaintext connections, where whoever is on the way can read it and use it. It is
// for tests, and for links that are trusted otherwise.
func AllowInsecure() Option {
	return Option{func(c *creds) { c.allowInsecure = true }}
}

// WithHeader sends the key in the metadata header name, after scheme and a space, or bare if scheme is empty, as in
// WithHeader("x-api-key", ""). Without this option, it is WithHeader("authorization", "Bearer"). The last one counts.
//
// The name is lowered. It is made of letters, digits, '-', '_' and '.', and is none that gRPC or HTTP/2 has a use
// for: "grpc-…", "…-bin", "connection", "content-type", "host", "te" and "user-agent". The scheme is a token of RFC
// 9110, section 5.6.2. If either is bad, calls fail with code Internal.
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

// checkHeader says what is wrong with a header, without quoting it: a "scheme" that is none may well be "Bearer
// <key>".
func checkHeader(name, scheme string) error {
	switch name {
	case "":
		return errors.New("the name is empty")
	case "connection", "content-type", "host", "te", "user-agent":
		return errors.New("the name is one that gRPC or HTTP/2 uses: choose another")
	}
	switch { // Trim leaves something exactly if there is a character that is not in its set
	case strings.Trim(name, nameChars) != "":
		return errors.New("the name has characters other than letters, digits, '-', '_' and '.'")
	case strings.HasPrefix(name, "grpc-"):
		return errors.New("names in grpc- are gRPC's own: choose another")
	case strings.HasSuffix(name, "-bin"):
		return errors.New("gRPC encodes what has a name in -bin: choose another")
	case strings.Trim(scheme, schemeChars) != "":
		return errors.New("the scheme is not a token of RFC 9110: give one word, such as Bearer, without space and key")
	}
	return nil
}
