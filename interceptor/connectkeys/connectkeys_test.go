package connectkeys_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/connectkeys"
	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A message is what all methods of the tests send and receive.
type message = wrapperspb.BytesValue

const (
	unaryMethod  = "/test.v1.Test/Unary"
	serverMethod = "/test.v1.Test/Server"
	duplexMethod = "/test.v1.Test/Duplex"
)

var protocols = map[string][]connect.ClientOption{
	"Connect":  nil,
	"gRPC":     {connect.WithGRPC()},
	"gRPC-Web": {connect.WithGRPCWeb()},
}

func issue(t testing.TB, s *keystore.Store, spec keystore.Spec) (*keystore.Key, string) {
	t.Helper()
	spec.Name = "test"
	issued := keystoretest.MustCreate(t, s, spec)
	return issued.Key, issued.Secret.Reveal()
}

func newAuth(t testing.TB, v httpkeys.Verifier, opts ...httpkeys.Option) *connectkeys.Authenticator {
	t.Helper()
	a, err := connectkeys.New(v, opts...)
	require.NoError(t, err)
	return a
}

// A service has methods that a test defines.
type service struct {
	unary  func(ctx context.Context) error
	server func(ctx context.Context, stream *connect.ServerStream[message]) error
	duplex func(ctx context.Context, stream *connect.BidiStream[message, message]) error
}

func (s service) mux(opts ...connect.HandlerOption) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle(unaryMethod, connect.NewUnaryHandler(unaryMethod,
		func(ctx context.Context, r *connect.Request[message]) (*connect.Response[message], error) {
			if s.unary != nil {
				if err := s.unary(ctx); err != nil {
					return nil, err
				}
			}
			return connect.NewResponse(r.Msg), nil
		}, opts...))
	mux.Handle(serverMethod, connect.NewServerStreamHandler(serverMethod,
		func(
			ctx context.Context, _ *connect.Request[message], stream *connect.ServerStream[message],
		) error {
			return s.server(ctx, stream)
		}, opts...))
	mux.Handle(duplexMethod, connect.NewBidiStreamHandler(duplexMethod, s.duplex, opts...))
	return mux
}

// serve runs a server with HTTP/2 over TLS. The windows for streams are small, so that a Send soon
// blocks if the client does not read.
func serve(t testing.TB, h http.Handler) (url string, client *http.Client) {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.EnableHTTP2 = true
	server.StartTLS()
	t.Cleanup(server.Close)
	client = server.Client()
	client.Transport.(*http.Transport).HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 1 << 16}
	return server.URL, client
}

func newClient(
	client *http.Client, url, method string, opts ...connect.ClientOption,
) *connect.Client[message, message] {
	return connect.NewClient[message, message](client, url+method, opts...)
}

func requireRefused(t testing.TB, err error, code connect.Code, reason string) {
	t.Helper()
	if !assertRefused(t, err, code, reason) {
		t.FailNow()
	}
}

// assertRefused is requireRefused for a handler, which must not call FailNow.
func assertRefused(t testing.TB, err error, code connect.Code, reason string) bool {
	t.Helper()
	var failed *connect.Error
	if !assert.ErrorAs(t, err, &failed) {
		return false
	}
	var reasons []string
	for _, d := range failed.Details() {
		value, err := d.Value()
		if !assert.NoError(t, err) {
			return false
		}
		if info, ok := value.(*errdetails.ErrorInfo); ok {
			reasons = append(reasons, info.Reason)
			assert.Equal(t, "github.com/grpc-api-key/grpc-api-key", info.Domain)
		}
	}
	return assert.Equal(t, code, connect.CodeOf(err), "%v", err) &&
		assert.Equal(t, []string{reason}, reasons)
}

// Each protocol has the codes and the reasons of gRPC, for unary calls and for streams.
func TestRefusals(t *testing.T) {
	store := keystoretest.New(t, nil)
	key, token := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store, httpkeys.Require(serverMethod, "orders:read"))
	svc := service{
		unary: func(ctx context.Context) error {
			k, _ := httpkeys.FromContext(ctx)
			also, _ := interceptor.FromContext(ctx)
			assert.Equal(t, key.ID, k.ID)
			assert.Equal(t, k, also)
			return nil
		},
		duplex: func(_ context.Context, stream *connect.BidiStream[message, message]) error {
			assert.Empty(t, stream.RequestHeader().Get("Authorization"))
			m, err := stream.Receive()
			if err != nil {
				return err
			}
			return stream.Send(m)
		},
	}
	url, client := serve(t, auth.Wrap(svc.mux(connect.WithInterceptors(auth.Interceptor()))))
	for name, opts := range protocols {
		t.Run(name, func(t *testing.T) {
			call := func(method, token string) error {
				c := newClient(client, url, method, opts...)
				switch method {
				case unaryMethod:
					r := connect.NewRequest(wrapperspb.Bytes([]byte("hello")))
					r.Header().Set("Authorization", "Bearer "+token)
					response, err := c.CallUnary(t.Context(), r)
					if err == nil {
						require.Equal(t, "hello", string(response.Msg.Value))
					}
					return err
				case serverMethod:
					r := connect.NewRequest(wrapperspb.Bytes(nil))
					r.Header().Set("Authorization", "Bearer "+token)
					stream, err := c.CallServerStream(t.Context(), r)
					require.NoError(t, err)
					defer stream.Close()
					require.False(t, stream.Receive())
					return stream.Err()
				default:
					stream := c.CallBidiStream(t.Context())
					defer stream.CloseResponse()
					stream.RequestHeader().Set("Authorization", "Bearer "+token)
					_ = stream.Send(wrapperspb.Bytes([]byte("hello"))) // Receive has the error
					require.NoError(t, stream.CloseRequest())
					m, err := stream.Receive()
					if err == nil {
						require.Equal(t, "hello", string(m.Value))
					}
					return err
				}
			}
			require.NoError(t, call(unaryMethod, token))
			require.NoError(t, call(duplexMethod, token))
			for _, method := range []string{unaryMethod, serverMethod, duplexMethod} {
				requireRefused(t, call(method, ""), connect.CodeUnauthenticated, "CREDENTIALS_MISSING")
				requireRefused(t, call(method, "junk"), connect.CodeUnauthenticated, "API_KEY_INVALID")
			}
			requireRefused(t, call(serverMethod, token), connect.CodePermissionDenied,
				"INSUFFICIENT_SCOPE")
		})
	}

	// A request that is not a call gets the problem of httpkeys.
	response, err := client.Get(url + "/healthz")
	require.NoError(t, err)
	defer response.Body.Close()
	require.Equal(t, http.StatusUnauthorized, response.StatusCode)
	require.Equal(t, "application/problem+json", response.Header.Get("Content-Type"))

	// A refusal reads nothing of the request.
	body := &counting{Reader: strings.NewReader(strings.Repeat("x", 1<<20))}
	recorder := httptest.NewRecorder()
	r := httptest.NewRequest("POST", unaryMethod, body)
	r.Header.Set("Content-Type", "application/proto")
	auth.Wrap(svc.mux()).ServeHTTP(recorder, r)
	require.Equal(t, http.StatusUnauthorized, recorder.Code)
	require.Zero(t, body.read)
}

type counting struct {
	io.Reader
	read int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	c.read += n
	return n, err
}

// The interceptor without the middleware lets no call through.
func TestInterceptorWithoutWrap(t *testing.T) {
	auth := newAuth(t, keystoretest.New(t, nil))
	fail := func() error { t.Error("the handler ran"); return nil }
	svc := service{
		unary:  func(context.Context) error { return fail() },
		duplex: func(context.Context, *connect.BidiStream[message, message]) error { return fail() },
	}
	url, client := serve(t, svc.mux(connect.WithInterceptors(auth.Interceptor())))
	_, err := newClient(client, url, unaryMethod).CallUnary(t.Context(),
		connect.NewRequest(wrapperspb.Bytes(nil)))
	require.Equal(t, connect.CodeInternal, connect.CodeOf(err))
	require.ErrorContains(t, err, "serve Wrap of the Authenticator")
	stream := newClient(client, url, duplexMethod).CallBidiStream(t.Context())
	require.NoError(t, stream.CloseRequest())
	_, err = stream.Receive()
	require.Equal(t, connect.CodeInternal, connect.CodeOf(err))
	require.NoError(t, stream.CloseResponse())
}

// The handler returns wherever it waits, and the client gets the true status, whatever the handler
// returns.
func TestRevokeUnblocksTheHandler(t *testing.T) {
	type stream = connect.BidiStream[message, message]
	waits := map[string]func(ctx context.Context, s *stream, ready chan<- struct{}) error{
		"for its context": func(ctx context.Context, _ *stream, ready chan<- struct{}) error {
			close(ready)
			<-ctx.Done()
			return nil // not the truth
		},
		"in Receive": func(_ context.Context, s *stream, ready chan<- struct{}) error {
			_, err := s.Receive()
			assert.NoError(t, err)
			close(ready)
			_, err = s.Receive()
			assertRefused(t, err, connect.CodeUnauthenticated, "API_KEY_REVOKED")
			return io.ErrUnexpectedEOF
		},
		"in Receive, after a Send": func(_ context.Context, s *stream, ready chan<- struct{}) error {
			assert.NoError(t, s.Send(wrapperspb.Bytes([]byte("hello"))))
			close(ready)
			for {
				if _, err := s.Receive(); err != nil {
					return connect.NewError(connect.CodeAborted, err)
				}
			}
		},
		"in Send": func(_ context.Context, s *stream, ready chan<- struct{}) error {
			blocked := time.AfterFunc(time.Second/10, func() { close(ready) })
			for page := bytes.Repeat([]byte("x"), 1<<15); ; {
				err := s.Send(wrapperspb.Bytes(page))
				if blocked.Stop() {
					blocked.Reset(time.Second / 10) // until a Send takes longer
				}
				if err != nil {
					assertRefused(t, err, connect.CodeUnauthenticated, "API_KEY_REVOKED")
					return err
				}
			}
		},
	}
	for name, opts := range protocols {
		for waitsFor, wait := range waits {
			t.Run(name+", "+waitsFor, func(t *testing.T) {
				store := keystoretest.New(t, nil)
				key, token := issue(t, store, keystore.Spec{})
				auth := newAuth(t, store)
				ready, returned := make(chan struct{}), make(chan struct{})
				svc := service{duplex: func(ctx context.Context, s *stream) error {
					defer close(returned)
					return wait(ctx, s, ready)
				}}
				url, client := serve(t, auth.Wrap(svc.mux(
					connect.WithInterceptors(auth.Interceptor()))))
				s := newClient(client, url, duplexMethod, opts...).CallBidiStream(t.Context())
				defer s.CloseResponse()
				s.RequestHeader().Set("Authorization", "Bearer "+token)
				require.NoError(t, s.Send(wrapperspb.Bytes([]byte("hello"))))
				<-ready
				require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
				<-returned
				var err error
				for err == nil {
					_, err = s.Receive()
				}
				if waitsFor == "in Send" {
					require.NotErrorIs(t, err, io.EOF)
					return // the stream was reset: the client did not read
				}
				requireRefused(t, err, connect.CodeUnauthenticated, "API_KEY_REVOKED")
			})
		}
	}
}

// A unary call ends with its key, and gets the status of a stream.
func TestRevokeEndsAUnaryCall(t *testing.T) {
	for name, opts := range protocols {
		t.Run(name, func(t *testing.T) {
			store := keystoretest.New(t, nil)
			key, token := issue(t, store, keystore.Spec{})
			auth := newAuth(t, store)
			svc := service{unary: func(ctx context.Context) error {
				if err := store.Revoke(t.Context(), key.ID, ""); err != nil {
					return err
				}
				<-ctx.Done()
				return nil
			}}
			url, client := serve(t, auth.Wrap(svc.mux(
				connect.WithInterceptors(auth.Interceptor()))))
			r := connect.NewRequest(wrapperspb.Bytes([]byte("hello")))
			r.Header().Set("Authorization", "Bearer "+token)
			_, err := newClient(client, url, unaryMethod, opts...).CallUnary(t.Context(), r)
			requireRefused(t, err, connect.CodeUnauthenticated, "API_KEY_REVOKED")
		})
	}
}

// A header or a trailer may be the result of a stream. So none that the handler has set goes to the
// client with the status of the end, unless the header was sent before.
func TestMetadataAfterRevoke(t *testing.T) {
	type stream = connect.BidiStream[message, message]
	for name, opts := range protocols {
		for _, begun := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, begun: %v", name, begun), func(t *testing.T) {
				store := keystoretest.New(t, nil)
				key, token := issue(t, store, keystore.Spec{})
				auth := newAuth(t, store)
				svc := service{duplex: func(ctx context.Context, s *stream) error {
					if begun {
						s.ResponseHeader().Set("X-Early", "sent")
						assert.NoError(t, s.Send(wrapperspb.Bytes([]byte("hello"))))
					}
					assert.NoError(t, store.Revoke(t.Context(), key.ID, ""))
					s.ResponseHeader().Set("X-Result", "result")
					s.ResponseTrailer().Set("X-Result", "result")
					return nil
				}}
				url, client := serve(t, auth.Wrap(svc.mux(
					connect.WithInterceptors(auth.Interceptor()))))
				s := newClient(client, url, duplexMethod, opts...).CallBidiStream(t.Context())
				defer s.CloseResponse()
				s.RequestHeader().Set("Authorization", "Bearer "+token)
				_ = s.Send(wrapperspb.Bytes([]byte("hello"))) // the stream may have ended
				var err error
				for err == nil {
					_, err = s.Receive()
				}
				requireRefused(t, err, connect.CodeUnauthenticated, "API_KEY_REVOKED")
				var failed *connect.Error
				require.ErrorAs(t, err, &failed)
				for _, h := range []http.Header{
					s.ResponseHeader(), s.ResponseTrailer(), failed.Meta(),
				} {
					require.Empty(t, h.Values("X-Result"))
				}
				if begun {
					require.Equal(t, "sent", s.ResponseHeader().Get("X-Early"))
				}
			})
		}
	}
}
