package interceptor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/scope"
)

// An Option is a setting for New. The zero Option has no effect. New returns an error for an Option
// that cannot be used, such as a nil function, a malformed name, or a second rule for a method.
type Option struct {
	apply func(*config) error
}

// Header accepts keys in the metadata header name, after scheme and a space. If scheme is empty,
// the header holds the key alone, as in Header("x-api-key", ""). The default is
// Header("authorization", "Bearer"); any Header option replaces the default. To accept several
// headers or schemes, give Header several times. Upper and lower case do not matter in the name or
// in the scheme (RFC 9110, sections 5.1 and 11.1).
func Header(name, scheme string) Option {
	return Option{func(c *config) error { return c.credentials.headers.Add(name, scheme) }}
}

// Public lets every caller call the methods. Callers need no key, and Public ignores a key that a
// caller sends. Give full names such as "/grpc.health.v1.Health/Check", or all methods of a
// service, as in "/grpc.health.v1.Health/*".
func Public(fullMethods ...string) Option {
	return addRules("Public", rule{public: true}, fullMethods)
}

// Require lets a key call the method only if the key has all the scopes. See keystore.Key.HasScope
// for wildcards in the scopes of keys. A method without a rule takes any valid key.
//
// Give the full name of one method, and at least one scope. A scope is printable ASCII without
// spaces, as in keystore.Spec. New returns an error for a scope that no key can have, such as "a b"
// or "read\n".
func Require(fullMethod string, scopes ...string) Option {
	return requireScopes("Require", fullMethod, scopes, false)
}

// RequireAny lets a key call the method only if the key has at least one of the scopes. Otherwise
// RequireAny is as Require.
func RequireAny(fullMethod string, scopes ...string) Option {
	return requireScopes("RequireAny", fullMethod, scopes, true)
}

// requireScopes is Require, or, with anyOf, RequireAny.
func requireScopes(option, fullMethod string, scopes []string, anyOf bool) Option {
	return Option{func(c *config) error {
		if len(scopes) == 0 {
			return fmt.Errorf("%s %q: name at least one scope", option, fullMethod)
		}
		for _, s := range scopes {
			if err := checkScope(s); err != nil {
				return fmt.Errorf("%s %q: %w", option, fullMethod, err)
			}
		}
		if strings.HasSuffix(fullMethod, "/*") {
			return fmt.Errorf(
				"%s %q: name one method: only Public, Optional and AnyKey accept a service",
				option, fullMethod)
		}
		r := rule{scopes: slices.Clone(scopes), anyOf: anyOf}
		if err := c.rules.add(fullMethod, r); err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
		return nil
	}}
}

// checkScope returns an error for a scope that no key can have. Scopes of keys have the same
// grammar.
func checkScope(s string) error {
	if err := scope.Check(s); err != nil {
		return fmt.Errorf("the scope %.200q %w", s, err)
	}
	return nil
}

// An ErrorMapper replaces the status of a refused call. The client gets the status that the
// ErrorMapper returns. If the ErrorMapper returns nil or the code OK, the client gets
// defaultStatus: an ErrorMapper cannot accept a call.
//
// The context is the context of the call, without the credential. The error is a *Refusal, with the
// key, as far as it is known, and the address of the caller. errors.Is finds the errors of package
// keystore in the error.
//
// An ErrorMapper must be quick and safe for concurrent use. The text of the status must not let a
// client distinguish one kind of bad key from another. If the ErrorMapper panics, the client gets
// defaultStatus, and the panic is logged: see LogRefusals.
type ErrorMapper func(
	ctx context.Context, fullMethod string, err error, defaultStatus *status.Status,
) *status.Status

// MapErrors lets m choose the status of each refused call, and of each stream that ends with its
// key. If MapErrors is given several times, the last one counts.
func MapErrors(m ErrorMapper) Option {
	return Option{func(c *config) error {
		if m == nil {
			return errors.New("MapErrors: the mapper is nil")
		}
		c.mapper = m
		return nil
	}}
}

// RequireTLS refuses calls on connections without privacy and integrity, before the credential is
// read. TLS has both. The local credentials of gRPC have both on a unix socket.
func RequireTLS() Option {
	return Option{func(c *config) error {
		c.credentials.requireTLS = true
		return nil
	}}
}
