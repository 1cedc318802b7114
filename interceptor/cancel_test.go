package interceptor_test

import (
	"context"
	"maps"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// transports are the ways to connect a client to a server.
var transports = map[string]func(
	t testing.TB, svc *service, opts ...grpc.ServerOption,
) *grpc.ClientConn{
	"grpc-go's transport": func(
		t testing.TB, svc *service, opts ...grpc.ServerOption,
	) *grpc.ClientConn {
		return dial(t, serve(t, svc, opts...))
	},
	"a transport that cannot end a stream": func(
		t testing.TB, svc *service, opts ...grpc.ServerOption,
	) *grpc.ClientConn {
		hide := grpc.ChainUnaryInterceptor(func(
			ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
		) (any, error) {
			plain := struct{ grpc.ServerTransportStream }{
				grpc.ServerTransportStreamFromContext(ctx),
			}
			return next(grpc.NewContextWithServerTransportStream(ctx, plain), req)
		})
		return dial(t, serve(t, svc, append([]grpc.ServerOption{hide}, opts...)...))
	},
	"an HTTP server": dialHTTP,
}

// callInBackground makes a unary call in a new goroutine. The channel receives the error.
func callInBackground(ctx context.Context, conn *grpc.ClientConn) <-chan error {
	ended := make(chan error, 1)
	go func() { ended <- call(ctx, conn) }()
	return ended
}

func TestCancelUnary(t *testing.T) {
	for name, connect := range transports {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{})
			started, cause := make(chan struct{}), make(chan error, 1)
			svc := &service{empty: func(ctx context.Context) error {
				close(started)
				<-ctx.Done()
				cause <- context.Cause(ctx)
				return ctx.Err()
			}}
			conn := connect(t, svc, newAuth(t, store, interceptor.CancelUnary()).ServerOptions()...)
			ended := callInBackground(withKey(t.Context(), token), conn)
			<-started
			require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
			require.ErrorIs(t, <-cause, keystore.ErrRevoked)
			requireRefused(t, <-ended, codes.Unauthenticated, "API_KEY_REVOKED")
			require.Eventually(t, func() bool {
				return store.Stats().Live == 0
			}, time.Minute, time.Millisecond)
		})
	}
}

// A handler that ignores its context runs to completion, but its reply is not sent. On transports
// with WriteStatus, the client gets the status before the handler returns.
func TestCancelUnaryOfADeafHandler(t *testing.T) {
	for name, connect := range transports {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{})
			started, proceed, returned := make(chan struct{}), make(chan struct{}),
				make(chan struct{})
			svc := &service{empty: func(ctx context.Context) error {
				defer close(returned)
				close(started)
				<-proceed
				return nil
			}}
			conn := connect(t, svc, newAuth(t, store, interceptor.CancelUnary()).ServerOptions()...)
			ended := callInBackground(withKey(t.Context(), token), conn)
			<-started
			require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
			if name == "a transport that cannot end a stream" {
				close(proceed)
				requireRefused(t, <-ended, codes.Unauthenticated, "API_KEY_REVOKED")
			} else {
				requireRefused(t, <-ended, codes.Unauthenticated, "API_KEY_REVOKED")
				close(proceed)
			}
			<-returned
		})
	}
}

// By default, a unary call runs to completion.
func TestUnaryCallsCompleteWithoutCancelUnary(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	started, proceed := make(chan struct{}), make(chan struct{})
	svc := &service{empty: func(ctx context.Context) error {
		close(started)
		<-proceed
		return ctx.Err()
	}}
	ended := callInBackground(withKey(t.Context(), token),
		dial(t, serve(t, svc, newAuth(t, store).ServerOptions()...)))
	<-started
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	close(proceed)
	require.NoError(t, <-ended)
}

// Every change that ends a stream also ends a unary call, and the client gets the same status.
func TestChangesCancelUnary(t *testing.T) {
	all := maps.Clone(endings)
	all["Close"] = ending{func(_ context.Context, s *keystore.Store, _ string) error {
		return s.Close()
	}, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE"}
	for name, tt := range all {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{Scopes: []string{"a"}})
			started := make(chan struct{})
			svc := &service{empty: func(ctx context.Context) error {
				close(started)
				<-ctx.Done()
				return nil
			}}
			auth := newAuth(t, store, interceptor.CancelUnary(),
				interceptor.Require(emptyCall, "a"))
			ended := callInBackground(withKey(t.Context(), token),
				dial(t, serve(t, svc, auth.ServerOptions()...)))
			<-started
			require.NoError(t, tt.change(t.Context(), store, key.ID))
			requireRefused(t, <-ended, tt.code, tt.reason)
		})
	}
}

// With CancelUnary, calls are accepted and refused as without CancelUnary: with a valid key, with a
// missing scope, and in public and optional methods.
func TestCancelUnaryAcceptsAndRefuses(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	svc := &service{empty: func(ctx context.Context) error {
		if got, ok := interceptor.FromContext(ctx); !ok || got.ID != key.ID {
			return status.Error(codes.Aborted, "this is not the caller")
		}
		md, _ := metadata.FromIncomingContext(ctx)
		if len(md.Get("authorization")) > 0 || len(md.Get("x-other")) != 1 {
			return status.Error(codes.Aborted, "the credential is there, or the rest is not")
		}
		return nil
	}}
	conn := dial(t, serve(t, svc, newAuth(t, store, interceptor.CancelUnary()).ServerOptions()...))
	require.NoError(t,
		call(metadata.AppendToOutgoingContext(withKey(t.Context(), token), "x-other", "1"), conn))
	requireRefused(t, call(t.Context(), conn), codes.Unauthenticated, "CREDENTIALS_MISSING")
	requireRefused(t, call(withKey(t.Context(), token+"x"), conn), codes.Unauthenticated,
		"API_KEY_INVALID")

	scoped := newAuth(t, store, interceptor.CancelUnary(), interceptor.Require(emptyCall, "a"))
	requireRefused(t,
		call(withKey(t.Context(), token), dial(t, serve(t, svc, scoped.ServerOptions()...))),
		codes.PermissionDenied, "INSUFFICIENT_SCOPE")
	for _, o := range []interceptor.Option{
		interceptor.Public(emptyCall), interceptor.Optional(emptyCall),
	} {
		auth := newAuth(t, store, interceptor.CancelUnary(), o)
		require.NoError(t,
			call(t.Context(), dial(t, serve(t, &service{}, auth.ServerOptions()...))))
	}
	require.Zero(t, store.Stats().Live)
}

// Handlers return during a Revoke. The reply of a handler that returns after Revoke has returned
// must not reach the client.
func TestRevokeRacesTheReplies(t *testing.T) {
	const rounds, calls = 30, 20
	store := openStore(t)
	var revoked atomic.Bool
	var started, returned sync.WaitGroup
	var proceed chan struct{}
	var late [calls]bool
	svc := &service{empty: func(ctx context.Context) error {
		defer returned.Done()
		i, _ := strconv.Atoi(metadata.ValueFromIncomingContext(ctx, "call")[0])
		started.Done()
		<-proceed
		for range i * 1000 { // some return before, some after
			late[i] = revoked.Load()
		}
		late[i] = revoked.Load()
		return nil
	}}
	conn := dial(t, serve(t, svc, newAuth(t, store, interceptor.CancelUnary()).ServerOptions()...))
	replies, refusals := 0, 0
	for range rounds {
		key, token := issue(t, store, keystore.Spec{})
		revoked.Store(false)
		proceed = make(chan struct{})
		started.Add(calls)
		returned.Add(calls)
		var ends [calls]<-chan error
		for i := range calls {
			ends[i] = callInBackground(
				metadata.AppendToOutgoingContext(withKey(t.Context(), token), "call",
					strconv.Itoa(i)), conn)
		}
		started.Wait()
		go func() { close(proceed) }()
		require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
		revoked.Store(true)
		for i, end := range ends {
			err := <-end
			if err == nil {
				replies++
				require.False(t, late[i], "a reply went out after Revoke had returned")
				continue
			}
			refusals++
			requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
		}
		returned.Wait()
		require.Eventually(t, func() bool {
			return store.Stats().Live == 0
		}, time.Minute, time.Millisecond)
	}
	t.Logf("%d replies, %d refusals", replies, refusals)
}

// A panic of the handler stays on the goroutine of the handler, before and after the key is
// revoked.
func TestCancelUnaryPanics(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	recovered := make(chan any, 2)
	recovery := grpc.ChainUnaryInterceptor(func(
		ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
	) (_ any, err error) {
		defer func() { recovered <- recover() }()
		return next(ctx, req)
	})
	started, wait := make(chan struct{}, 2), make(chan struct{})
	close(wait)
	svc := &service{empty: func(ctx context.Context) error {
		started <- struct{}{}
		<-wait
		panic("in the handler")
	}}
	conn := dial(t,
		serve(t, svc,
			append([]grpc.ServerOption{recovery},
				newAuth(t, store, interceptor.CancelUnary()).ServerOptions()...)...))
	_ = call(withKey(t.Context(), token), conn)
	require.Equal(t, "in the handler", <-recovered)
	<-started
	require.Zero(t, store.Stats().Live)

	wait = make(chan struct{})
	ended := callInBackground(withKey(t.Context(), token), conn)
	<-started
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	close(wait)
	require.Equal(t, "in the handler", <-recovered)
	requireRefused(t, <-ended, codes.Unauthenticated, "API_KEY_REVOKED")
	require.Zero(t, store.Stats().Live)
}
