package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

type duplexStream = testpb.TestService_FullDuplexCallServer

// handlers are the handlers that a revocation must end. They report the end by returning.
var handlers = map[string]func(s duplexStream) error{
	"blocked in Recv": func(s duplexStream) error {
		_, err := s.Recv()
		return err
	},
	// blocked by flow control: the client does not read
	"blocked in Send": func(s duplexStream) error {
		for {
			if err := s.Send(payload(4 << 10)); err != nil {
				return err
			}
		}
	},
	"waiting for its context": func(s duplexStream) error {
		<-s.Context().Done()
		return context.Cause(s.Context())
	},
	"that swallows errors": func(s duplexStream) error {
		for s.Context().Err() == nil {
			_, _ = s.Recv()
		}
		return nil
	},
}

func payload(size int) *testpb.StreamingOutputCallResponse {
	return &testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: make([]byte, size)}}
}

// hidden simulates a transport whose streams have no method WriteStatus.
func hidden() grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
	) error {
		plain := struct{ grpc.ServerTransportStream }{
			grpc.ServerTransportStreamFromContext(ss.Context()),
		}
		return next(srv,
			&withContext{ss, grpc.NewContextWithServerTransportStream(ss.Context(), plain)})
	})
}

type withContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *withContext) Context() context.Context { return s.ctx }

// An embedder is a Verifier around a store. Its contexts are derived from the contexts of the
// store.
type embedder struct{ *keystore.Store }

func (e embedder) Bind(ctx context.Context, token string) (*keystore.Session, error) {
	inner, err := e.Store.Bind(ctx, token)
	if err != nil {
		return nil, err
	}
	type tag struct{}
	tagged := context.WithValue(inner.Context(), tag{}, "embedder's")
	session := keystore.NewSession(tagged, inner.Key())
	session.OnEnd(inner.Close)
	return session, nil
}

func TestRevokeEndsStreams(t *testing.T) {
	for _, transport := range []struct {
		name  string
		opts  []grpc.ServerOption
		serve func(t testing.TB, svc *service, opts ...grpc.ServerOption) string
		embed bool
	}{
		{"grpc-go's transport", nil, serve, false},
		{"grpc-go's transport under another Verifier", nil, serve, true},
		{"a transport that cannot end a stream", []grpc.ServerOption{hidden()}, serve, false},
		{"an HTTP server", nil, nil, false},
	} {
		for name, handler := range handlers {
			t.Run(transport.name+", a handler "+name, func(t *testing.T) {
				store := openStore(t)
				key, token := issue(t, store, keystore.Spec{})
				returned := make(chan error, 1)
				started := make(chan struct{})
				svc := &service{duplex: func(s duplexStream) error {
					assert.NoError(t, s.SendHeader(nil))
					close(started)
					err := handler(s)
					returned <- err
					return err
				}}
				var verifier interceptor.Verifier = store
				if transport.embed {
					verifier = embedder{store}
				}
				opts := append(transport.opts, newAuth(t, verifier).ServerOptions()...)
				var conn *grpc.ClientConn
				if transport.serve != nil {
					conn = dial(t, transport.serve(t, svc, opts...))
				} else {
					conn = dialHTTP(t, svc, opts...)
				}
				stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
					withKey(t.Context(), token),
				)
				require.NoError(t, err)
				<-started
				require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
				if err := <-returned; err != nil && !errors.Is(err, keystore.ErrRevoked) {
					requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
				}
				for err = nil; err == nil; { // messages that were sent before
					_, err = stream.Recv()
				}
				requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
				require.Zero(t, store.Stats().Live)
			})
		}
	}
}

// dialHTTP connects to the service behind an http.Server, which has a transport of its own.
func dialHTTP(t testing.TB, svc *service, opts ...grpc.ServerOption) *grpc.ClientConn {
	t.Helper()
	server := grpc.NewServer(append(opts, grpc.WaitForHandlers(true))...)
	testpb.RegisterTestServiceServer(server, svc)
	cert, pool := throwawayCertificate(t)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	web := &http.Server{Handler: server}
	web.Protocols = new(http.Protocols)
	web.Protocols.SetHTTP2(true)
	web.TLSConfig = cert
	done := make(chan error, 1)
	go func() { done <- web.ServeTLS(lis, "", "") }()
	t.Cleanup(func() {
		require.NoError(t, web.Close())
		require.ErrorIs(t, <-done, http.ErrServerClosed)
		server.Stop()
	})
	return dial(t, lis.Addr().String(),
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(pool, "")))
}

// A connector starts a server for svc and returns a connection to the server.
type connector func(svc *service, opts ...grpc.ServerOption) *grpc.ClientConn

// A handler that ignores the end continues, but its client gets the status immediately, and the
// handler can neither send nor receive.
func TestRevokeReachesTheClientOfADeafHandler(t *testing.T) {
	for name, connect := range map[string]connector{
		"grpc-go's transport": func(svc *service, opts ...grpc.ServerOption) *grpc.ClientConn {
			return dial(t, serve(t, svc, opts...))
		},
		"an HTTP server": func(svc *service, opts ...grpc.ServerOption) *grpc.ClientConn {
			return dialHTTP(t, svc, opts...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{})
			statusArrived, done := make(chan struct{}), make(chan struct{})
			svc := &service{duplex: func(s duplexStream) error {
				defer close(done)
				if err := s.Send(payload(1)); err != nil {
					return err
				}
				<-statusArrived
				if err := s.Send(payload(1)); reasonOf(err) != "API_KEY_REVOKED" {
					t.Errorf("Send: %v", err)
				}
				if _, err := s.Recv(); reasonOf(err) != "API_KEY_REVOKED" {
					t.Errorf("Recv: %v", err)
				}
				return nil
			}}
			conn := connect(svc, newAuth(t, store).ServerOptions()...)
			stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
				withKey(t.Context(), token),
			)
			require.NoError(t, err)
			_, err = stream.Recv()
			require.NoError(t, err)
			require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
			_, err = stream.Recv()
			requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
			close(statusArrived)
			<-done
		})
	}
}

// Under an HTTP server, a client that does not read delays the status, and nothing else. RecvMsg
// and SendMsg return, even in handlers that do not return themselves. Everything is released when
// the connection ends.
func TestRevokeUnderAnHTTPServerOfClientsThatDoNotRead(t *testing.T) {
	const streams = 20
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	came, deaf, left := make(chan error, streams), make(chan struct{}), make(chan struct{}, streams)
	var n atomic.Int64
	svc := &service{duplex: func(s duplexStream) error {
		defer func() { left <- struct{}{} }()
		_ = s.SendHeader(nil)
		i, err := n.Add(1), error(nil)
		for err == nil {
			err = s.Send(payload(4 << 10))
		}
		came <- err
		if i%2 == 0 {
			<-deaf
		}
		return err
	}}
	conn := dialHTTP(t, svc, newAuth(t, store).ServerOptions()...)
	for range streams {
		stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
		require.NoError(t, err)
		_, err = stream.Header()
		require.NoError(t, err)
	}
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	for range streams {
		requireRefused(t, <-came, codes.Unauthenticated, "API_KEY_REVOKED")
	}
	require.NoError(t, conn.Close())
	close(deaf)
	for range streams {
		<-left
	}
}

// An ending is a change of a key that ends the streams and calls of the key, and the status that
// the clients then get.
type ending struct {
	change func(ctx context.Context, s *keystore.Store, id string) error
	code   codes.Code
	reason string
}

var endings = map[string]ending{
	"Disable": {func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Disable(ctx, id, "")
	}, codes.Unauthenticated, "API_KEY_INVALID"},
	"Rotate without a grace": {func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Rotate(ctx, id, 0)
		return err
	}, codes.Unauthenticated, "API_KEY_REVOKED"},
	"Rotate with a short one": {func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Rotate(ctx, id, 50*time.Millisecond)
		return err
	}, codes.Unauthenticated, "API_KEY_EXPIRED"},
	"Update to a scope less": {func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Update(ctx, id, func(spec *keystore.Spec) error {
			spec.Scopes = nil
			return nil
		})
		return err
	}, codes.Unavailable, "API_KEY_CHANGED"},
}

// Every change that narrows a key ends the streams of the key, with the right status.
func TestChangesEndStreams(t *testing.T) {
	for name, tt := range endings {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{Scopes: []string{"a"}})
			svc := &service{duplex: func(s duplexStream) error {
				_ = s.SendHeader(nil)
				return handlers["blocked in Recv"](s)
			}}
			conn := dial(t,
				serve(t, svc,
					newAuth(t, store, interceptor.Require(duplex, "a")).ServerOptions()...))
			stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
				withKey(t.Context(), token),
			)
			require.NoError(t, err)
			_, err = stream.Header()
			require.NoError(t, err)
			require.NoError(t, tt.change(t.Context(), store, key.ID))
			_, err = stream.Recv()
			requireRefused(t, err, tt.code, tt.reason)
		})
	}
}

func TestExpiryEndsStreams(t *testing.T) {
	store := openStore(t)
	conn := dial(t,
		serve(t, &service{duplex: handlers["blocked in Recv"]},
			newAuth(t, store).ServerOptions()...))
	for life := 300 * time.Millisecond; ; life *= 4 {
		_, token := issue(t, store, keystore.Spec{ExpiresAt: time.Now().Add(life)})
		stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
		require.NoError(t, err)
		_, err = stream.Recv()
		if reasonOf(err) == "API_KEY_INVALID" && life < time.Minute {
			continue // the machine was so slow that the key expired before the stream was open
		}
		requireRefused(t, err, codes.Unauthenticated, "API_KEY_EXPIRED")
		return
	}
}

func TestClosingTheStoreEndsStreams(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	started := make(chan struct{})
	svc := &service{duplex: func(s duplexStream) error {
		close(started)
		return handlers["blocked in Recv"](s)
	}}
	conn := dial(t, serve(t, svc, newAuth(t, store).ServerOptions()...))
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	<-started
	require.NoError(t, store.Close())
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE")
	for _, err := range both(withKey(t.Context(), token), conn) {
		requireRefused(t, err, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE")
	}
}

// Without a revocation the interceptor changes nothing: messages, ends, errors and cancellations
// are those of the handler.
func TestStreamsWithoutRevocationAreUnchanged(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	cause := make(chan error, 1)
	svc := &service{duplex: func(s duplexStream) error {
		for {
			_, err := s.Recv()
			if err == io.EOF {
				return status.Error(codes.Aborted, "the handler's own")
			}
			if err != nil {
				cause <- err
				return err
			}
			if err := s.Send(payload(1)); err != nil {
				return err
			}
		}
	}}
	for name, opts := range map[string][]grpc.ServerOption{
		"grpc-go's transport": nil, "another": {hidden()},
	} {
		t.Run(name, func(t *testing.T) {
			client := testpb.NewTestServiceClient(
				dial(t, serve(t, svc, append(opts, newAuth(t, store).ServerOptions()...)...)),
			)
			stream, err := client.FullDuplexCall(withKey(t.Context(), token))
			require.NoError(t, err)
			for range 100 {
				require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
				_, err := stream.Recv()
				require.NoError(t, err)
			}
			require.NoError(t, stream.CloseSend())
			_, err = stream.Recv()
			requireRefused(t, err, codes.Aborted, "")

			ctx, cancel := context.WithCancel(withKey(t.Context(), token))
			stream, err = client.FullDuplexCall(ctx)
			require.NoError(t, err)
			require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
			_, err = stream.Recv()
			require.NoError(t, err)
			cancel()
			require.Equal(t, codes.Canceled, status.Code(<-cause),
				"what the handler sees of a client that went away")
		})
	}
}

// A handler panics on its own goroutine, before and after the end of the stream, so an outer
// interceptor can recover the panic.
func TestPanicsReachAnOuterInterceptor(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	recovered := make(chan any, 4)
	recovery := []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(func(
			ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
		) (_ any, err error) {
			defer func() {
				if p := recover(); p != nil {
					recovered <- p
					err = status.Error(codes.Internal, "panic")
				}
			}()
			return next(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(
			srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
		) (err error) {
			defer func() {
				if p := recover(); p != nil {
					recovered <- p
					err = status.Error(codes.Internal, "panic")
				}
			}()
			return next(srv, ss)
		}),
	}
	svc := &service{
		empty:  func(context.Context) error { panic("in a unary handler") },
		duplex: func(duplexStream) error { panic("in a stream handler") },
	}
	for _, opts := range [][]grpc.ServerOption{nil, {hidden()}} {
		conn := dial(t,
			serve(t, svc,
				append(append(recovery, opts...), newAuth(t, store).ServerOptions()...)...))
		for kind, err := range both(withKey(t.Context(), token), conn) {
			require.Equal(t, codes.Internal, status.Code(err), kind)
			require.Contains(t, fmt.Sprint(<-recovered), "handler")
		}

		key, token := issue(t, store, keystore.Spec{})
		after := &service{duplex: func(s duplexStream) error {
			_ = s.SendHeader(nil)
			_, err := s.Recv()
			panic(err)
		}}
		conn = dial(t,
			serve(t, after,
				append(append(recovery, opts...), newAuth(t, store).ServerOptions()...)...))
		stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
		require.NoError(t, err)
		_, err = stream.Header()
		require.NoError(t, err)
		require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
		require.Equal(t, "API_KEY_REVOKED", reasonOf((<-recovered).(error)))
		_, err = stream.Recv()
		require.Error(t, err)
	}
	require.Zero(t, store.Stats().Live)
}

// An ErrorMapper that blocks for one stream delays no other stream.
func TestRevokeDoesNotWaitForTheErrorMapper(t *testing.T) {
	const streams = 20
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	var first atomic.Bool
	blocked, release := make(chan struct{}), make(chan struct{})
	mapper := func(_ context.Context, _ string, _ error, byDefault *status.Status) *status.Status {
		if first.CompareAndSwap(false, true) {
			close(blocked)
			<-release
		}
		return byDefault
	}
	svc := &service{duplex: func(s duplexStream) error {
		_ = s.SendHeader(nil)
		return handlers["blocked in Recv"](s)
	}}
	conn := dial(t,
		serve(t, svc, newAuth(t, store, interceptor.MapErrors(mapper)).ServerOptions()...))
	ends := make(chan error, streams)
	for range streams {
		stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
		require.NoError(t, err)
		_, err = stream.Header()
		require.NoError(t, err)
		go func() {
			_, err := stream.Recv()
			ends <- err
		}()
	}
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	<-blocked
	for range streams - 1 {
		requireRefused(t, <-ends, codes.Unauthenticated, "API_KEY_REVOKED")
	}
	close(release)
	requireRefused(t, <-ends, codes.Unauthenticated, "API_KEY_REVOKED")
}

// The ErrorMapper for an ended stream runs on a goroutine where no interceptor recovers panics. A
// panic there does not end the process, and the stream ends nevertheless.
func TestErrorMapperPanicsWhenAStreamEnds(t *testing.T) {
	for name, opts := range map[string][]grpc.ServerOption{
		"grpc-go's transport": nil, "another": {hidden()},
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{})
			mapper := func(context.Context, string, error, *status.Status) *status.Status {
				panic("in the mapper")
			}
			opened := make(chan struct{})
			svc := &service{duplex: func(s duplexStream) error {
				close(opened)
				return handlers["blocked in Recv"](s)
			}}
			opts = append(opts, newAuth(t, store, interceptor.MapErrors(mapper)).ServerOptions()...)
			stream, err := testpb.NewTestServiceClient(
				dial(t, serve(t, svc, opts...)),
			).FullDuplexCall(withKey(t.Context(), token))
			require.NoError(t, err)
			<-opened
			require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
			_, err = stream.Recv()
			requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
		})
	}
}

// A handler that waits for its context and then panics may be faster than the watcher. The
// interceptor then waits for the watcher. The test derives many contexts, because their
// cancellation delays the start of the watcher.
func TestHandlerPanicsBeforeTheWatcherRuns(t *testing.T) {
	store := openStore(t)
	svc := &service{duplex: func(s duplexStream) error {
		for range 1000 {
			context.AfterFunc(s.Context(), func() {})
		}
		_ = s.SendHeader(nil)
		<-s.Context().Done()
		panic("after the end")
	}}
	conn := dial(t,
		serve(t, svc,
			append([]grpc.ServerOption{recoverStreams()}, newAuth(t, store).ServerOptions()...)...))
	for range 50 {
		key, token := issue(t, store, keystore.Spec{})
		stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
		require.NoError(t, err)
		_, err = stream.Header()
		require.NoError(t, err)
		require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
		_, err = stream.Recv()
		requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	}
}

// panicking is a message that no codec can encode.
type panicking struct {
	*testpb.StreamingOutputCallResponse
}

// A panic in RecvMsg or SendMsg reaches the handler, even in the modes that run them in a new
// goroutine.
func TestPanicBelowTheInterceptor(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	got := make(chan any, 1)
	svc := &service{duplex: func(s duplexStream) (err error) {
		defer func() { got <- recover() }()
		return s.SendMsg(&panicking{})
	}}
	below := grpc.ChainStreamInterceptor(func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
	) error {
		return next(srv, &panickingStream{ss})
	})
	conn := dial(t,
		serve(t, svc,
			append([]grpc.ServerOption{hidden(), below}, newAuth(t, store).ServerOptions()...)...))
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	_, _ = stream.Recv()
	require.Equal(t, "below", <-got)
}

type panickingStream struct{ grpc.ServerStream }

func (*panickingStream) SendMsg(any) error { panic("below") }

// recoverStreams ends each stream with Internal, also after a panic of the handler.
func recoverStreams() grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
	) (err error) {
		defer func() {
			_ = recover()
			err = status.Error(codes.Internal, "panic")
		}()
		return next(srv, ss)
	})
}
