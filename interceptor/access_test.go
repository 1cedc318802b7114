package interceptor_test

import (
	"context"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func networks(texts ...string) (ps []netip.Prefix) {
	for _, t := range texts {
		ps = append(ps, netip.MustParsePrefix(t))
	}
	return ps
}

// echo answers each message, and returns the error of Recv.
func echo(s duplexStream) error {
	for {
		if _, err := s.Recv(); err != nil {
			return err
		}
		if err := s.Send(payload(1)); err != nil {
			return err
		}
	}
}

func call(ctx context.Context, conn *grpc.ClientConn) error {
	_, err := testpb.NewTestServiceClient(conn).EmptyCall(ctx, &testpb.Empty{})
	return err
}

// exchange opens a stream, sends n messages, and waits for each answer. It returns the first error.
func exchange(ctx context.Context, conn *grpc.ClientConn, n int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := testpb.NewTestServiceClient(conn).FullDuplexCall(ctx)
	for ; err == nil && n > 0; n-- {
		_ = s.Send(&testpb.StreamingOutputCallRequest{}) // if Send fails, Recv returns the reason
		_, err = s.Recv()
	}
	return err
}

func retryAfter(t *testing.T, err error) time.Duration {
	t.Helper()
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			return r.RetryDelay.AsDuration()
		}
	}
	require.Fail(t, "no RetryInfo", "%v", err)
	return 0
}

func TestAllowedNetworks(t *testing.T) {
	store := openStore(t)
	_, local := issue(t, store, keystore.Spec{AllowedNetworks: networks("127.0.0.0/8")})
	_, remote := issue(t, store,
		keystore.Spec{AllowedNetworks: networks("192.0.2.0/24", "2001:db8::/32")})
	svc := &service{duplex: echo}

	conn := dial(t, serve(t, svc, newAuth(t, store).ServerOptions()...))
	ctx := t.Context()
	require.NoError(t, call(withKey(ctx, local), conn))
	require.NoError(t, exchange(withKey(ctx, local), conn, 1))
	requireRefused(t, call(withKey(ctx, remote), conn), codes.Unauthenticated, "API_KEY_INVALID")
	requireRefused(t, exchange(withKey(ctx, remote), conn, 1), codes.Unauthenticated,
		"API_KEY_INVALID")
	forged := metadata.AppendToOutgoingContext(withKey(ctx, remote), "x-forwarded-for", "192.0.2.1")
	requireRefused(t, call(forged, conn), codes.Unauthenticated, "API_KEY_INVALID")

	behind := dial(t,
		serve(t, svc,
			newAuth(t, store,
				interceptor.TrustProxy("X-Forwarded-For",
					networks("127.0.0.0/8")...)).ServerOptions()...))
	require.NoError(t, call(forged, behind), "a trusted proxy says so")
	require.NoError(t, exchange(forged, behind, 1))
	require.NoError(t,
		call(
			metadata.AppendToOutgoingContext(withKey(ctx, remote), "x-forwarded-for",
				"1.2.3.4, 2001:db8::9"), behind))
	requireRefused(t, call(withKey(ctx, remote), behind), codes.Unauthenticated, "API_KEY_INVALID")
	requireRefused(t, call(withKey(ctx, local), behind), codes.Unauthenticated, "API_KEY_INVALID")
	requireRefused(t,
		call(metadata.AppendToOutgoingContext(forged, "x-forwarded-for", "garbage"), behind),
		codes.Unauthenticated, "API_KEY_INVALID")

	elsewhere := dial(t,
		serve(t, svc,
			newAuth(t, store,
				interceptor.TrustProxy("x-forwarded-for",
					networks("10.0.0.0/8")...)).ServerOptions()...))
	requireRefused(t, call(forged, elsewhere), codes.Unauthenticated, "API_KEY_INVALID")

	socket := filepath.Join(t.TempDir(), "s")
	lis, err := net.Listen("unix", socket)
	require.NoError(t, err)
	addr := "unix:" + serveOn(t, lis, svc, newAuth(t, store).ServerOptions()...)
	requireRefused(t, call(withKey(ctx, local), dial(t, addr)), codes.Unauthenticated,
		"API_KEY_INVALID")
}

// A client may bind its end of a unix socket to a name that looks like an address. The name is not
// taken for an address.
func TestUnixSocketNamesAreNotAddresses(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{AllowedNetworks: networks("192.0.2.0/24")})
	auth := newAuth(t, store)
	for name, serve := range map[string]func(net.Listener){
		"Serve": func(lis net.Listener) {
			serveOn(t, lis, &service{}, auth.ServerOptions()...)
		},
		"ServeHTTP": func(lis net.Listener) {
			serveHTTPOn(t, lis, nil, &service{}, auth.ServerOptions()...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Chdir(t.TempDir()) // the end of the client is created here
			socket := &net.UnixAddr{Name: "s", Net: "unix"}
			lis, err := net.ListenUnix("unix", socket)
			require.NoError(t, err)
			serve(lis)
			conn := dial(t, "passthrough:///s",
				grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
					return net.DialUnix("unix", &net.UnixAddr{Name: "192.0.2.1:80", Net: "unix"},
						socket)
				}))
			requireRefused(t, call(withKey(t.Context(), token), conn), codes.Unauthenticated,
				"API_KEY_INVALID")
		})
	}
}

func TestRateLimit(t *testing.T) {
	store := openStore(t)
	slow := keystore.RateLimit{PerSecond: 0.001, Burst: 3}
	svc := &service{duplex: echo}
	conn := dial(t, serve(t, svc, newAuth(t, store).ServerOptions()...))
	ctx := t.Context()

	_, token := issue(t, store, keystore.Spec{RateLimit: slow})
	require.NoError(t, call(withKey(ctx, token), conn))
	require.NoError(t, call(withKey(ctx, token), conn))
	require.NoError(t, exchange(withKey(ctx, token), conn, 20), "a stream is one use")
	for _, err := range []error{
		call(withKey(ctx, token), conn), exchange(withKey(ctx, token), conn, 1),
	} {
		requireRefused(t, err, codes.ResourceExhausted, "RATE_LIMIT_EXCEEDED")
		require.Greater(t, retryAfter(t, err), time.Minute)
	}
	_, free := issue(t, store, keystore.Spec{})
	require.NoError(t, call(withKey(ctx, free), conn), "each key has its own")
}

func TestLimitMessages(t *testing.T) {
	store := openStore(t)
	for name, opts := range map[string][]grpc.ServerOption{
		"grpc-go's transport": nil, "another": {hidden()},
	} {
		t.Run(name, func(t *testing.T) {
			swallows := func(s duplexStream) error { // ignores the error of Recv
				for range 20 {
					if _, err := s.Recv(); err == nil {
						_ = s.Send(payload(1))
					}
				}
				return nil
			}
			for _, handler := range []func(duplexStream) error{echo, swallows} {
				_, token := issue(t, store,
					keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 0.001, Burst: 4}})
				auth := newAuth(t, store, interceptor.LimitMessages())
				conn := dial(t,
					serve(t, &service{duplex: handler}, append(opts, auth.ServerOptions()...)...))
				ctx, cancel := context.WithTimeout(withKey(t.Context(), token), 30*time.Second)
				defer cancel()
				s, err := testpb.NewTestServiceClient(conn).FullDuplexCall(ctx)
				require.NoError(t, err)
				for range 3 { // the opening of the stream is the fourth use
					require.NoError(t, s.Send(&testpb.StreamingOutputCallRequest{}))
					_, err := s.Recv()
					require.NoError(t, err)
				}
				_ = s.Send(&testpb.StreamingOutputCallRequest{})
				_, err = s.Recv()
				requireRefused(t, err, codes.ResourceExhausted, "RATE_LIMIT_EXCEEDED")
				require.Greater(t, retryAfter(t, err), time.Minute)
			}
		})
	}
}

// An ErrorMapper is called once for a stream that exceeds its limit, with the reason.
func TestErrorMapperOfALimitedStream(t *testing.T) {
	store := openStore(t)
	for name, v := range map[string]interceptor.Verifier{
		"the store": store, "another Verifier": embedder{store},
	} {
		t.Run(name, func(t *testing.T) {
			_, token := issue(t, store,
				keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 0.001, Burst: 2}})
			var asked []error
			auth := newAuth(t, v, interceptor.LimitMessages(),
				interceptor.MapErrors(func(
					_ context.Context, _ string, err error, byDefault *status.Status,
				) *status.Status {
					asked = append(asked, err)
					return byDefault
				}))
			over := make(chan struct{})
			outer := grpc.ChainStreamInterceptor(func(
				srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
			) error {
				defer close(over)
				return next(srv, ss)
			})
			conn := dial(t,
				serve(t, &service{duplex: echo},
					append([]grpc.ServerOption{outer}, auth.ServerOptions()...)...))
			requireRefused(t, exchange(withKey(t.Context(), token), conn, 5),
				codes.ResourceExhausted, "RATE_LIMIT_EXCEEDED")
			<-over
			var limited *keystore.RateLimitError
			require.Len(t, asked, 1)
			require.ErrorAs(t, asked[0], &limited)
		})
	}
}

func TestLimitFailures(t *testing.T) {
	store := openStore(t)
	_, good := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store, interceptor.LimitFailures(0.001, 3),
		interceptor.TrustProxy("x-forwarded-for", networks("127.0.0.0/8")...))
	conn := dial(t, serve(t, &service{duplex: echo}, auth.ServerOptions()...))
	from := func(addr, token string) context.Context {
		return metadata.AppendToOutgoingContext(withKey(t.Context(), token), "x-forwarded-for",
			addr)
	}
	for range 10 {
		require.NoError(t, call(from("192.0.2.1", good), conn), "good keys are not counted")
	}
	for range 2 {
		requireRefused(t, call(from("192.0.2.1", "oil_nonsense"), conn), codes.Unauthenticated,
			"API_KEY_INVALID")
	}
	requireRefused(t,
		exchange(metadata.AppendToOutgoingContext(t.Context(), "x-forwarded-for", "192.0.2.1"),
			conn, 1), codes.Unauthenticated, "CREDENTIALS_MISSING")
	for _, token := range []string{"oil_nonsense", good} {
		err := call(from("192.0.2.1", token), conn)
		requireRefused(t, err, codes.ResourceExhausted, "AUTH_THROTTLED")
		require.Positive(t, retryAfter(t, err))
		requireRefused(t, exchange(from("192.0.2.1", token), conn, 1), codes.ResourceExhausted,
			"AUTH_THROTTLED")
	}
	require.NoError(t, call(from("192.0.2.2", good), conn),
		"the key is as good as ever from elsewhere")
}

func TestLimitFailuresCountsStreams(t *testing.T) {
	store := openStore(t)
	_, good := issue(t, store, keystore.Spec{})
	conn := dial(t,
		serve(t, &service{duplex: echo},
			newAuth(t, store, interceptor.LimitFailures(0.001, 2)).ServerOptions()...))
	require.NoError(t, exchange(withKey(t.Context(), good), conn, 1))
	for range 2 {
		requireRefused(t, exchange(withKey(t.Context(), "nonsense"), conn, 1),
			codes.Unauthenticated, "API_KEY_INVALID")
	}
	for _, err := range []error{
		exchange(withKey(t.Context(), good), conn, 1), call(withKey(t.Context(), good), conn),
	} {
		requireRefused(t, err, codes.ResourceExhausted, "AUTH_THROTTLED")
	}
}

func TestScopeRules(t *testing.T) {
	store := openStore(t)
	auth := newAuth(t, store,
		interceptor.Require(emptyCall, "orders:read", "orders:write"),
		interceptor.RequireAny(duplex, "admin", "stream:open"))
	conn := dial(t, serve(t, &service{duplex: echo}, auth.ServerOptions()...))
	for _, c := range []struct {
		scopes      []string
		all, anyOne bool
	}{
		{nil, false, false},
		{[]string{"orders:read"}, false, false},
		{[]string{"orders:write", "orders:read"}, true, false},
		{[]string{"orders:*"}, true, false},
		{[]string{"admin"}, false, true},
		{[]string{"stream:open", "orders"}, false, true},
		{[]string{"stream:*"}, false, true},
		{[]string{"*"}, true, true},
	} {
		_, token := issue(t, store, keystore.Spec{Scopes: c.scopes})
		expect := func(ok bool, err error) {
			t.Helper()
			if ok {
				require.NoError(t, err, "%q", c.scopes)
			} else {
				requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
			}
		}
		expect(c.all, call(withKey(t.Context(), token), conn))
		expect(c.anyOne, exchange(withKey(t.Context(), token), conn, 1))
	}
	for _, o := range []interceptor.Option{
		interceptor.RequireAny(duplex), interceptor.RequireAny(duplex, ""),
		interceptor.RequireAny("/grpc.testing.TestService/*", "a"),
	} {
		_, err := interceptor.New(store, o)
		require.ErrorContains(t, err, "RequireAny")
	}
	_, err := interceptor.New(store, interceptor.Require(duplex, "a"),
		interceptor.RequireAny(duplex, "b"))
	require.ErrorContains(t, err, "already has a rule")
}

// ruledTypes are the types that ruled has registered. A program can register types only once.
var ruledTypes []protoreflect.ExtensionType

// extension returns an extension of MethodOptions that is not registered.
func extension(
	t *testing.T, in *protoregistry.Files, name string, number int32,
	kind descriptorpb.FieldDescriptorProto_Type, repeated bool,
) protoreflect.ExtensionType {
	t.Helper()
	label := descriptorpb.FieldDescriptorProto_LABEL_OPTIONAL
	if repeated {
		label = descriptorpb.FieldDescriptorProto_LABEL_REPEATED
	}
	fd, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String(name + ".proto"), Package: proto.String("ruled"),
		Dependency: []string{"google/protobuf/descriptor.proto"},
		Extension: []*descriptorpb.FieldDescriptorProto{{
			Name: &name, Number: &number, Type: &kind, Label: &label,
			Extendee: proto.String(".google.protobuf.MethodOptions"),
		}},
	}, in)
	require.NoError(t, err)
	return dynamicpb.NewExtensionType(fd.Extensions().Get(0))
}

// ruled registers a service whose methods have options, as generated code does.
func ruled(t *testing.T) (scopes, one, public, number protoreflect.ExtensionType) {
	t.Helper()
	if ts := ruledTypes; ts != nil {
		return ts[0], ts[1], ts[2], ts[3]
	}
	types := []protoreflect.ExtensionType{
		extension(t, protoregistry.GlobalFiles, "scopes", 50001,
			descriptorpb.FieldDescriptorProto_TYPE_STRING, true),
		extension(t, protoregistry.GlobalFiles, "one", 50002,
			descriptorpb.FieldDescriptorProto_TYPE_STRING, false),
		extension(t, protoregistry.GlobalFiles, "public", 50003,
			descriptorpb.FieldDescriptorProto_TYPE_BOOL, false),
		extension(t, protoregistry.GlobalFiles, "number", 50004,
			descriptorpb.FieldDescriptorProto_TYPE_INT32, false),
	}
	method := func(name string,
		set func(*descriptorpb.MethodOptions)) *descriptorpb.MethodDescriptorProto {
		o := new(descriptorpb.MethodOptions)
		set(o)
		return &descriptorpb.MethodDescriptorProto{
			Name: &name, InputType: proto.String(".grpc.testing.Empty"),
			OutputType: proto.String(".grpc.testing.Empty"), Options: o,
		}
	}
	file := &descriptorpb.FileDescriptorProto{
		Name: proto.String("grpc_api_key/test/ruled.proto"), Package: proto.String("ruled"),
		Dependency: []string{"grpc/testing/empty.proto"},
		Service: []*descriptorpb.ServiceDescriptorProto{{Name: proto.String("Service"),
			Method: []*descriptorpb.MethodDescriptorProto{
				method("Both", func(o *descriptorpb.MethodOptions) {
					list := types[0].New().List()
					list.Append(protoreflect.ValueOfString("a"))
					list.Append(protoreflect.ValueOfString("b"))
					o.ProtoReflect().Set(types[0].TypeDescriptor(), protoreflect.ValueOfList(list))
				}),
				method("One", func(o *descriptorpb.MethodOptions) {
					proto.SetExtension(o, types[1], "a")
				}),
				method("Open", func(o *descriptorpb.MethodOptions) {
					proto.SetExtension(o, types[2], true)
				}),
				method("Closed", func(o *descriptorpb.MethodOptions) {
					proto.SetExtension(o, types[2], false)
				}),
				method("Named", func(o *descriptorpb.MethodOptions) {
					proto.SetExtension(o, types[2], true)
				}),
			}}},
	}
	// in generated code it is bytes, which are read by who may not know the extensions
	wire, err := proto.Marshal(file)
	require.NoError(t, err)
	file = new(descriptorpb.FileDescriptorProto)
	require.NoError(t, proto.Unmarshal(wire, file))
	require.NotEmpty(t, file.Service[0].Method[0].Options.ProtoReflect().GetUnknown())
	linked, err := protodesc.NewFile(file, protoregistry.GlobalFiles)
	require.NoError(t, err)
	require.NoError(t, protoregistry.GlobalFiles.RegisterFile(linked))
	ruledTypes = types
	return types[0], types[1], types[2], types[3]
}

func TestRulesFrom(t *testing.T) {
	scopes, one, public, number := ruled(t)
	store := openStore(t)
	_, err := interceptor.New(store, interceptor.RulesFrom(number))
	require.ErrorContains(t, err, "must be a string")
	another := extension(t, protoregistry.GlobalFiles, "another", 50003,
		descriptorpb.FieldDescriptorProto_TYPE_STRING, false)
	_, err = interceptor.New(store, interceptor.RulesFrom(another))
	require.ErrorContains(t, err,
		"the value of option 50003 does not have the type of ruled.another")
	copied, err := protodesc.NewFiles(
		&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
			protodesc.ToFileDescriptorProto(descriptorpb.File_google_protobuf_descriptor_proto),
		}})
	require.NoError(t, err)
	foreign := extension(t, copied, "scopes", 50001, descriptorpb.FieldDescriptorProto_TYPE_STRING,
		true)
	_, err = interceptor.New(store, interceptor.RulesFrom(foreign))
	require.ErrorContains(t, err,
		"ruled.scopes extends a google.protobuf.MethodOptions that is not the one of package "+
			"descriptorpb")
	auth := newAuth(t, store, interceptor.RulesFrom(scopes), interceptor.RulesFrom(one),
		interceptor.RulesFrom(public),
		interceptor.Require("/ruled.Service/Named", "c"))

	methods := []string{"Both", "One", "Open", "Closed", "Named"}
	desc := &grpc.ServiceDesc{ServiceName: "ruled.Service", HandlerType: (*any)(nil)}
	for _, m := range methods {
		desc.Methods = append(desc.Methods, grpc.MethodDesc{MethodName: m,
			Handler: func(
				_ any, ctx context.Context, dec func(any) error, in grpc.UnaryServerInterceptor,
			) (any, error) {
				req := new(testpb.Empty)
				if err := dec(req); err != nil {
					return nil, err
				}
				return in(ctx, req, &grpc.UnaryServerInfo{FullMethod: "/ruled.Service/" + m},
					func(context.Context, any) (any, error) {
						return req, nil
					})
			}})
	}
	server := grpc.NewServer(append(auth.ServerOptions(), grpc.WaitForHandlers(true))...)
	require.ErrorContains(t, auth.Check(server), "/ruled.Service/Named",
		"what is only linked is not missed")
	server.RegisterService(desc, nil)
	require.NoError(t, auth.Check(server))
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go func() { _ = server.Serve(lis) }()
	t.Cleanup(server.Stop)
	conn := dial(t, lis.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))

	ctx := map[string]context.Context{"none": t.Context()}
	for name, scopes := range map[string][]string{"a": {"a"}, "ab": {"a", "b"}, "c": {"c"}} {
		_, token := issue(t, store, keystore.Spec{Scopes: scopes})
		ctx[name] = withKey(t.Context(), token)
	}
	for key, want := range map[string][]codes.Code{
		"none": {codes.Unauthenticated, codes.Unauthenticated, codes.OK, codes.Unauthenticated,
			codes.Unauthenticated},
		"a":  {codes.PermissionDenied, codes.OK, codes.OK, codes.OK, codes.PermissionDenied},
		"ab": {codes.OK, codes.OK, codes.OK, codes.OK, codes.PermissionDenied},
		"c":  {codes.PermissionDenied, codes.PermissionDenied, codes.OK, codes.OK, codes.OK},
	} {
		for i, m := range methods {
			err := conn.Invoke(ctx[key], "/ruled.Service/"+m, &testpb.Empty{}, &testpb.Empty{})
			require.Equal(t, want[i].String(), status.Code(err).String(), "%s with %s: %v", m, key,
				err)
		}
	}
}
