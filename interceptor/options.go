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

// An Option is a setting for New.
type Option struct {
	apply func(*config) error
}

// Header accepts keys in a metadata header, after a scheme and a space, such as "authorization" and "Bearer", which
// is the default, or, if scheme is empty, bare, such as in "x-api-key". The case of neither matters (RFC 9110,
// sections 5.1 and 11.1). It may be given several times, and then replaces the default.
func Header(name, scheme string) Option {
	return Option{func(c *config) error {
		lower := strings.ToLower(name)
		if err := checkHeader(lower); err != nil {
			return fmt.Errorf("Header %q: %w", name, err)
		}
		if !isToken(scheme) {
			return fmt.Errorf("Header %q: the scheme %q is not a token of RFC 9110", name, scheme)
		}
		headers := &c.credentials.headers
		i := slices.IndexFunc(*headers, func(h header) bool { return h.name == lower })
		if i < 0 {
			i = len(*headers)
			*headers = append(*headers, header{name: lower})
		}
		h := &(*headers)[i]
		if slices.ContainsFunc(h.schemes, func(s string) bool { return strings.EqualFold(s, scheme) }) {
			return fmt.Errorf("Header %q with the scheme %q is given twice", name, scheme)
		}
		h.schemes = append(h.schemes, scheme)
		return nil
	}}
}

// checkHeader says what is wrong with the lower-case name of a metadata header that clients or
// proxies set.
func checkHeader(lower string) error {
	switch {
	case lower == "" || strings.Trim(lower, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "":
		return errors.New("a name is made of letters, digits, '-', '_' and '.'")
	case strings.HasSuffix(lower, "-bin"):
		return errors.New("gRPC encodes what has a name in -bin: choose another")
	case strings.HasPrefix(lower, "grpc-"):
		return errors.New("names in grpc- are gRPC's own: choose another")
	case slices.Contains([]string{"connection", "content-type", "host", "te", "user-agent"}, lower):
		return errors.New("gRPC or HTTP/2 has its own use for it: choose another")
	}
	return nil
}

// isToken reports whether s is made of a token's characters (RFC 9110, section 5.6.2), or empty.
func isToken(s string) bool {
	for _, c := range []byte(s) {
		alnum := '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'z'
		if !alnum && !strings.ContainsRune("!#$%&'*+-.^_`|~", rune(c)) {
			return false
		}
	}
	return true
}

// Public lets everyone call the methods, with no key or with any: full names such as "/grpc.health.v1.Health/Check", or
// all methods of a service, as "/grpc.health.v1.Health/*".
func Public(fullMethods ...string) Option {
	return addRules("Public", rule{public: true}, fullMethods)
}

// Require lets a key call the method only if it has all the scopes; see keystore.Key.HasScope for wildcards in a key's. A
// method that no rule names takes any valid key.
//
// A scope is printable ASCII without space, as keystore.Spec says. New refuses a scope that no key
// can have, such as "a b" or "read\n".
func Require(fullMethod string, scopes ...string) Option {
	return requireScopes("Require", fullMethod, scopes, false)
}

// RequireAny lets a key call the method only if it has one of the scopes at least.
func RequireAny(fullMethod string, scopes ...string) Option {
	return requireScopes("RequireAny", fullMethod, scopes, true)
}

func requireScopes(option, fullMethod string, scopes []string, any bool) Option {
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
			return fmt.Errorf("%s %q: name one method; only Public, Optional and AnyKey take a whole service",
				option, fullMethod)
		}
		if err := c.rules.add(fullMethod, rule{scopes: slices.Clone(scopes), anyOf: any}); err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
		return nil
	}}
}

// checkScope refuses a scope that no key can have: keys have the same grammar.
func checkScope(s string) error {
	if err := scope.Check(s); err != nil {
		return fmt.Errorf("the scope %.200q %w", s, err)
	}
	return nil
}

// An ErrorMapper changes what callers are told. It gets the context of the call, without the
// credential, its full method, why it is refused, and what the caller is told by default. The error
// is a *Refusal, which says what is known of the key and of where the call came from, and may be
// matched with keystore's errors. What the mapper returns is told instead, unless that is nil or
// has the code OK: a mapper lets nobody in. It must be safe for concurrent use, quick, and must not
// put a cause into the text that tells one bad key from another. If it panics, the caller is told
// the default, and the panic is logged: see LogRefusals.
type ErrorMapper func(ctx context.Context, fullMethod string, err error, defaultStatus *status.Status) *status.Status

// MapErrors sets the ErrorMapper.
func MapErrors(m ErrorMapper) Option {
	return Option{func(c *config) error {
		if m == nil {
			return errors.New("MapErrors: the mapper is nil")
		}
		c.mapper = m
		return nil
	}}
}

// RequireTLS refuses calls that came over a connection without privacy and integrity, before it reads their
// credential. TLS has both, and so have gRPC's local credentials on a unix socket.
func RequireTLS() Option {
	return Option{func(c *config) error {
		c.credentials.requireTLS = true
		return nil
	}}
}
