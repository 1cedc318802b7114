package httpkeys

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"reflect"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
	"github.com/grpc-api-key/grpc-api-key/internal/credit"
	"github.com/grpc-api-key/grpc-api-key/internal/failures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A Verifier accepts or denies tokens. The usual Verifier is a *keystore.Store; every Verifier of
// package interceptor is one too. Bind must be safe for concurrent use. If the error is nil, the
// session must have a key and a context; otherwise the request is refused with 503, and the fault
// is logged. The text of an error must not contain the token.
type Verifier interface {
	// Bind opens a session for the token. The Authenticator closes the session. The errors, and the
	// causes of the end of a session, are those of Bind in interceptor.Verifier.
	Bind(ctx context.Context, token string) (*keystore.Session, error)
}

// An Authenticator checks the API keys of HTTP requests. Call New to get an Authenticator, and Wrap
// to protect a handler. An Authenticator is immutable and safe for concurrent use.
type Authenticator struct {
	verifier   Verifier
	headers    admission.Headers
	requireTLS bool
	rules      ruleSet
	costs      ruleSet // the field cost of the rules is in use
	proxies    admission.Proxies
	failures   *failures.Limit // nil: failures are not limited
	write      ErrorWriter
	log        admission.Log
	observers  []func(context.Context, Call)
	hooks      hooks
}

// hooks are for tests.
type hooks struct {
	beforeCut      func() // runs when cut begins
	forgetReturned bool   // a wrong variant: cut sets a deadline after the handler has returned
}

// New returns an Authenticator that verifies tokens with v. For most servers, v is a
// *keystore.Store and no option is needed. An error names the wrong option and the reason. New
// returns an error if v is nil, or if v contains a nil pointer such as (*keystore.Store)(nil).
func New(v Verifier, opts ...Option) (*Authenticator, error) {
	if r := reflect.ValueOf(v); !r.IsValid() || r.Kind() == reflect.Pointer && r.IsNil() {
		return nil, fmt.Errorf("httpkeys: New: the verifier is nil (type %T)", v)
	}
	a := &Authenticator{verifier: v, write: WriteProblem, rules: newRuleSet(), costs: newRuleSet()}
	a.costs.other.cost = 1
	for _, o := range opts {
		if o.apply == nil {
			continue // the zero Option
		}
		if err := o.apply(a); err != nil {
			return nil, fmt.Errorf("httpkeys: %w", err)
		}
	}
	if err := a.headers.SetDefault(&a.proxies); err != nil {
		return nil, fmt.Errorf("httpkeys: %w", err)
	}
	return a, nil
}

// Wrap returns a handler that checks the key of each request, and then calls next. If next is nil,
// the handler calls [http.DefaultServeMux].
func (a *Authenticator) Wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler := next
		if handler == nil {
			handler = http.DefaultServeMux
		}
		a.serve(w, r, handler)
	})
}

func (a *Authenticator) serve(w http.ResponseWriter, r *http.Request, next http.Handler) {
	rule, err := a.rules.find(r)
	c := &call{auth: a, pattern: rule.pattern, method: r.Method, path: r.URL.Path}
	c.ctx = &requestContext{Context: r.Context(), call: c}
	c.addr, c.proxy = a.client(r)
	switch {
	case err != nil:
	case a.needsNoKey(r, rule):
		c.request = a.strip(c.ctx, r)
		defer c.giveBack(r)
		next.ServeHTTP(w, c.request)
		return
	default:
		c.session, err = a.bind(c, r, rule)
	}
	if err != nil {
		c.request = a.strip(c.ctx, r)
		c.refuse(w, err)
		return
	}
	c.request = a.strip(c.session.Context(), r)
	c.serve(w, r, next)
}

// needsNoKey reports whether the rule accepts the request without a key.
func (a *Authenticator) needsNoKey(r *http.Request, rule *rule) bool {
	switch {
	case rule.public:
		return true
	case rule.optional:
		return (!a.requireTLS || r.TLS != nil) && !a.present(r)
	default:
		return false
	}
}

// present reports whether the request has an accepted header, even an empty one.
func (a *Authenticator) present(r *http.Request) bool {
	for i := range a.headers {
		if len(r.Header.Values(a.headers[i].Name)) > 0 {
			return true
		}
	}
	return false
}

// bind verifies the credential of a request and opens a session. The caller must close the session
// when the handler has returned.
func (a *Authenticator) bind(c *call, r *http.Request, rule *rule) (*keystore.Session, error) {
	text, err := a.credential(c, r, rule)
	if err != nil {
		return nil, err
	}
	session, err := a.verifier.Bind(c.ctx, text)
	if err == nil && (session == nil || session.Key() == nil || session.Context() == nil) {
		err = admission.ErrNoKey
		if session != nil {
			session.Close()
		}
	}
	if err != nil {
		c.keyID = admission.ProvenKeyID(a.verifier, text, err)
		return nil, a.countFailure(c, err)
	}
	c.key = session.Key()
	c.keyID = c.key.ID
	err = admission.CheckScopes(c.key, rule.scopes, rule.anyOf)
	if err == nil {
		err = a.spend(c, r, session)
	}
	if err != nil {
		session.Close()
		return nil, err
	}
	return session, nil
}

// spend takes the cost of a request from the credits of the key.
func (a *Authenticator) spend(c *call, r *http.Request, session *keystore.Session) error {
	cost, err := a.costs.find(r)
	if err != nil {
		return err
	}
	return session.Spend(c.ctx, cost.cost)
}

// credential returns the credential of a request. It returns an error if the request requires a
// rule and has none, or if too many requests from the same address have failed.
func (a *Authenticator) credential(c *call, r *http.Request, rule *rule) (string, error) {
	if rule.missing {
		return "", admission.ErrNoRule
	}
	if err := admission.CheckFailures(a.failures, c.addr); err != nil {
		return "", err
	}
	if a.requireTLS && r.TLS == nil {
		return "", a.countFailure(c, admission.ErrInsecure)
	}
	text, err := a.headers.Credential(r.Header.Values)
	if errors.Is(err, admission.ErrMissing) && r.Context().Value(admission.SeenContext{}) != nil {
		err = admission.ErrTwice
	}
	if err != nil {
		return "", a.countFailure(c, err)
	}
	return text, nil
}

// countFailure returns err. If the caller is to blame for err, countFailure first counts a failure
// for the address of the caller.
func (a *Authenticator) countFailure(c *call, err error) error {
	if a.failures != nil && statusOf[admission.KindOf(err)] == http.StatusUnauthorized {
		a.failures.Add(c.addr)
	}
	return err
}

// strip returns a copy of the request, with the context, and without the headers that may hold a
// credential.
func (a *Authenticator) strip(ctx context.Context, r *http.Request) *http.Request {
	r = r.WithContext(ctx)
	r.Header = maps.Clone(r.Header)
	for name := range r.Header {
		if a.headers.Has(name) {
			delete(r.Header, name)
		}
	}
	return r
}

// client returns the address of the caller, or the zero Addr if the address is not known, and the
// name of the proxy that sent the request.
func (a *Authenticator) client(r *http.Request) (addr netip.Addr, proxy string) {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	addr, through := a.proxies.Client(remoteAddr(r.RemoteAddr), local, r.Header.Values)
	return addr, through.String()
}

// A remoteAddr is the RemoteAddr of a request.
type remoteAddr string

func (remoteAddr) Network() string  { return "tcp" }
func (a remoteAddr) String() string { return string(a) }

// A requestContext is the parent of the context of a handler. It has the key of the caller, and the
// address of the caller for the Verifier.
type requestContext struct {
	context.Context
	call *call
}

func (c *requestContext) Value(key any) any {
	switch key {
	case admission.KeyContext{}:
		if c.call.key != nil {
			return c.call.key
		}
	case admission.SeenContext{}:
		return c.call
	case clientaddr.Key{}:
		return c.call.addr
	case credit.Key{}:
		if c.call.key == nil {
			return int64(0) // Bind takes no credits: spend does, after all checks
		}
	}
	return c.Context.Value(key)
}

// String prevents fmt from printing the parent contexts.
func (c *requestContext) String() string { return "httpkeys.requestContext" }

// GoString is String for %#v.
func (c *requestContext) GoString() string { return c.String() }

// FromContext returns the key of the caller, in a handler under Wrap or under the interceptors of
// package interceptor. FromContext returns false if the rule is Public, and if the rule is Optional
// and the request has no credential. FromContext and interceptor.FromContext are the same.
func FromContext(ctx context.Context) (*keystore.Key, bool) {
	k, ok := ctx.Value(admission.KeyContext{}).(*keystore.Key)
	return k, ok && k != nil
}

// NewContext returns a context for which FromContext returns k. Use NewContext to test a handler
// without a server.
func NewContext(ctx context.Context, k *keystore.Key) context.Context {
	return context.WithValue(ctx, admission.KeyContext{}, k)
}
