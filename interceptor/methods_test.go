package interceptor_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const (
	unaryCall  = "/grpc.testing.TestService/UnaryCall"
	halfDuplex = "/grpc.testing.TestService/HalfDuplexCall"
)

// tapped returns the options of the server, with or without the tap handle.
func tapped(auth *interceptor.Authenticator) map[string][]grpc.ServerOption {
	return map[string][]grpc.ServerOption{
		"":         auth.ServerOptions(),
		", tapped": append(auth.ServerOptions(), grpc.InTapHandle(auth.Tap())),
	}
}

func TestRequireRules(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{Scopes: []string{"a"}})
	auth := newAuth(t, store, interceptor.RequireRules(), interceptor.AnyKey(emptyCall),
		interceptor.Require(duplex, "a"))
	for name, opts := range tapped(auth) {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, serve(t, &service{duplex: end}, opts...))
			for _, err := range both(withKey(t.Context(), token), conn) {
				require.NoError(t, err, "these have a rule")
			}
			for _, err := range both(t.Context(), conn) {
				requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
			}
			for _, ctx := range []context.Context{withKey(t.Context(), token), t.Context()} {
				err := conn.Invoke(ctx, unaryCall, &testpb.SimpleRequest{},
					&testpb.SimpleResponse{})
				requireRefused(t, err, codes.PermissionDenied, "METHOD_HAS_NO_RULE")
				stream, err := testpb.NewTestServiceClient(conn).HalfDuplexCall(ctx)
				require.NoError(t, err)
				_, err = stream.Recv()
				requireRefused(t, err, codes.PermissionDenied, "METHOD_HAS_NO_RULE")
			}
			require.Zero(t, store.Stats().Live)
		})
	}
}

func TestRequireRulesTakesTheRuleOfAService(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store, interceptor.RequireRules(),
		interceptor.AnyKey("/grpc.testing.TestService/*"),
		interceptor.Public("/grpc.health.v1.Health/*"))
	conn := dial(t, serve(t, &service{duplex: end}, auth.ServerOptions()...))
	for _, err := range both(withKey(t.Context(), token), conn) {
		require.NoError(t, err)
	}
	_, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	require.NoError(t, err)
}

func TestOptional(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	revoked, revokedToken := issue(t, store, keystore.Spec{})
	require.NoError(t, store.Revoke(t.Context(), revoked.ID, ""))
	auth := newAuth(t, store, interceptor.Optional(emptyCall, "/grpc.testing.TestService/*"),
		interceptor.Header("authorization", "Bearer"), interceptor.Header("x-api-key", ""))
	for name, opts := range tapped(auth) {
		for _, tt := range []struct {
			name   string
			md     []string
			known  bool
			reason string
		}{
			{"no credential", nil, false, ""},
			{"a good key", []string{"authorization", "Bearer " + token}, true, ""},
			{"a good key in another header", []string{"x-api-key", token}, true, ""},
			{
				"a revoked key", []string{"authorization", "Bearer " + revokedToken}, false,
				"API_KEY_INVALID",
			},
			{
				"a malformed key", []string{"authorization", "Bearer nonsense"}, false,
				"API_KEY_INVALID",
			},
			{
				"another scheme", []string{"authorization", "Basic " + token}, false,
				"CREDENTIALS_SCHEME_INVALID",
			},
			{
				"two keys", []string{"authorization", "Bearer " + token, "x-api-key", token}, false,
				"CREDENTIALS_SEVERAL",
			},
			{"an empty header", []string{"authorization", ""}, false, "CREDENTIALS_MISSING"},
			{"a scheme alone", []string{"authorization", "Bearer"}, false, "CREDENTIALS_MISSING"},
		} {
			t.Run(tt.name+name, func(t *testing.T) {
				calls := 0
				look := func(ctx context.Context) error {
					calls++
					got, ok := interceptor.FromContext(ctx)
					if ok != tt.known || ok && got.ID != key.ID {
						return status.Error(codes.Aborted, "this is not the caller")
					}
					if len(metadata.ValueFromIncomingContext(ctx, "authorization")) > 0 {
						return status.Error(codes.Aborted, "the credential is there")
					}
					return nil
				}
				svc := &service{empty: look, duplex: func(s duplexStream) error {
					return look(s.Context())
				}}
				conn := dial(t, serve(t, svc, opts...))
				for kind, err := range both(
					metadata.AppendToOutgoingContext(t.Context(), tt.md...), conn,
				) {
					if tt.reason == "" {
						require.NoError(t, err, kind)
					} else {
						requireRefused(t, err, codes.Unauthenticated, tt.reason)
					}
				}
				require.Equal(t, tt.reason == "", calls == 2)
			})
		}
	}
}

func TestRevokeEndsTheStreamOfAnOptionalMethod(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	svc := &service{duplex: func(s duplexStream) error {
		_ = s.SendHeader(nil)
		return echo(s)
	}}
	client := testpb.NewTestServiceClient(
		dial(t, serve(t, svc, newAuth(t, store, interceptor.Optional(duplex)).ServerOptions()...)),
	)
	streams := make(map[string]testpb.TestService_FullDuplexCallClient)
	for name, ctx := range map[string]context.Context{
		"key": withKey(t.Context(), token), "no key": t.Context(),
	} {
		stream, err := client.FullDuplexCall(ctx)
		require.NoError(t, err)
		_, err = stream.Header()
		require.NoError(t, err)
		streams[name] = stream
	}
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err := streams["key"].Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	require.NoError(t, streams["no key"].Send(&testpb.StreamingOutputCallRequest{}))
	_, err = streams["no key"].Recv()
	require.NoError(t, err)
}

// With RequireTLS, an Optional method refuses plaintext even without a credential. Otherwise a host
// on the way could remove a credential unnoticed.
func TestOptionalWithRequireTLS(t *testing.T) {
	store := openStore(t)
	opts := newAuth(t, store, interceptor.Optional(emptyCall, duplex),
		interceptor.RequireTLS()).ServerOptions()
	for _, err := range both(t.Context(), dial(t, serve(t, &service{duplex: end}, opts...))) {
		requireRefused(t, err, codes.Unauthenticated, "INSECURE_TRANSPORT")
	}
	for _, err := range both(t.Context(), dialHTTP(t, &service{duplex: end}, opts...)) {
		require.NoError(t, err)
	}
}

// Interceptors that are installed twice refuse valid keys. The error of the client names the
// reason.
func TestTwoAuthenticators(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store)
	twice := append(auth.ServerOptions(), auth.ServerOptions()...)
	conn := dial(t, serve(t, &service{duplex: end}, twice...))
	for _, err := range both(withKey(t.Context(), token), conn) {
		requireRefused(t, err, codes.Internal, "AUTHENTICATED_TWICE")
		require.Contains(t, status.Convert(err).Message(), "ServerOptions")
	}
	for _, err := range both(t.Context(), conn) {
		requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
	}
	require.Zero(t, store.Stats().Live)

	other := newAuth(t, store, interceptor.Header("x-api-key", ""))
	conn = dial(t,
		serve(t, &service{duplex: end}, append(auth.ServerOptions(), other.ServerOptions()...)...))
	for _, err := range both(
		metadata.AppendToOutgoingContext(withKey(t.Context(), token), "x-api-key", token), conn,
	) {
		require.NoError(t, err, "two Authenticators with a header each are two keys")
	}
}

func TestCheck(t *testing.T) {
	store := openStore(t)
	server := func(opts ...grpc.ServerOption) *grpc.Server {
		s := grpc.NewServer(opts...)
		testpb.RegisterTestServiceServer(s, &service{})
		healthpb.RegisterHealthServer(s, health.NewServer())
		return s
	}
	openToAll := interceptor.Public("/grpc.health.v1.Health/*")

	t.Run("methods without a rule", func(t *testing.T) {
		auth := newAuth(t, store, interceptor.RequireRules(), openToAll,
			interceptor.AnyKey(emptyCall),
			interceptor.Optional(halfDuplex), interceptor.Require(duplex, "a"))
		err := auth.Check(server(auth.ServerOptions()...))
		require.EqualError(t, err,
			"interceptor: RequireRules refuses every call of these methods, which have no rule: "+
				"/grpc.testing.TestService/CacheableUnaryCall, "+
				"/grpc.testing.TestService/StreamingInputCall, "+
				"/grpc.testing.TestService/StreamingOutputCall, "+
				"/grpc.testing.TestService/UnaryCall, "+
				"/grpc.testing.TestService/UnimplementedCall: give each method a rule, such as "+
				"Public, Require or AnyKey")
		auth = newAuth(t, store, interceptor.RequireRules(), openToAll,
			interceptor.AnyKey("/grpc.testing.TestService/*"))
		require.NoError(t, auth.Check(server(auth.ServerOptions()...)))
	})
	t.Run("only unary calls guarded", func(t *testing.T) {
		auth := newAuth(t, store, openToAll, interceptor.Public(duplex))
		err := auth.Check(server(grpc.UnaryInterceptor(auth.Unary())))
		require.ErrorContains(t, err, "the interceptor of Stream is not in use")
		require.ErrorContains(t, err, halfDuplex)
		require.NotContains(t, err.Error(), duplex, "it is public")
		require.NotContains(t, err.Error(), "Unary is not")
		require.NotContains(t, err.Error(), "Health")
	})
	t.Run("only streams guarded", func(t *testing.T) {
		auth := newAuth(t, store, openToAll)
		err := auth.Check(server(grpc.StreamInterceptor(auth.Stream())))
		require.ErrorContains(t, err, "the interceptor of Unary is not in use")
		require.ErrorContains(t, err, emptyCall)
		require.NotContains(t, err.Error(), duplex)
	})
	t.Run("nothing guarded", func(t *testing.T) {
		err := newAuth(t, store).Check(server())
		require.ErrorContains(t, err, "Unary is not in use")
		require.ErrorContains(t, err, "Stream is not in use")
	})
	t.Run("only unary calls guarded, and there are no others", func(t *testing.T) {
		auth := newAuth(t, store)
		s := grpc.NewServer(grpc.UnaryInterceptor(auth.Unary()))
		s.RegisterService(
			&grpc.ServiceDesc{ServiceName: "a.B", Methods: []grpc.MethodDesc{{MethodName: "C"}}},
			nil)
		require.NoError(t, auth.Check(s))
	})
	t.Run("a proxy", func(t *testing.T) {
		auth := newAuth(t, store, openToAll, interceptor.Require("/far.Away/Get", "a"),
			interceptor.AnyKey("/far.Off/*"))
		proxy := server(
			append(auth.ServerOptions(),
				grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil }))...)
		require.ErrorContains(t, auth.Check(proxy), "/far.Away/Get, /far.Off/*")
		require.ErrorContains(t, auth.Check(proxy, "/far.Away/*"), "/far.Off/*")
		require.NotContains(t, auth.Check(proxy, "/far.Away/*").Error(), "/far.Away")
		require.NoError(t, auth.Check(proxy, "/far.Away/*", "/far.Off/*"))
		require.NoError(t, auth.Check(proxy, "/far.Away/Get", "/far.Off/Get"))
		require.ErrorContains(t, auth.Check(proxy, "/far.Away/Put", "/far.Off/Get"),
			"/far.Away/Get", "a method that is not passed on")
		require.ErrorContains(t, auth.Check(proxy, "far.Away"), "neither a full method name")

		strict := newAuth(t, store, interceptor.RequireRules(), openToAll,
			interceptor.AnyKey("/grpc.testing.TestService/*"))
		proxy = server(strict.ServerOptions()...)
		require.ErrorContains(t, strict.Check(proxy, "/far.Away/Get"), "/far.Away/Get")
		unary := newAuth(t, store, openToAll)
		require.ErrorContains(t,
			unary.Check(grpc.NewServer(grpc.UnaryInterceptor(unary.Unary())), "/far.Away/*"),
			"/far.Away/*",
			"what is passed on is a stream to gRPC")
	})
}
