package interceptor_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/bits"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
	"github.com/grpc-api-key/grpc-api-key/internal/throwaway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	emptyCall = "/grpc.testing.TestService/EmptyCall"
	duplex    = "/grpc.testing.TestService/FullDuplexCall"
)

// openStore returns a store in a directory of its own. On a 32-bit system, where no directory can
// be opened, the store is in memory.
func openStore(t testing.TB) *keystore.Store {
	t.Helper()
	s, err := keystore.Open(t.TempDir(), nil)
	if bits.UintSize < 64 {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		s, err = keystore.New(backendtest.NewMemory(), nil)
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func issue(t testing.TB, s *keystore.Store, spec keystore.Spec) (*keystore.Key, string) {
	t.Helper()
	if spec.Name == "" {
		spec.Name = "test"
	}
	issued, err := s.Create(t.Context(), spec)
	require.NoError(t, err)
	return issued.Key, issued.Secret.Reveal()
}

// A service is a TestService whose methods a test defines.
type service struct {
	testpb.UnimplementedTestServiceServer
	empty  func(ctx context.Context) error
	duplex func(s testpb.TestService_FullDuplexCallServer) error
}

func (s *service) EmptyCall(ctx context.Context, _ *testpb.Empty) (*testpb.Empty, error) {
	if s.empty != nil {
		if err := s.empty(ctx); err != nil {
			return nil, err
		}
	}
	return &testpb.Empty{}, nil
}

func (s *service) FullDuplexCall(stream testpb.TestService_FullDuplexCallServer) error {
	return s.duplex(stream)
}

// serve runs a server with the service on a real socket until the test ends.
func serve(t testing.TB, svc *service, opts ...grpc.ServerOption) (addr string) {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return serveOn(t, lis, svc, opts...)
}

func serveOn(t testing.TB, lis net.Listener, svc *service, opts ...grpc.ServerOption) string {
	server := grpc.NewServer(append(opts, grpc.WaitForHandlers(true))...)
	testpb.RegisterTestServiceServer(server, svc)
	healthpb.RegisterHealthServer(server, health.NewServer())
	done := make(chan error, 1)
	go func() { done <- server.Serve(lis) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-done)
	})
	return lis.Addr().String()
}

func dial(t testing.TB, addr string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	if len(opts) == 0 {
		opts = append(opts, grpc.WithTransportCredentials(insecure.NewCredentials()))
	}
	conn, err := grpc.NewClient(addr, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func newAuth(
	t testing.TB, v interceptor.Verifier, opts ...interceptor.Option,
) *interceptor.Authenticator {
	t.Helper()
	a, err := interceptor.New(v, opts...)
	require.NoError(t, err)
	return a
}

// withKey returns the context of a call that sends the token.
func withKey(ctx context.Context, token string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

// direct makes a unary call without a server. The incoming metadata are in ctx, and the handler
// does nothing.
func direct(ctx context.Context, a *interceptor.Authenticator, method string) error {
	_, err := a.Unary()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: method},
		func(context.Context, any) (any, error) {
			return nil, nil
		})
	return err
}

func reasonOf(err error) string {
	var reasons []string
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			reasons = append(reasons, info.Reason)
		}
	}
	return strings.Join(reasons, ",")
}

func requireRefused(t testing.TB, err error, code codes.Code, reason string) {
	t.Helper()
	require.Equal(t, code.String(), status.Code(err).String(), "%v", err)
	require.Equal(t, reason, reasonOf(err))
}

// both makes a call as a unary call and as a stream, and returns the errors.
func both(ctx context.Context, conn *grpc.ClientConn) map[string]error {
	client := testpb.NewTestServiceClient(conn)
	_, unary := client.EmptyCall(ctx, &testpb.Empty{})
	stream, err := client.FullDuplexCall(ctx)
	if err == nil {
		_ = stream.CloseSend()
		if _, err = stream.Recv(); err != nil && err.Error() == "EOF" {
			err = nil
		}
	}
	return map[string]error{"unary": unary, "stream": err}
}

func end(testpb.TestService_FullDuplexCallServer) error {
	return nil
}

func TestCredentials(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	_, other := issue(t, openStore(t), keystore.Spec{})
	revoked, revokedToken := issue(t, store, keystore.Spec{})
	require.NoError(t, store.Revoke(t.Context(), revoked.ID, ""))
	changed := []byte(token)
	changed[40] ^= 1

	svc := &service{duplex: end}
	addr := serve(t, svc, newAuth(t, store).ServerOptions()...)
	conn := dial(t, addr)

	for _, tt := range []struct {
		name   string
		md     []string
		code   codes.Code
		reason string
	}{
		{"none", nil, codes.Unauthenticated, "CREDENTIALS_MISSING"},
		{"the right one", []string{"authorization", "Bearer " + token}, codes.OK, ""},
		{"lower case", []string{"authorization", "bearer " + token}, codes.OK, ""},
		{"upper case", []string{"Authorization", "BEARER " + token}, codes.OK, ""},
		{"more spaces", []string{"authorization", "Bearer   " + token + " "}, codes.OK, ""},
		{"empty", []string{"authorization", ""}, codes.Unauthenticated, "CREDENTIALS_MISSING"},
		{"blank", []string{"authorization", "   "}, codes.Unauthenticated, "CREDENTIALS_MISSING"},
		{
			"only the scheme", []string{"authorization", "Bearer"}, codes.Unauthenticated,
			"CREDENTIALS_MISSING",
		},
		{
			"the scheme and a space", []string{"authorization", "Bearer "}, codes.Unauthenticated,
			"CREDENTIALS_MISSING",
		},
		{
			"no scheme", []string{"authorization", token}, codes.Unauthenticated,
			"CREDENTIALS_SCHEME_MISSING",
		},
		{
			"another scheme", []string{"authorization", "Basic " + token}, codes.Unauthenticated,
			"CREDENTIALS_SCHEME_INVALID",
		},
		{
			"a longer scheme", []string{"authorization", "Bearers " + token}, codes.Unauthenticated,
			"CREDENTIALS_SCHEME_INVALID",
		},
		{
			"the scheme run into the key", []string{"authorization", "Bearer" + token},
			codes.Unauthenticated, "CREDENTIALS_SCHEME_MISSING",
		},
		{
			"twice the scheme", []string{"authorization", "Bearer Bearer " + token},
			codes.Unauthenticated, "API_KEY_INVALID",
		},
		{
			"doubled",
			[]string{"authorization", "Bearer " + token, "authorization", "Bearer " + token},
			codes.Unauthenticated, "CREDENTIALS_SEVERAL",
		},
		{
			"a second one that is empty",
			[]string{"authorization", "Bearer " + token, "authorization", ""},
			codes.Unauthenticated, "CREDENTIALS_SEVERAL",
		},
		{
			"two in one", []string{"authorization", "Bearer " + token + ", Bearer " + token},
			codes.Unauthenticated, "API_KEY_INVALID",
		},
		{
			"two in one, bare", []string{"authorization", "Bearer " + token + "," + token},
			codes.Unauthenticated, "API_KEY_INVALID",
		},
		{
			"over-long", []string{"authorization", "Bearer " + token + strings.Repeat("x", 512)},
			codes.Unauthenticated, "API_KEY_INVALID",
		},
		{
			"very long", []string{"authorization", "Bearer " + strings.Repeat("x", 100<<10)},
			codes.Unauthenticated, "API_KEY_INVALID",
		},
		{
			"another header", []string{"x-api-key", token}, codes.Unauthenticated,
			"CREDENTIALS_MISSING",
		},
		{
			"a binary header", []string{"authorization-bin", "Bearer " + token},
			codes.Unauthenticated, "CREDENTIALS_MISSING",
		},
		{
			"of another store", []string{"authorization", "Bearer " + other}, codes.Unauthenticated,
			"API_KEY_INVALID",
		},
		{
			"revoked", []string{"authorization", "Bearer " + revokedToken}, codes.Unauthenticated,
			"API_KEY_INVALID",
		},
		{
			"one bit changed", []string{"authorization", "Bearer " + string(changed)},
			codes.Unauthenticated, "API_KEY_INVALID",
		},
		{
			"truncated", []string{"authorization", "Bearer " + token[:50]}, codes.Unauthenticated,
			"API_KEY_INVALID",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			admitted := 0
			svc.empty = func(ctx context.Context) error {
				admitted++
				got, ok := interceptor.FromContext(ctx)
				assert.True(t, ok)
				assert.Equal(t, key.ID, got.ID)
				return nil
			}
			ctx := metadata.AppendToOutgoingContext(t.Context(), tt.md...)
			for kind, err := range both(ctx, conn) {
				requireRefused(t, err, tt.code, tt.reason)
				if tt.reason == "API_KEY_INVALID" {
					require.Equal(t, "invalid API key", status.Convert(err).Message(),
						"one text for all: %s", kind)
				}
				if err != nil {
					require.False(t, strings.Contains(err.Error(), token[40:60]),
						"the credential is in the error")
				}
			}
			require.Equal(t, tt.code == codes.OK, admitted == 1)
		})
	}
}

// The client of grpc-go refuses to send text that is not printable ASCII. So the test calls the
// interceptor directly.
func TestCredentialsThatGRPCWouldNotSend(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	unary := newAuth(t, store).Unary()
	for value, reason := range map[string]string{
		"Bearer " + token + "é":  "API_KEY_INVALID",
		"Bearer \x00" + token:    "API_KEY_INVALID",
		"Bearer " + token + "\n": "API_KEY_INVALID",
		"\xff\xfe":               "CREDENTIALS_SCHEME_MISSING",
		"Bearer\u00a0" + token:   "CREDENTIALS_SCHEME_MISSING",
		"Bearer\t" + token:       "CREDENTIALS_SCHEME_INVALID",
	} {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", value))
		_, err := unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: emptyCall},
			func(context.Context, any) (any, error) {
				require.Fail(t, "let in")
				return nil, nil
			})
		requireRefused(t, err, codes.Unauthenticated, reason)
	}
}

// A mistake in the syntax of a credential has its own text, with the right header, and without the
// credential.
func TestSyntaxMistakesHaveStatuses(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	bearer, bare := newAuth(t, store),
		newAuth(t, store, interceptor.Header("x-api-key", ""),
			interceptor.Header("authorization", "Bearer"))
	for _, c := range []struct {
		auth         *interceptor.Authenticator
		md           []string
		reason, text string
	}{
		{
			bearer, nil, "CREDENTIALS_MISSING",
			"the call has no API key: send it as metadata, authorization: Bearer <key>",
		},
		{bearer, []string{"authorization", token}, "CREDENTIALS_SCHEME_MISSING",
			"the API key has no scheme before it: " +
				"send it as metadata, authorization: Bearer <key>"},
		{bearer, []string{"authorization", "Token " + token}, "CREDENTIALS_SCHEME_INVALID",
			"the API key has a scheme that this server does not accept: send it as metadata, " +
				"authorization: Bearer <key>"},
		{bare, []string{"x-api-key", "Bearer " + token}, "CREDENTIALS_SCHEME_INVALID",
			"the API key has a scheme that this server does not accept: send it as metadata, " +
				"x-api-key: <key>"},
		{bare, []string{"x-api-key", token, "authorization", "Bearer " + token},
			"CREDENTIALS_SEVERAL",
			"the call carries several credentials: send one (gRPC sends the credentials of a " +
				"call in addition to those of the connection)"},
	} {
		err := direct(metadata.NewIncomingContext(t.Context(), metadata.Pairs(c.md...)), c.auth,
			emptyCall)
		requireRefused(t, err, codes.Unauthenticated, c.reason)
		require.Equal(t, c.text, status.Convert(err).Message())
		require.False(t, strings.Contains(fmt.Sprint(status.Convert(err).Details()), token[10:]),
			"the credential is in the details")
	}
}

func TestHeaders(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	svc := &service{duplex: end}
	addr := serve(t, svc, newAuth(t, store,
		interceptor.Header("X-API-Key", ""), interceptor.Header("authorization", "Bearer"),
		interceptor.Header("authorization", "ApiKey"),
	).ServerOptions()...)
	conn := dial(t, addr)
	for name, tt := range map[string]struct {
		md     []string
		reason string
	}{
		"bare":           {[]string{"x-api-key", token}, ""},
		"bearer":         {[]string{"authorization", "Bearer " + token}, ""},
		"another scheme": {[]string{"authorization", "apikey " + token}, ""},
		"a scheme in the bare": {[]string{"x-api-key", "Bearer " + token},
			"CREDENTIALS_SCHEME_INVALID"},
		"none in the other": {[]string{"authorization", token}, "CREDENTIALS_SCHEME_MISSING"},
		"one in each": {[]string{"authorization", "Bearer " + token, "x-api-key", token},
			"CREDENTIALS_SEVERAL"},
		"a good and a bad one": {[]string{"authorization", "Basic eDp5", "x-api-key", token},
			"CREDENTIALS_SEVERAL"},
		"a good and a blank one": {[]string{"authorization", " ", "x-api-key", token},
			"CREDENTIALS_SEVERAL"},
		"none": {nil, "CREDENTIALS_MISSING"},
	} {
		t.Run(name, func(t *testing.T) {
			svc.empty = func(ctx context.Context) error {
				md, _ := metadata.FromIncomingContext(ctx)
				assert.Empty(t, md.Get("x-api-key"))
				assert.Empty(t, md.Get("authorization"))
				return nil
			}
			for _, err := range both(
				metadata.AppendToOutgoingContext(t.Context(), tt.md...), conn,
			) {
				require.Equal(t, tt.reason, reasonOf(err), "%v", err)
			}
		})
	}
}

func TestCredentialIsStripped(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	look := func(ctx context.Context) error {
		md, ok := metadata.FromIncomingContext(ctx)
		assert.True(t, ok)
		assert.Empty(t, md.Get("authorization"))
		assert.Empty(t, md.Get("grpcgateway-authorization"), "the copy that grpc-gateway makes")
		assert.Equal(t, []string{"b"}, md.Get("grpcgateway-accept"))
		assert.Equal(t, []string{"1", "2"}, md.Get("x-other"), "the rest is there")
		assert.Equal(t, []string{"1", "2"}, metadata.ValueFromIncomingContext(ctx, "X-Other"))
		assert.Empty(t, metadata.ValueFromIncomingContext(ctx, "authorization"))
		derived, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		for _, text := range []string{
			fmt.Sprint(ctx), fmt.Sprintf("%+v", ctx), fmt.Sprintf("%#v", ctx), fmt.Sprint(derived),
			fmt.Sprintf("%v", md),
		} {
			assert.False(t, strings.Contains(text, token), "the credential can be printed")
		}
		md.Set("x-other", "changed") // the handler's own copy
		assert.Equal(t, []string{"1", "2"}, metadata.ValueFromIncomingContext(ctx, "x-other"))
		return nil
	}
	svc := &service{empty: look, duplex: func(s testpb.TestService_FullDuplexCallServer) error {
		return look(s.Context())
	}}
	for _, auth := range []*interceptor.Authenticator{
		newAuth(t, store),
		// not even in methods that need no key
		newAuth(t, store, interceptor.Public(emptyCall, duplex)),
	} {
		conn := dial(t, serve(t, svc, auth.ServerOptions()...))
		ctx := metadata.AppendToOutgoingContext(withKey(t.Context(), token), "x-other", "1",
			"x-other", "2",
			"grpcgateway-authorization", "Bearer "+token, "grpcgateway-accept", "b")
		for kind, err := range both(ctx, conn) {
			require.NoError(t, err, kind)
		}
	}
}

// The transports of gRPC convert header names to lower case. Other transports may not.
func TestCredentialIsStrippedInAnyCase(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	ctx := metadata.NewIncomingContext(t.Context(), metadata.MD{
		"Authorization": {"Bearer " + token}, "Grpcgateway-Authorization": {"Bearer " + token},
		"Other": {"1"},
	})
	_, err := newAuth(t, store).Unary()(ctx, nil, &grpc.UnaryServerInfo{FullMethod: emptyCall},
		func(ctx context.Context, _ any) (any, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			require.Equal(t, metadata.MD{"other": {"1"}}, md)
			return nil, nil
		})
	require.NoError(t, err)
}

func TestPublicRequireAndCheck(t *testing.T) {
	store := openStore(t)
	_, plain := issue(t, store, keystore.Spec{})
	_, reader := issue(t, store, keystore.Spec{Scopes: []string{"read", "x"}})
	_, writer := issue(t, store, keystore.Spec{Scopes: []string{"read", "write"}})
	auth := newAuth(t, store, interceptor.Public("/grpc.health.v1.Health/*"),
		interceptor.Require(emptyCall, "read", "write"))
	svc := &service{duplex: end, empty: func(context.Context) error { return nil }}
	addr := serve(t, svc, auth.ServerOptions()...)
	conn := dial(t, addr)
	client := testpb.NewTestServiceClient(conn)

	_, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	require.NoError(t, err, "public, without a key")
	_, err = healthpb.NewHealthClient(conn).Check(withKey(t.Context(), "nonsense"),
		&healthpb.HealthCheckRequest{})
	require.NoError(t, err, "public, with a bad key")

	_, err = client.EmptyCall(withKey(t.Context(), writer), &testpb.Empty{})
	require.NoError(t, err)
	for _, token := range []string{plain, reader} {
		_, err = client.EmptyCall(withKey(t.Context(), token), &testpb.Empty{})
		requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
	}
	require.Equal(t, "read write",
		status.Convert(err).Details()[0].(*errdetails.ErrorInfo).Metadata["scopes"])
	_, err = client.EmptyCall(withKey(t.Context(), plain+"x"), &testpb.Empty{})
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_INVALID")
	stream, err := client.FullDuplexCall(withKey(t.Context(), plain))
	require.NoError(t, err)
	_, err = stream.Recv()
	require.Equal(t, "EOF", err.Error(), "any key will do")

	server := grpc.NewServer()
	require.ErrorContains(t, auth.Check(server), "/grpc.health.v1.Health/*, "+emptyCall)
	testpb.RegisterTestServiceServer(server, svc)
	require.ErrorContains(t, auth.Check(server), "/grpc.health.v1.Health/*")
	require.NotContains(t, auth.Check(server).Error(), emptyCall)
	healthpb.RegisterHealthServer(server, health.NewServer())
	require.NoError(t, auth.Check(server))
}

// A stream whose key lacks a scope is refused, and the store retains no context.
func TestRequireOnStream(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	conn := dial(t,
		serve(t, &service{duplex: end},
			newAuth(t, store, interceptor.Require(duplex, "admin")).ServerOptions()...))
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	_, err = stream.Recv()
	requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
	require.Zero(t, store.Stats().Live)
}

// A method that the server does not have needs a key too, if interceptors run for it.
func TestUnknownMethodsNeedAKey(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store, interceptor.Public("/grpc.health.v1.Health/*"))
	unknown := grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil })
	conn := dial(t, serve(t, &service{}, append(auth.ServerOptions(), unknown)...))
	for _, method := range []string{
		"/no.Service/Method", "/grpc.health.v1.health/Check", "/grpc.health.v1.Health/Check/",
		"/grpc.health.v1.Health//Check", "//grpc.health.v1.Health/Check",
	} {
		err := conn.Invoke(t.Context(), method, &testpb.Empty{}, &testpb.Empty{})
		requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
	}
	stream, err := conn.NewStream(withKey(t.Context(), token),
		&grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/no.Service/Method")
	require.NoError(t, err)
	require.Equal(t, "EOF", stream.RecvMsg(&testpb.Empty{}).Error())
}

// A service may be registered under another name than in its generated code. Rules apply to the
// name that clients call.
func TestRulesOfAServiceUnderAnotherName(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	const call, public = "/v2.TestService/EmptyCall", "/v2.TestService/UnaryCall"
	auth := newAuth(t, store, interceptor.Require(call, "admin"),
		interceptor.Public(public, emptyCall))
	desc := testpb.TestService_ServiceDesc
	desc.ServiceName = "v2.TestService"
	server := grpc.NewServer(auth.ServerOptions()...)
	server.RegisterService(&desc, &service{})
	testpb.RegisterTestServiceServer(server, &service{})
	require.NoError(t, auth.Check(server))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go func() { _ = server.Serve(lis) }()
	t.Cleanup(server.Stop)
	conn := dial(t, lis.Addr().String())

	err = conn.Invoke(withKey(t.Context(), token), call, &testpb.Empty{}, &testpb.Empty{})
	requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
	err = conn.Invoke(t.Context(), call, &testpb.Empty{}, &testpb.Empty{})
	requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
	err = conn.Invoke(t.Context(), public, &testpb.SimpleRequest{}, &testpb.SimpleResponse{})
	require.Equal(t, codes.Unimplemented, status.Code(err), "it was let in: %v", err)
	require.NoError(t, conn.Invoke(t.Context(), emptyCall, &testpb.Empty{}, &testpb.Empty{}))
}

func TestNewRefuses(t *testing.T) {
	store := openStore(t)
	for name, opts := range map[string][]interceptor.Option{
		"an empty header":       {interceptor.Header("", "Bearer")},
		"a binary header":       {interceptor.Header("x-key-bin", "")},
		"gRPC's own header":     {interceptor.Header("grpc-timeout", "")},
		"HTTP's own header":     {interceptor.Header("Content-Type", "")},
		"a pseudo header":       {interceptor.Header(":path", "")},
		"a header with a space": {interceptor.Header("x key", "")},
		"a scheme with a space": {interceptor.Header("authorization", "Bea rer")},
		"a header twice": {interceptor.Header("authorization", "Bearer"),
			interceptor.Header("Authorization", "bearer")},
		"a method without a slash": {interceptor.Public("grpc.health.v1.Health/Check")},
		"a method with one slash":  {interceptor.Public("/Check")},
		"a method with three":      {interceptor.Public("/a/b/c")},
		"a star for everything":    {interceptor.Public("/*")},
		"an empty method":          {interceptor.Public("")},
		"public and required": {interceptor.Public(emptyCall),
			interceptor.Require(emptyCall, "a")},
		"required twice": {interceptor.Require(emptyCall, "a"),
			interceptor.Require(emptyCall, "b")},
		"required without a scope":  {interceptor.Require(emptyCall)},
		"required, an empty scope":  {interceptor.Require(emptyCall, "")},
		"required, a whole service": {interceptor.Require("/a.B/*", "a")},
		"a nil mapper":              {interceptor.MapErrors(nil)},
		"a nil extension":           {interceptor.RulesFrom((*dynamicExtension)(nil))},
		"a scope with a space":      {interceptor.Require(emptyCall, "a b")},
		"a scope with a line break": {interceptor.Require(emptyCall, "a", "read\n")},
		"a scope that is not ASCII": {interceptor.RequireAny(emptyCall, "löschen")},
		"a scope with an inner '*'": {interceptor.RequireAny(emptyCall, "or*ders")},
		"a scope of a broken '*'":   {interceptor.Require(emptyCall, "orders*")},
		"a scope too long":          {interceptor.Require(emptyCall, strings.Repeat("a", 129))},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := interceptor.New(store, opts...)
			require.ErrorContains(t, err, "interceptor: ")
		})
	}
	for _, v := range []interceptor.Verifier{
		nil, (*keystore.Store)(nil), verifierMap(nil), verifierFunc(nil),
	} {
		_, err := interceptor.New(v)
		require.ErrorContains(t, err, "the verifier is nil", "%T", v)
	}
	_, err := interceptor.New(store, interceptor.Option{},
		interceptor.Require(emptyCall, "orders:*", "*", strings.Repeat("a", 128)))
	require.NoError(t, err)
}

type (
	dynamicExtension struct{ protoreflect.ExtensionType }
	verifierMap      map[string]verifier
	verifierFunc     func() verifier
)

func (verifierMap) Verify(context.Context, string) (*keystore.Key, error) { return nil, nil }

func (verifierMap) Bind(context.Context, string) (*keystore.Session, error) {
	return nil, nil
}

func (verifierFunc) Verify(context.Context, string) (*keystore.Key, error) { return nil, nil }

func (verifierFunc) Bind(context.Context, string) (*keystore.Session, error) {
	return nil, nil
}

// A verifier returns the results that a test sets.
type verifier struct{ err error }

func (v verifier) Verify(context.Context, string) (*keystore.Key, error) { return nil, v.err }

func (v verifier) Bind(context.Context, string) (*keystore.Session, error) {
	return nil, v.err
}

func TestStoreFailureIsNotTheCallersFault(t *testing.T) {
	for _, err := range []error{
		keystore.ErrUnavailable, keystore.ErrClosed, keystore.ErrCorrupt, keystore.ErrNotFound,
		errors.New("anything"),
		context.DeadlineExceeded, // the store's own, not the caller's
	} {
		conn := dial(t,
			serve(t, &service{duplex: end},
				newAuth(t,
					verifier{fmt.Errorf("disk on fire at /var/lib: %w", err)}).ServerOptions()...))
		for _, got := range both(withKey(t.Context(), "k"), conn) {
			requireRefused(t, got, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE")
			require.NotContains(t, got.Error(), "disk", "what went wrong is not for callers")
			var retry *errdetails.RetryInfo
			for _, d := range status.Convert(got).Details() {
				if r, ok := d.(*errdetails.RetryInfo); ok {
					retry = r
				}
			}
			require.Positive(t, retry.GetRetryDelay().AsDuration())
		}
	}
}

// slow waits until the client cancels the call.
type slow struct{ verifier }

func (slow) Verify(ctx context.Context, _ string) (*keystore.Key, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

func TestCallersOwnDeadline(t *testing.T) {
	unary := newAuth(t, slow{}).Unary()
	incoming := metadata.NewIncomingContext(t.Context(),
		metadata.Pairs("authorization", "Bearer k"))
	call := func(ctx context.Context) error {
		_, err := unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: emptyCall}, nil)
		return err
	}
	ctx, cancel := context.WithTimeout(incoming, time.Millisecond)
	defer cancel()
	requireRefused(t, call(ctx), codes.DeadlineExceeded, "")
	ctx, cancel = context.WithCancel(incoming)
	cancel()
	requireRefused(t, call(ctx), codes.Canceled, "")
}

func TestErrorMapper(t *testing.T) {
	store := openStore(t)
	var heard []error
	auth := newAuth(t, store,
		interceptor.MapErrors(func(
			_ context.Context, method string, err error, byDefault *status.Status,
		) *status.Status {
			require.Equal(t, emptyCall, method)
			heard = append(heard, err)
			switch {
			case errors.Is(err, keystore.ErrMalformed):
				return status.New(codes.PermissionDenied, "mapped")
			case errors.Is(err, keystore.ErrDenied):
				return status.New(codes.OK, "come in")
			default:
				return nil
			}
		}))
	unary := auth.Unary()
	call := func(credential ...string) error {
		ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs(credential...))
		_, err := unary(ctx, nil, &grpc.UnaryServerInfo{FullMethod: emptyCall},
			func(context.Context, any) (any, error) {
				require.Fail(t, "let in")
				return nil, nil
			})
		return err
	}
	_, unknown := issue(t, openStore(t), keystore.Spec{})
	require.Equal(t, "mapped", status.Convert(call("authorization", "Bearer nonsense")).Message())
	requireRefused(t, call("authorization", "Bearer "+unknown), codes.Unauthenticated,
		"API_KEY_INVALID")
	requireRefused(t, call(), codes.Unauthenticated, "CREDENTIALS_MISSING")
	require.Len(t, heard, 3)
	require.ErrorIs(t, heard[1], keystore.ErrUnknown)
}

// An ErrorMapper that logs all its arguments logs no credential, even of a valid key.
func TestErrorMapperDoesNotSeeTheCredential(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{Scopes: []string{"stream"}})
	var asked atomic.Int64
	mapper := func(
		ctx context.Context, _ string, _ error, byDefault *status.Status,
	) *status.Status {
		asked.Add(1)
		md, ok := metadata.FromIncomingContext(ctx)
		if !ok || len(md.Get("authorization")) > 0 || strings.Contains(fmt.Sprint(ctx), token) {
			t.Error("the credential is there, or the rest is not")
		}
		return byDefault
	}
	opened := make(chan struct{})
	svc := &service{duplex: func(s duplexStream) error {
		close(opened)
		return handlers["blocked in Recv"](s)
	}}
	refuses := newAuth(t, store, interceptor.MapErrors(mapper), interceptor.Require(emptyCall, "a"),
		interceptor.Require(duplex, "a"))
	for _, err := range both(
		withKey(t.Context(), token), dial(t, serve(t, svc, refuses.ServerOptions()...)),
	) {
		requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
	}
	ending := newAuth(t, store, interceptor.MapErrors(mapper),
		interceptor.Require(duplex, "stream"))
	stream, err := testpb.NewTestServiceClient(
		dial(t, serve(t, svc, ending.ServerOptions()...)),
	).FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	<-opened
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	require.EqualValues(t, 3, asked.Load())
}

func TestRequireTLS(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	opts := newAuth(t, store, interceptor.RequireTLS()).ServerOptions()
	cert, pool := throwawayCertificate(t)
	serverTLS, clientTLS := credentials.NewTLS(cert), credentials.NewClientTLSFromCert(pool, "")

	t.Run("plaintext", func(t *testing.T) {
		conn := dial(t, serve(t, &service{duplex: end}, opts...),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithPerRPCCredentials(keycreds.New(token, keycreds.AllowInsecure())))
		for _, err := range both(t.Context(), conn) {
			requireRefused(t, err, codes.Unauthenticated, "INSECURE_TRANSPORT")
		}
	})
	t.Run("TLS", func(t *testing.T) {
		conn := dial(t, serve(t, &service{duplex: end}, append(opts, grpc.Creds(serverTLS))...),
			grpc.WithTransportCredentials(clientTLS),
			grpc.WithPerRPCCredentials(keycreds.New(token)))
		for _, err := range both(t.Context(), conn) {
			require.NoError(t, err)
		}
	})
	t.Run("a unix socket with local credentials", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		lis, err := net.Listen("unix", path)
		require.NoError(t, err)
		serveOn(t, lis, &service{duplex: end}, append(opts, grpc.Creds(local.NewCredentials()))...)
		conn := dial(t, "unix:"+path, grpc.WithTransportCredentials(local.NewCredentials()),
			grpc.WithPerRPCCredentials(keycreds.New(token)))
		for _, err := range both(t.Context(), conn) {
			require.NoError(t, err)
		}
	})
	t.Run("loopback with local credentials", func(t *testing.T) {
		conn := dial(t,
			serve(t, &service{duplex: end}, append(opts, grpc.Creds(local.NewCredentials()))...),
			grpc.WithTransportCredentials(local.NewCredentials()),
			grpc.WithPerRPCCredentials(keycreds.New(token, keycreds.AllowInsecure())))
		for _, err := range both(t.Context(), conn) {
			requireRefused(t, err, codes.Unauthenticated, "INSECURE_TRANSPORT")
		}
	})
}

// throwawayCertificate returns a certificate for 127.0.0.1.
func throwawayCertificate(t testing.TB) (*tls.Config, *x509.CertPool) {
	t.Helper()
	cert, pem, err := throwaway.Certificate()
	require.NoError(t, err)
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(pem))
	return &tls.Config{Certificates: []tls.Certificate{cert}}, pool
}

// gRPC sends the credentials of the connection and those of the call. New users often make this
// mistake.
func TestDialAndCallCredentialsTogetherAreRefused(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	creds := keycreds.New(token, keycreds.AllowInsecure())
	conn := dial(t, serve(t, &service{}, newAuth(t, store).ServerOptions()...),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithPerRPCCredentials(creds))
	client := testpb.NewTestServiceClient(conn)
	_, err := client.EmptyCall(t.Context(), &testpb.Empty{})
	require.NoError(t, err)
	_, err = client.EmptyCall(t.Context(), &testpb.Empty{}, grpc.PerRPCCredentials(creds))
	requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_SEVERAL")
}

func TestNewContext(t *testing.T) {
	k := &keystore.Key{ID: "id"}
	got, ok := interceptor.FromContext(interceptor.NewContext(t.Context(), k))
	require.True(t, ok)
	require.Same(t, k, got)
	for _, ctx := range []context.Context{t.Context(), interceptor.NewContext(t.Context(), nil)} {
		_, ok = interceptor.FromContext(ctx)
		require.False(t, ok)
	}
}
