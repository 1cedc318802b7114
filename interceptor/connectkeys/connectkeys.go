// Package connectkeys protects Connect handlers with API keys: those of connectrpc.com/connect,
// which speak the protocols Connect, gRPC and gRPC-Web.
//
//	auth, err := connectkeys.New(store)
//	mux := http.NewServeMux()
//	mux.Handle(ordersv1connect.NewOrdersHandler(service,
//		connect.WithInterceptors(auth.Interceptor())))
//	http.ListenAndServe("localhost:8080", auth.Wrap(mux))
//
// A server needs both parts. [Authenticator.Wrap] is a middleware of net/http, and checks the key
// before Connect reads or decompresses anything. [Authenticator.Interceptor] must be the first
// interceptor of each handler: it lets the client of a stream that ended with its key get the true
// status, whatever the handler returns. Without Wrap, the interceptor refuses every call with
// CodeInternal. Without the interceptor, a stream ends with its key too, but the client gets a
// broken connection instead of a status.
//
// The options, the rules and the reasons are those of package
// [github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys]. A rule for a method is a rule for
// its path, as in httpkeys.Require("/acme.orders.v1.Orders/Get", "orders:read"), and a rule for a
// service is a rule for a tree, as in httpkeys.Public("/grpc.health.v1.Health/"). A method
// whose rule is misspelt takes any valid key, unless httpkeys.RequireRules is set. Generated code
// has a constant for the path of each method, such as OrdersGetProcedure.
//
// A refused caller gets the code, the ErrorInfo and the RetryInfo of package
// [github.com/grpc-api-key/grpc-api-key/interceptor], in the protocol of the call. Requests that no
// Connect client sends get the problem of httpkeys.
//
// Handlers find the key with httpkeys.FromContext or with interceptor.FromContext.
//
// # Streams
//
// After Revoke has returned, Receive delivers no message to the handler, Send accepts none, and the
// context of the handler is cancelled. A Receive that is blocked returns within milliseconds, and
// the client gets CodeUnauthenticated with the reason API_KEY_REVOKED. A Send that is blocked,
// because the client or the connection is too slow, returns after 200 ms; then the stream is reset,
// and the client gets CodeInternal, because a client that does not read would not read a status. A
// status that is not delivered within 5 s resets the stream too. A unary call ends in the same way.
// The status comes without the trailers of the handler, and without headers that were not sent
// before.
//
// A handler that ignores its context, Receive and Send does not end.
//
// # Clients
//
// Give the http.Client of a Connect client an httpkeys.Transport. An interceptor of Connect cannot
// see whether the key would go over https, or to another host after a redirect.
package connectkeys

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

// An Authenticator checks the API keys of Connect calls. Call New to get an Authenticator. An
// Authenticator is immutable and safe for concurrent use.
type Authenticator struct {
	http   *httpkeys.Authenticator
	errors *connect.ErrorWriter
}

// New returns an Authenticator that verifies tokens with v: for most servers, a *keystore.Store.
// The options and the errors are those of httpkeys.New. The option httpkeys.WriteErrors replaces
// the responses in the protocols of Connect.
func New(v httpkeys.Verifier, opts ...httpkeys.Option) (*Authenticator, error) {
	a := &Authenticator{errors: connect.NewErrorWriter()}
	var err error
	opts = append([]httpkeys.Option{httpkeys.WriteErrors(a.writeError)}, opts...)
	if a.http, err = httpkeys.New(v, opts...); err != nil {
		return nil, err
	}
	return a, nil
}

// Wrap returns a handler that checks the key of each request, and then calls next. If next is nil,
// the handler calls http.DefaultServeMux.
func (a *Authenticator) Wrap(next http.Handler) http.Handler { return a.http.Wrap(next) }

// writeError is the httpkeys.ErrorWriter.
func (a *Authenticator) writeError(
	w http.ResponseWriter, r *http.Request, refusal *httpkeys.Refusal, p httpkeys.Problem,
) {
	// To the ErrorWriter of Connect, every GET is a call.
	plain := r.Method == http.MethodGet && !r.URL.Query().Has("encoding")
	if plain || !a.errors.IsSupported(r) {
		httpkeys.WriteProblem(w, r, refusal, p)
		return
	}
	_ = a.errors.Write(w, r, newError(p)) // an error means that the caller is gone
}

// domain is the domain of every ErrorInfo.
const domain = "github.com/grpc-api-key/grpc-api-key"

// newError returns the error of Connect for a problem.
func newError(p httpkeys.Problem) *connect.Error {
	failed := connect.NewError(codeOf(p.Status), errors.New(p.Detail))
	add := func(m proto.Message) {
		if detail, err := connect.NewErrorDetail(m); err == nil {
			failed.AddDetail(detail)
		}
	}
	if p.Reason != "" {
		info := &errdetails.ErrorInfo{Reason: p.Reason, Domain: domain}
		if len(p.Scopes) > 0 {
			info.Metadata = map[string]string{"scopes": strings.Join(p.Scopes, " ")}
		}
		add(info)
	}
	switch p.Status {
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		if p.RetryAfter > 0 || p.Reason != admission.Exhausted.Reason() {
			add(&errdetails.RetryInfo{RetryDelay: durationpb.New(p.RetryAfter)})
		}
	}
	return failed
}

// codeOf returns the code for the status of a problem.
func codeOf(status int) connect.Code {
	switch status {
	case http.StatusBadRequest:
		return connect.CodeInvalidArgument
	case http.StatusUnauthorized:
		return connect.CodeUnauthenticated
	case http.StatusForbidden:
		return connect.CodePermissionDenied
	case http.StatusTooManyRequests:
		return connect.CodeResourceExhausted
	case http.StatusServiceUnavailable:
		return connect.CodeUnavailable
	case http.StatusGatewayTimeout:
		return connect.CodeDeadlineExceeded
	case http.StatusInternalServerError:
		return connect.CodeInternal
	default:
		return connect.CodeCanceled // 499
	}
}

// Interceptor returns the interceptor for handlers. Give it to each handler, before every other
// interceptor. In a client, the interceptor does nothing.
func (a *Authenticator) Interceptor() connect.Interceptor { return interceptor{} }

// An interceptor returns the true error of a call that ended with its key.
type interceptor struct{}

// A call is the request of httpkeys to which a call of Connect belongs.
type call interface {
	HandOver()
	Ended() (httpkeys.Problem, bool)
	Farewell()
}

// callOf returns the request of httpkeys, or an error if the middleware is missing.
func callOf(ctx context.Context) (call, error) {
	if c, ok := ctx.Value(admission.SeenContext{}).(call); ok {
		return c, nil
	}
	return nil, connect.NewError(connect.CodeInternal, errors.New("connectkeys: the interceptor "+
		"runs without the middleware, so no key was checked: serve Wrap of the Authenticator"))
}

func (interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, request connect.AnyRequest) (connect.AnyResponse, error) {
		if request.Spec().IsClient {
			return next(ctx, request)
		}
		c, err := callOf(ctx)
		if err != nil {
			return nil, err
		}
		response, err := next(ctx, request)
		if p, ended := c.Ended(); ended {
			return nil, newError(p)
		}
		return response, err
	}
}

func (interceptor) WrapStreamingClient(
	next connect.StreamingClientFunc,
) connect.StreamingClientFunc {
	return next
}

func (interceptor) WrapStreamingHandler(
	next connect.StreamingHandlerFunc,
) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		c, err := callOf(ctx)
		if err != nil {
			return err
		}
		c.HandOver()
		header := maps.Clone(conn.ResponseHeader())
		err = next(ctx, &stream{conn, c})
		if p, ended := c.Ended(); ended {
			// What the handler has set may be the result of the stream.
			clear(conn.ResponseTrailer())
			clear(conn.ResponseHeader())
			maps.Copy(conn.ResponseHeader(), header)
			c.Farewell()
			return newError(p)
		}
		return err
	}
}

// A stream ends with its key. Receive and Send check the key at their start, and again before they
// return. So a call that begins after Revoke has returned transfers no message, and a call that was
// blocked during Revoke does not report success.
type stream struct {
	connect.StreamingHandlerConn
	call call
}

func (s *stream) ended() error {
	if p, ended := s.call.Ended(); ended {
		return newError(p)
	}
	return nil
}

func (s *stream) Receive(m any) error {
	if err := s.ended(); err != nil {
		return err
	}
	err := s.StreamingHandlerConn.Receive(m)
	if ended := s.ended(); ended != nil {
		return ended
	}
	return err
}

func (s *stream) Send(m any) error {
	if err := s.ended(); err != nil {
		return err
	}
	err := s.StreamingHandlerConn.Send(m)
	if ended := s.ended(); ended != nil {
		return ended
	}
	return err
}
