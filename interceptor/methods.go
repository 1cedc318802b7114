package interceptor

import (
	"context"
	"fmt"
	"strings"
)

// RequireRules refuses every call of a method without a rule, with PermissionDenied, before the
// credential is read. Public, Optional, AnyKey, Require, RequireAny and RulesFrom give rules to
// methods, or to all methods of a service. Without RequireRules, a method without a rule takes any
// valid key. Authenticator.Check lists the methods of a server that have no rule.
func RequireRules() Option {
	return Option{func(c *config) error {
		c.rules.required = true
		return nil
	}}
}

// AnyKey lets any valid key call the methods, even a key without scopes. Give full names, or all
// methods of a service, as in "/package.Service/*". AnyKey is useful with RequireRules; without
// RequireRules, any valid key can call a method without a rule.
func AnyKey(fullMethods ...string) Option {
	return addRules("AnyKey", rule{}, fullMethods)
}

// Cost sets how many credits a call of each method costs, for keys with credits: see
// keystore.Credits. Without Cost, a call costs one credit. 0 means that the methods are free. A
// negative cost, or a cost of more than 1<<53, is an error of New. With LimitMessages, each message
// that a stream receives costs as much as the opening of the stream. Give full names, or all
// methods of a service, as in "/package.Service/*"; a Cost for the method itself goes before a Cost
// for the service.
//
// The interceptor takes the credits after all other checks, just before the handler runs. A call
// that is refused costs nothing, and a call whose handler fails has cost its credits. A key that
// has too few credits gets ResourceExhausted, CREDITS_EXHAUSTED. Cost is no rule of access: a
// method may have a Cost and a rule.
func Cost(credits int64, fullMethods ...string) Option {
	return Option{func(c *config) error {
		if credits < 0 || credits > maxCost {
			return fmt.Errorf("Cost: %d credits: the cost must be from 0 to %d", credits,
				int64(maxCost))
		}
		for _, m := range fullMethods {
			name, _, err := ruleName(m)
			if err != nil {
				return fmt.Errorf("Cost: %w", err)
			}
			if _, ok := c.rules.costs[name]; ok {
				return fmt.Errorf("Cost: %q already has a cost: give each method one cost", m)
			}
			c.rules.costs[name] = credits
		}
		return nil
	}}
}

const maxCost = 1 << 53 // no key has more credits

// Optional lets callers with or without a key call the methods. Without a credential, FromContext
// returns false. With a valid key, FromContext returns the key, and a stream ends when its key is
// revoked. A call with a bad key is refused, and so is a call with an empty header. With
// RequireTLS, Optional methods need a secure connection, even for callers without a credential.
// Give full names, or all methods of a service, as in "/package.Service/*".
func Optional(fullMethods ...string) Option {
	return addRules("Optional", rule{optional: true}, fullMethods)
}

// addRules gives the same rule to each method.
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

// needsNoKey reports whether the rule accepts the call without a key.
func (a *Authenticator) needsNoKey(ctx context.Context, r rule) bool {
	switch c := &a.credentials; {
	case r.public:
		return true
	case r.optional:
		return (!c.requireTLS || secure(ctx)) && !c.present(ctx)
	default:
		return false
	}
}

// splitMethod splits "/pkg.Service/Method" into the service "/pkg.Service" and the method "Method".
func splitMethod(fullMethod string) (service, method string, ok bool) {
	i := strings.LastIndexByte(fullMethod, '/')
	if i < 2 || fullMethod[0] != '/' || i == len(fullMethod)-1 ||
		strings.Count(fullMethod, "/") != 2 {
		return "", "", false
	}
	return fullMethod[:i], fullMethod[i+1:], true
}
