package httpkeys

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

// A Refusal has the reason why a request was refused, or why it ended with its key. A Refusal wraps
// the error of the Verifier: errors.Is finds the errors of package keystore, and errors.As finds a
// *keystore.RateLimitError or a *keystore.CreditsError. A Refusal is meant for logs and for
// operators of the server. Do not show the text to callers. A Refusal never contains the
// credential.
type Refusal struct {
	// Reason is one word of a fixed set, and so may be the label of a metric. The words are those
	// of interceptor.Refusal, and "path": see the package comment on rules.
	Reason string
	// KeyID is the ID of the key. KeyID is empty unless the caller sent the whole key with its
	// secret. So a caller cannot blame the key of another caller.
	KeyID string
	// Addr is the address of the caller: the address that is compared with the AllowedNetworks of
	// keys. The zero Addr means that the address is not known.
	Addr netip.Addr
	// Proxy is the address of the trusted proxy that sent the request, or the name of its
	// transport: see TrustProxy. Empty means that no such proxy sent the request.
	Proxy string

	err error
}

// Error returns the text of the wrapped error and the address of the caller.
func (r *Refusal) Error() string {
	return fmt.Sprintf("%v: the request came from %s", r.err, admission.Origin(r.Addr, r.Proxy))
}

// Unwrap returns the error of the Verifier, or an unexported error of this package.
func (r *Refusal) Unwrap() error { return r.err }

// A Problem is what the caller of a refused request may know. All bad keys have the same Problem,
// so that a caller cannot find out which keys exist.
type Problem struct {
	// Status is the HTTP status: 400, 401, 403, 429, 499, 500, 503 or 504. See the package comment.
	Status int
	// Reason is a constant such as API_KEY_INVALID, for programs. Reason is empty if the caller has
	// cancelled the request, or if its deadline has passed.
	Reason string
	// Detail is a text for people.
	Detail string
	// Scopes are the scopes that the rule names, if the key lacks a scope.
	Scopes []string
	// RetryAfter is the time after which the request may succeed. It is zero, and has no meaning,
	// unless the Status is 429 or 503. If it is zero with the Reason CREDITS_EXHAUSTED, no refill
	// gives the key new credits.
	RetryAfter time.Duration
}

// An ErrorWriter writes the response of a refused request. The headers WWW-Authenticate,
// Retry-After and Cache-Control are set before, and the ErrorWriter may change them. The request is
// without the credential. The handler of the request is not called, whatever the ErrorWriter
// writes. A panic of the ErrorWriter goes to the http.Server, which closes the connection. An
// ErrorWriter must be safe for concurrent use, and must not let a caller distinguish one kind of
// bad key from another.
type ErrorWriter func(w http.ResponseWriter, r *http.Request, refusal *Refusal, problem Problem)

// WriteProblem is the default ErrorWriter. It writes the problem in the media type
// application/problem+json of RFC 9457, for example
//
//	{"title":"Unauthorized","status":401,"detail":"invalid API key","reason":"API_KEY_INVALID"}
//
// INSUFFICIENT_SCOPE has the member scopes too, with the scopes of the rule.
func WriteProblem(w http.ResponseWriter, _ *http.Request, _ *Refusal, p Problem) {
	title := http.StatusText(p.Status)
	if title == "" {
		title = "Client Closed Request" // 499, which nginx made known
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(p.Status)
	body := json.NewEncoder(w)
	body.SetEscapeHTML(false)
	_ = body.Encode(struct { // an error means that the caller is gone
		Title  string   `json:"title"`
		Status int      `json:"status"`
		Detail string   `json:"detail"`
		Reason string   `json:"reason,omitempty"`
		Scopes []string `json:"scopes,omitempty"`
	}{title, p.Status, p.Detail, p.Reason, p.Scopes})
}

// statusOf has the HTTP status for each kind of refusal.
var statusOf = [admission.NumKinds]int{
	admission.Unavailable: http.StatusServiceUnavailable,
	admission.Missing:     http.StatusUnauthorized,
	admission.Several:     http.StatusUnauthorized,
	admission.NoScheme:    http.StatusUnauthorized,
	admission.WrongScheme: http.StatusUnauthorized,
	admission.Insecure:    http.StatusUnauthorized,
	admission.NoRule:      http.StatusForbidden,
	admission.Twice:       http.StatusInternalServerError,
	admission.Path:        http.StatusBadRequest,
	admission.Scope:       http.StatusForbidden,
	admission.Invalid:     http.StatusUnauthorized,
	admission.RateLimited: http.StatusTooManyRequests,
	admission.Exhausted:   http.StatusTooManyRequests,
	admission.Throttled:   http.StatusTooManyRequests,
	admission.Changed:     http.StatusServiceUnavailable,
	admission.Revoked:     http.StatusUnauthorized,
	admission.Expired:     http.StatusUnauthorized,
}

// statusClientClosedRequest means that the caller has cancelled the request. The status
// appears only in access logs.
const statusClientClosedRequest = 499

// problem returns what the caller may know of a refusal. The argument kind is the kind of err, or,
// for a session that has ended, the kind of the end.
func (a *Authenticator) problem(
	ctx context.Context, kind admission.Kind, err error,
) Problem {
	p := Problem{Status: statusOf[kind], Reason: kind.Reason(), Detail: kind.Text(),
		RetryAfter: admission.RetryAfter(err)}
	send := ": send it in a header, " + a.headers.SendHint()
	switch kind {
	case admission.Missing:
		p.Detail = "the request has no API key" + send
	case admission.NoScheme, admission.WrongScheme:
		p.Detail += send
	case admission.Several:
		p.Detail = "the request carries several credentials: send one"
	case admission.NoRule:
		p.Detail = "this path has no rule, and the server refuses paths without a rule"
	case admission.Twice:
		p.Detail = "the request passed two Authenticators: wrap a handler once"
	case admission.Changed:
		p.Detail = "the API key was changed: send the request again"
	case admission.Scope:
		var scope *admission.ScopeError
		errors.As(err, &scope)
		p.Scopes = scope.Scopes
		p.Detail = "the API key lacks a scope that this request needs: " +
			strings.Join(scope.Scopes, ", ")
	case admission.Unavailable:
		switch ended := ctx.Err(); {
		case errors.Is(ended, context.DeadlineExceeded):
			return Problem{Status: http.StatusGatewayTimeout, Detail: "the request took too long"}
		case ended != nil:
			return Problem{Status: statusClientClosedRequest, Detail: "the request was cancelled"}
		}
		p.RetryAfter = time.Second/2 + rand.N(time.Second) // not all at the same moment
	}
	return p
}

// refuse reports a refused request, and writes the response.
func (c *call) refuse(w http.ResponseWriter, err error) {
	kind := admission.KindOf(err)
	refusal := c.refusal(err)
	p := c.auth.problem(c.ctx, kind, err)
	c.report(requestRefused, refusal, p.Status)
	c.writeProblem(w, refusal, p)
}

// writeProblem writes the response of a request that was refused or that has ended.
func (c *call) writeProblem(w http.ResponseWriter, refusal *Refusal, p Problem) {
	h := w.Header()
	for _, name := range []string{"Content-Length", "Content-Encoding", "Etag", "Last-Modified"} {
		h.Del(name) // of the handler, or of a middleware that expected another response
	}
	h.Set("Cache-Control", "no-store")
	switch p.Status {
	case http.StatusUnauthorized, http.StatusForbidden:
		c.challenge(h, p)
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if p.RetryAfter > 0 || p.Reason != admission.Exhausted.Reason() {
			h.Set("Retry-After", retryAfter(p.RetryAfter))
		}
	}
	c.auth.write(w, c.request, refusal, p)
}

// retryAfter returns the value of the header Retry-After: whole seconds, rounded up.
func retryAfter(d time.Duration) string {
	return strconv.FormatInt(int64(math.Ceil(d.Seconds())), 10)
}

// challenge sets the header WWW-Authenticate (RFC 9110, section 11.6.1, and RFC 6750, section 3).
// There is no registered scheme for a key alone in a header: ApiKey is what others use.
func (c *call) challenge(h http.Header, p Problem) {
	parameters := ""
	switch {
	case p.Reason == admission.Scope.Reason():
		parameters = fmt.Sprintf(` error="insufficient_scope", scope="%s"`,
			strings.Join(p.Scopes, " "))
	case p.Status == http.StatusForbidden:
		return
	case p.Reason == admission.Invalid.Reason(), p.Reason == admission.Revoked.Reason(),
		p.Reason == admission.Expired.Reason():
		parameters = ` error="invalid_token"`
	}
	h.Del("WWW-Authenticate")
	for i := range c.auth.headers {
		for _, scheme := range c.auth.headers[i].Schemes {
			if scheme == "" {
				scheme = `ApiKey header="` + c.auth.headers[i].Name + `"`
				if parameters != "" {
					scheme += ","
				}
			}
			h.Add("WWW-Authenticate", scheme+parameters)
		}
	}
}

func (c *call) refusal(err error) *Refusal {
	return &Refusal{
		Reason: admission.ReasonOf(err), KeyID: c.keyID, Addr: c.addr, Proxy: c.proxy, err: err,
	}
}

const (
	requestRefused = "HTTP request refused"
	requestEnded   = "HTTP request ended with its API key"
)

// report logs a request that was refused, or that ended with its key, and notifies the observers.
func (c *call) report(message string, r *Refusal, status int) {
	a := c.auth
	where := slog.String("request", admission.Printable(c.method+" "+c.path))
	ctx := context.Context(c.ctx)
	a.log.Refusal(ctx, admission.Line{
		Message: message, Where: where, Reason: r.Reason, KeyID: r.KeyID, Addr: r.Addr,
		Proxy: r.Proxy, Err: r.err, Fault: status >= http.StatusInternalServerError,
	})
	for _, f := range a.observers {
		func() {
			defer a.log.Recovered(ctx, "function of Observe panicked", r.Reason, where)
			f(ctx, Call{Pattern: c.pattern, Ended: message == requestEnded, Refusal: r})
		}()
	}
}
