package httpkeys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/scope"
)

// An Option is a setting for New. The zero Option has no effect. New returns an error for an Option
// that cannot be used, such as a nil function, a malformed pattern, or a second rule for a pattern.
type Option struct {
	apply func(*Authenticator) error
}

// Header accepts keys in the header name, after scheme and a space. If scheme is empty, the header
// holds the key alone, as in Header("X-Api-Key", ""). The default is
// Header("Authorization", "Bearer"); any Header option replaces the default. To accept several
// headers or schemes, give Header several times. Upper and lower case do not matter in the name or
// in the scheme (RFC 9110, sections 5.1 and 11.1).
func Header(name, scheme string) Option {
	return Option{func(a *Authenticator) error { return a.headers.Add(name, scheme) }}
}

// Public lets every caller send the requests that match the patterns. Callers need no key, and
// Public ignores a key that a caller sends. The patterns are those of [http.ServeMux], such as
// "GET /healthz". See the package comment on rules.
func Public(patterns ...string) Option { return addRules("Public", rule{public: true}, patterns) }

// Optional accepts requests with or without a key. Without a credential, FromContext returns false.
// With a valid key, FromContext returns the key, and the request ends with the key. A request with
// a bad key is refused, and so is a request with an empty header. With RequireTLS, requests without
// a credential need TLS too.
func Optional(patterns ...string) Option {
	return addRules("Optional", rule{optional: true}, patterns)
}

// AnyKey lets any valid key send the requests, even a key without scopes. AnyKey is useful with
// RequireRules; without RequireRules, a request without a rule takes any valid key.
func AnyKey(patterns ...string) Option { return addRules("AnyKey", rule{}, patterns) }

// Require lets a key send the requests that match the pattern only if the key has all the scopes.
// See keystore.Key.HasScope for wildcards in the scopes of keys. Give at least one scope. A scope
// is printable ASCII without spaces. New returns an error for a scope that no key can have.
func Require(pattern string, scopes ...string) Option {
	return requireScopes("Require", pattern, scopes, false)
}

// RequireAny lets a key send the requests that match the pattern only if the key has at least one
// of the scopes.
func RequireAny(pattern string, scopes ...string) Option {
	return requireScopes("RequireAny", pattern, scopes, true)
}

// RequireRules refuses every request without a rule, with 403, before the credential is read.
// Public, Optional, AnyKey, Require and RequireAny give rules to patterns. Without RequireRules, a
// request without a rule takes any valid key.
func RequireRules() Option {
	return Option{func(a *Authenticator) error {
		a.rules.other.missing = true
		return nil
	}}
}

// Cost sets how many credits a request costs, for keys with credits: see keystore.Credits. Without
// Cost, a request costs one credit. 0 means that the requests are free. A negative cost, or a cost
// of more than 1<<53, is an error of New. Cost is no rule of access: a request may have a Cost and
// a rule.
//
// The credits are taken after all other checks, just before the handler runs. So a request that is
// refused costs nothing, and a request whose handler fails has cost its credits. A key that has too
// few credits gets 429, CREDITS_EXHAUSTED.
func Cost(credits int64, patterns ...string) Option {
	return Option{func(a *Authenticator) error {
		if credits < 0 || credits > maxCost {
			return fmt.Errorf("Cost: %d credits: the cost must be from 0 to %d", credits,
				int64(maxCost))
		}
		for _, p := range patterns {
			if err := a.costs.add(p, rule{cost: credits}); err != nil {
				return fmt.Errorf("Cost: %w", err)
			}
		}
		return nil
	}}
}

// maxCost is the largest cost of a request, as in package interceptor.
const maxCost = 1 << 53 // no key has more credits

// addRules gives the same rule to each pattern.
func addRules(option string, r rule, patterns []string) Option {
	return Option{func(a *Authenticator) error {
		for _, p := range patterns {
			if err := a.rules.add(p, r); err != nil {
				return fmt.Errorf("%s: %w", option, err)
			}
		}
		return nil
	}}
}

// requireScopes is Require, or, with anyOf, RequireAny.
func requireScopes(option, pattern string, scopes []string, anyOf bool) Option {
	return Option{func(a *Authenticator) error {
		if len(scopes) == 0 {
			return fmt.Errorf("%s %q: name at least one scope", option, pattern)
		}
		for _, s := range scopes {
			if err := scope.Check(s); err != nil {
				return fmt.Errorf("%s %q: the scope %.200q %w", option, pattern, s, err)
			}
		}
		r := rule{scopes: slices.Clone(scopes), anyOf: anyOf}
		if err := a.rules.add(pattern, r); err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
		return nil
	}}
}

// RequireTLS refuses requests on connections without TLS, with 401, before the credential is read.
// After a proxy that ends TLS, every connection is without TLS: do not use RequireTLS there.
func RequireTLS() Option {
	return Option{func(a *Authenticator) error {
		a.requireTLS = true
		return nil
	}}
}

// TrustProxy lets a server behind reverse proxies see the addresses of the real callers. If a
// request comes from an address in proxies, the address of the caller is the last address in the
// header, such as "X-Forwarded-For", that is not an address of a proxy. From other addresses, the
// header is ignored. Every host in the networks can claim every address, so name the addresses of
// the proxies alone. TrustProxy of package interceptor has the same rules, and describes them.
func TrustProxy(header string, proxies ...netip.Prefix) Option {
	return Option{func(a *Authenticator) error { return a.proxies.TrustNetworks(header, proxies) }}
}

// TrustProxyTransport is TrustProxy for a proxy that connects over a transport without addresses,
// such as "unix". Every process that can connect over the transport can claim every address.
func TrustProxyTransport(header string, networks ...string) Option {
	return Option{func(a *Authenticator) error { return a.proxies.TrustTransports(header, networks) }}
}

// LimitFailures limits the failed requests from one address: burst times in a row, and perSecond
// times per second in the long run. After that, the server refuses every request from the address
// with 429, even a request with a valid key, and does not ask the store. A request fails if it is
// refused with 401. LimitFailures of package interceptor has the same rules, and describes them;
// each Authenticator counts separately.
func LimitFailures(perSecond float64, burst int) Option {
	return Option{func(a *Authenticator) error {
		var err error
		a.failures, err = admission.NewFailures(perSecond, burst)
		return err
	}}
}

// LogRefusals logs each refused request, and each request that ends with its key, to logger. The
// lines, their levels and their limits are those of LogRefusals of package interceptor, with the
// attribute request, such as "GET /orders/7", instead of method. A line never contains the
// credential or the query of the URL. If logger is nil, New returns an error.
//
// Without LogRefusals, two faults of the program are logged, to slog.Default: a Verifier that
// returns no key and no error, and a function of Observe that panics.
func LogRefusals(logger *slog.Logger) Option {
	return Option{func(a *Authenticator) error {
		if logger == nil {
			return errors.New(
				"LogRefusals: the logger is nil: give a logger, such as slog.Default()")
		}
		a.log.Logger = logger
		return nil
	}}
}

// A Call describes a request that was refused, or that ended with its key.
type Call struct {
	// Pattern is the pattern of the rule for the request, or empty if no rule names the request. So
	// Pattern may be the label of a metric.
	Pattern string
	// Ended is false if the request was refused before the handler ran. Ended is true if the
	// handler ran, and the key then ended the request.
	Ended bool
	// Refusal has the reason, the key if it is known, and the address of the caller.
	Refusal *Refusal
}

// Observe makes the Authenticator call f for each refused request, and for each request that ends
// with its key, to count the requests or to trace them. Every f is called if Observe is given
// several times. Accepted requests do not reach f: keystore.Stats counts these.
//
// The context is the context of the request. A request that has ended reaches f once, on any
// goroutine. f must be quick and safe for concurrent use, and must not change the Refusal. If f
// panics, the panic is logged: see LogRefusals. If f is nil, New returns an error.
func Observe(f func(context.Context, Call)) Option {
	return Option{func(a *Authenticator) error {
		if f == nil {
			return errors.New("Observe: the function is nil")
		}
		a.observers = append(a.observers, f)
		return nil
	}}
}

// WriteErrors lets w write the responses of refused requests, instead of WriteProblem. If
// WriteErrors is given several times, the last one counts. If w is nil, New returns an error.
func WriteErrors(w ErrorWriter) Option {
	return Option{func(a *Authenticator) error {
		if w == nil {
			return errors.New("WriteErrors: the function is nil")
		}
		a.write = w
		return nil
	}}
}
