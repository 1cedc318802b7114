package interceptor_test

import (
	"context"
	"io"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// below puts a stream of the test between the Authenticator and the transport.
func below(wrap func(grpc.ServerStream) grpc.ServerStream) grpc.ServerOption {
	return grpc.ChainStreamInterceptor(func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
	) error {
		return next(srv, wrap(ss))
	})
}

// A held transport delays WriteStatus until the gate is open. So the actions of a handler before
// that precede the status.
type held struct {
	grpc.ServerTransportStream
	gate <-chan struct{}
}

func (h held) WriteStatus(st *status.Status) error {
	<-h.gate
	return h.ServerTransportStream.(interface{ WriteStatus(*status.Status) error }).WriteStatus(st)
}

func holding(gate <-chan struct{}) grpc.ServerOption {
	return below(func(ss grpc.ServerStream) grpc.ServerStream {
		t := held{grpc.ServerTransportStreamFromContext(ss.Context()), gate}
		return &withContext{ss, grpc.NewContextWithServerTransportStream(ss.Context(), t)}
	})
}

// After Revoke has returned, no header or trailer that the handler sets reaches the client.
func TestRevokeStopsHeadersAndTrailers(t *testing.T) {
	type setter struct {
		setHeader, sendHeader func(metadata.MD) error
		setTrailer            func(metadata.MD) error
	}
	ofContext := func(ctx context.Context) setter {
		return setter{
			func(md metadata.MD) error { return grpc.SetHeader(ctx, md) },
			func(md metadata.MD) error { return grpc.SendHeader(ctx, md) },
			func(md metadata.MD) error { return grpc.SetTrailer(ctx, md) },
		}
	}
	for name, set := range map[string]func(s duplexStream) setter{
		"the stream's": func(s duplexStream) setter {
			return setter{s.SetHeader, s.SendHeader, func(md metadata.MD) error {
				s.SetTrailer(md)
				return s.Send(payload(1)) // SetTrailer says nothing
			}}
		},
		"grpc's": func(s duplexStream) setter { return ofContext(s.Context()) },
		"grpc's with a derived context": func(s duplexStream) setter {
			type tag struct{}
			return ofContext(context.WithValue(s.Context(), tag{}, 1))
		},
	} {
		for _, transport := range []string{
			"grpc-go's", "one that cannot end a stream", "an HTTP server's",
		} {
			t.Run(name+" on "+transport, func(t *testing.T) {
				store := openStore(t)
				key, token := issue(t, store, keystore.Spec{})
				revoked, opened, returned := make(chan struct{}), make(chan struct{}),
					make(chan struct{})
				errs := make(chan error, 3)
				svc := &service{duplex: func(s duplexStream) error {
					defer close(returned)
					close(opened)
					<-revoked
					to := set(s)
					errs <- to.setHeader(metadata.Pairs("late", "1"))
					errs <- to.sendHeader(metadata.Pairs("late", "2"))
					errs <- to.setTrailer(metadata.Pairs("late", "3"))
					return nil
				}}
				opts := newAuth(t, store).ServerOptions()
				var conn *grpc.ClientConn
				switch transport {
				case "grpc-go's":
					conn = dial(t,
						serve(t, svc, append([]grpc.ServerOption{holding(returned)}, opts...)...))
				case "an HTTP server's":
					conn = dialHTTP(t, svc,
						append([]grpc.ServerOption{holding(returned)}, opts...)...)
				default:
					conn = dial(t, serve(t, svc, append([]grpc.ServerOption{hidden()}, opts...)...))
				}
				stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
					withKey(t.Context(), token),
				)
				require.NoError(t, err)
				<-opened
				require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
				close(revoked)
				_, err = stream.Recv()
				requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
				header, err := stream.Header()
				require.NoError(t, err)
				require.Empty(t, header.Get("late"))
				require.Empty(t, stream.Trailer().Get("late"))
				for range 3 {
					requireRefused(t, <-errs, codes.Unauthenticated, "API_KEY_REVOKED")
				}
			})
		}
	}
}

// Headers and trailers that a handler sets before the end arrive with the status. An ErrorMapper
// can still add a trailer.
func TestTrailersBeforeTheEndArrive(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	opened := make(chan struct{}, 1)
	svc := &service{duplex: func(s duplexStream) error {
		defer close(opened)
		s.SetTrailer(metadata.Pairs("early", "1"))
		// takes nothing but the transport's own stream
		_, err := grpc.ClientSupportedCompressors(s.Context())
		for _, err := range []error{
			err,
			grpc.SetTrailer(s.Context(), metadata.Pairs("early", "2")),
			grpc.SetHeader(s.Context(), metadata.Pairs("early", "3")),
			s.SetHeader(metadata.Pairs("early", "4")),
		} {
			if err != nil {
				return err
			}
		}
		opened <- struct{}{}
		return handlers["blocked in Recv"](s)
	}}
	mapper := func(
		ctx context.Context, _ string, _ error, byDefault *status.Status,
	) *status.Status {
		if err := grpc.SetTrailer(ctx, metadata.Pairs("mapper", "1")); err != nil {
			return status.New(codes.Internal, err.Error())
		}
		return byDefault
	}
	conn := dial(t,
		serve(t, svc, newAuth(t, store, interceptor.MapErrors(mapper)).ServerOptions()...))
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	<-opened
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	header, err := stream.Header()
	require.NoError(t, err)
	require.Equal(t, []string{"3", "4"}, header.Get("early"))
	require.Equal(t, []string{"1", "2"}, stream.Trailer().Get("early"))
	require.Equal(t, []string{"1"}, stream.Trailer().Get("mapper"))
}

// A lateStream delays the message of RecvMsg until the gate is open, and reports that RecvMsg has
// written to the message.
type lateStream struct {
	grpc.ServerStream
	gate, done chan struct{}
}

func (s *lateStream) RecvMsg(m any) error {
	defer close(s.done)
	<-s.gate
	m.(*testpb.StreamingOutputCallRequest).ResponseStatus = &testpb.EchoStatus{Code: 7}
	return nil
}

// An abandoned RecvMsg does not write to the message of the handler.
func TestAbandonedRecvMsg(t *testing.T) {
	for name, connect := range map[string]connector{
		"a transport that cannot end a stream": func(
			svc *service, opts ...grpc.ServerOption,
		) *grpc.ClientConn {
			return dial(t, serve(t, svc, append([]grpc.ServerOption{hidden()}, opts...)...))
		},
		"an HTTP server": func(svc *service, opts ...grpc.ServerOption) *grpc.ClientConn {
			return dialHTTP(t, svc, opts...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{})
			gate, done, opened := make(chan struct{}), make(chan struct{}), make(chan struct{})
			got := make(chan *testpb.StreamingOutputCallRequest, 1)
			svc := &service{duplex: func(s duplexStream) error {
				close(opened)
				m := &testpb.StreamingOutputCallRequest{}
				err := s.RecvMsg(m)
				close(gate)
				<-done
				got <- m
				return err
			}}
			late := below(func(ss grpc.ServerStream) grpc.ServerStream {
				return &lateStream{ss, gate, done}
			})
			conn := connect(svc,
				append([]grpc.ServerOption{late}, newAuth(t, store).ServerOptions()...)...)
			stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
				withKey(t.Context(), token),
			)
			require.NoError(t, err)
			<-opened
			require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
			require.Nil(t, (<-got).ResponseStatus, "the message is the handler's again")
			_, err = stream.Recv()
			requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
		})
	}
}

// In the modes serveHTTP and foreign, the message of the handler equals the sent message, even if
// the handler uses a message again.
func TestReceivedMessagesEqualTheSent(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	sent := []*testpb.StreamingOutputCallRequest{
		{
			ResponseParameters: []*testpb.ResponseParameters{
				{Size: 1, Compressed: &testpb.BoolValue{Value: true}}, {Size: 2}},
			Payload: &testpb.Payload{Body: []byte("body")},
		},
		{ResponseStatus: &testpb.EchoStatus{Code: 3, Message: "m"}},
		{},
	}
	sent[1].ProtoReflect().SetUnknown([]byte{0xa2, 0x06, 1, 'x'}) // field 100 of a later version
	got := make(chan *testpb.StreamingOutputCallRequest, len(sent))
	svc := &service{duplex: func(s duplexStream) error {
		m := &testpb.StreamingOutputCallRequest{}
		for {
			if err := s.RecvMsg(m); err != nil {
				return err
			}
			got <- proto.CloneOf(m)
		}
	}}
	conn := dial(t,
		serve(t, svc,
			append([]grpc.ServerOption{hidden()}, newAuth(t, store).ServerOptions()...)...))
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	for _, m := range sent {
		require.NoError(t, stream.Send(m))
		require.True(t, proto.Equal(m, <-got), "%v", m)
	}
	require.NoError(t, stream.CloseSend())
	_, err = stream.Recv()
	require.Equal(t, codes.Unknown, status.Code(err), "the handler returns io.EOF: %v", err)
	require.ErrorContains(t, err, io.EOF.Error())
}

// A counted stream counts the calls that reach the transport.
type counted struct {
	grpc.ServerStream
	calls *atomic.Int64
}

func (s counted) RecvMsg(m any) error {
	s.calls.Add(1)
	return s.ServerStream.RecvMsg(m)
}

func (s counted) SendMsg(m any) error {
	s.calls.Add(1)
	return s.ServerStream.SendMsg(m)
}

// After Revoke has returned, RecvMsg and SendMsg do not call the transport.
func TestMessagesCheckTheSessionFirst(t *testing.T) {
	for _, transport := range []string{"one that can end a stream", "one that cannot"} {
		for name, use := range map[string]func(duplexStream) error{
			"RecvMsg": func(s duplexStream) error {
				return s.RecvMsg(new(testpb.StreamingOutputCallRequest))
			},
			"SendMsg": func(s duplexStream) error { return s.SendMsg(payload(1)) },
		} {
			t.Run(name+" on "+transport, func(t *testing.T) {
				store := openStore(t)
				key, token := issue(t, store, keystore.Spec{})
				var calls atomic.Int64
				revoked, opened, returned := make(chan struct{}), make(chan struct{}),
					make(chan struct{})
				errs := make(chan error, 1)
				svc := &service{duplex: func(s duplexStream) error {
					defer close(returned)
					close(opened)
					<-revoked
					errs <- use(s)
					return nil
				}}
				opts := []grpc.ServerOption{
					below(func(ss grpc.ServerStream) grpc.ServerStream {
						return counted{ss, &calls}
					})}
				if transport == "one that cannot" {
					opts = append(opts, hidden())
				} else {
					opts = append(opts, holding(returned))
				}
				conn := dial(t,
					serve(t, svc, append(opts, newAuth(t, store).ServerOptions()...)...))
				stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
					withKey(t.Context(), token),
				)
				require.NoError(t, err)
				require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
				<-opened
				require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
				close(revoked)
				_, err = stream.Recv()
				requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
				requireRefused(t, <-errs, codes.Unauthenticated, "API_KEY_REVOKED")
				require.Zero(t, calls.Load())
			})
		}
	}
}

// An endable context is ended by the test. Contexts that are derived from it do not see the end, so
// nothing that Session.OnEnd was given is called.
type endable struct {
	context.Context
	cause atomic.Pointer[error]
}

func (e *endable) Err() error {
	if cause := e.cause.Load(); cause != nil {
		return *cause
	}
	return e.Context.Err()
}

// A bindVerifier returns the result of bind for every token.
type bindVerifier struct {
	verifier
	bind func(context.Context) (*keystore.Session, error)
}

func (v bindVerifier) Bind(ctx context.Context, _ string) (*keystore.Session, error) {
	return v.bind(ctx)
}

// The client gets the status of the end, not of the panic, even if the handler panics before the
// watcher starts.
func TestHandlerReturnsBeforeTheWatcherRuns(t *testing.T) {
	revoked := error(keystore.ErrRevoked)
	var bound *endable
	v := bindVerifier{bind: func(ctx context.Context) (*keystore.Session, error) {
		bound = &endable{Context: ctx}
		return keystore.NewSession(bound, &keystore.Key{ID: "id"}), nil
	}}
	svc := &service{duplex: func(duplexStream) error {
		bound.cause.Store(&revoked)
		panic("after the end")
	}}
	conn := dial(t,
		serve(t, svc, append([]grpc.ServerOption{recoverStreams()}, newAuth(t, v).ServerOptions()...)...))
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), "k"))
	require.NoError(t, err)
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
}
