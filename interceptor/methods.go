package interceptor

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/codes"
)

// RequireRules refuses the calls of every method that has no rule, with PermissionDenied, before it
// looks at the credential. A rule is what Public, Optional, AnyKey, Require, RequireAny or
// RulesFrom say about the method or its service. Without this option, a method without a rule takes
// any valid key. Check lists the methods of a server that have no rule.
func RequireRules() Option {
	return Option{func(c *config) error {
		c.rules.required = true
		return nil
	}}
}

// AnyKey lets any valid key call the methods, also a key without scopes: full names, or all methods
// of a service, as "/package.Service/*". AnyKey is for RequireRules; without RequireRules, a method
// without a rule is the same.
func AnyKey(fullMethods ...string) Option {
	return addRules("AnyKey", rule{}, fullMethods)
}

// Optional lets a caller without a credential call the methods as nobody: FromContext returns
// false. A caller with a valid key is known: FromContext returns the key, and a stream ends when
// its key is revoked. A bad key is refused, and so is a header that is there and has no key. With
// RequireTLS, Optional methods need a secure connection, also for nobody. The names are full names,
// or all methods of a service, as "/package.Service/*".
func Optional(fullMethods ...string) Option {
	return addRules("Optional", rule{optional: true}, fullMethods)
}

func addRules(option string, r rule, fullMethods []string) Option {
	return Option{func(c *config) error {
		for _, m := range fullMethods {
			if err := c.rules.add(m, r); err != nil {
				return fmt.Errorf("%s: %w", option, err)
			}
		}
		return nil
	}}
}

var (
	errNoRule = errors.New("the method has no rule")
	// The metadata of a call pass the first Authenticator without the credential.
	errTwice = errors.New("two Authenticators on one call")

	noRuleStatus = newStatus(codes.PermissionDenied, "METHOD_HAS_NO_RULE",
		"no rule lets anyone call this method", nil)
	twiceStatus = newStatus(codes.Internal, "AUTHENTICATED_TWICE",
		"a second Authenticator got this call: "+
			"give the server the ServerOptions of one Authenticator, once", nil)
)

// needsNoKey reports whether the rule lets the call in without a look at a key.
func (a *Authenticator) needsNoKey(ctx context.Context, r rule) bool {
	return r.public || r.optional && (!a.credentials.requireTLS || secure(ctx)) && !a.credentials.present(ctx)
}

// splitMethod splits "/pkg.Service/Method" at its second slash: service is "/pkg.Service".
func splitMethod(fullMethod string) (service, method string, ok bool) {
	i := strings.LastIndexByte(fullMethod, '/')
	if i < 2 || fullMethod[0] != '/' || i == len(fullMethod)-1 || strings.Count(fullMethod, "/") != 2 {
		return "", "", false
	}
	return fullMethod[:i], fullMethod[i+1:], true
}
