package hostiletest

import (
	"context"
	"io"
	"net"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	channelz "google.golang.org/grpc/channelz/service"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Every method of every registered service needs a key, for all four kinds of methods. If the
// server has a handler for unknown methods, unknown methods need a key too.
func TestEveryMethodNeedsAKey(t *testing.T) {
	for name, unknown := range map[string]bool{
		"without a handler for unknown methods": false, "with a handler for unknown methods": true,
	} {
		t.Run(name, func(t *testing.T) {
			t.Cleanup(func() { goleak.VerifyNone(t) })
			store, err := keystore.Open(t.TempDir(), nil)
			require.NoError(t, err)
			defer store.Close()
			issued, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
			require.NoError(t, err)
			good := issued.Secret.Reveal()
			revoked, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
			require.NoError(t, err)
			require.NoError(t, store.Revoke(t.Context(), revoked.Key.ID, ""))
			auth, err := interceptor.New(store)
			require.NoError(t, err)

			opts := append(recommended(), auth.ServerOptions()...)
			code := codes.Unimplemented // grpc-go answers before it runs any interceptor
			if unknown {
				code = codes.Unauthenticated
				opts = append(opts, grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
					return status.Error(codes.NotFound, "the handler for unknown methods")
				}))
			}
			server := grpc.NewServer(opts...)
			testpb.RegisterTestServiceServer(server, testpb.UnimplementedTestServiceServer{})
			healthpb.RegisterHealthServer(server, health.NewServer())
			reflection.Register(server)
			channelz.RegisterChannelzServiceToServer(server)
			lis, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			done := make(chan error, 1)
			go func() { done <- server.Serve(lis) }()
			defer func() {
				server.Stop()
				require.NoError(t, <-done)
			}()
			conn, err := grpc.NewClient(lis.Addr().String(),
				grpc.WithTransportCredentials(insecure.NewCredentials()))
			require.NoError(t, err)
			defer conn.Close()

			bearer := func(keys ...string) (md []string) {
				for _, key := range keys {
					md = append(md, "authorization", "Bearer "+key)
				}
				return md
			}
			bad := map[string]struct {
				md     []string
				reason string
			}{
				"no key":           {nil, "CREDENTIALS_MISSING"},
				"nonsense":         {bearer("nonsense"), "API_KEY_INVALID"},
				"an unknown key":   {bearer(unknownToken(t)), "API_KEY_INVALID"},
				"a mistyped key":   {bearer(good + "x"), "API_KEY_INVALID"},
				"a revoked key":    {bearer(revoked.Secret.Reveal()), "API_KEY_INVALID"},
				"two keys":         {bearer(good, good), "CREDENTIALS_SEVERAL"},
				"in another place": {[]string{"x-api-key", good}, "CREDENTIALS_MISSING"},
			}
			infos := server.GetServiceInfo()
			require.Len(t, infos, 5)
			var kinds []string
			for service, info := range infos {
				for _, m := range info.Methods {
					method := "/" + service + "/" + m.Name
					kinds = append(kinds, kindOf(m))
					for what, with := range bad {
						for _, stream := range shapes(m) {
							ctx := metadata.AppendToOutgoingContext(t.Context(), with.md...)
							err := call(ctx, conn, method, stream)
							require.Equal(t, codes.Unauthenticated.String(),
								status.Code(err).String(),
								"%s with %s: %v", method, what, err)
							require.Equal(t, with.reason, reasonOf(err), "%s with %s", method, what)
						}
					}
					// With a valid key, the method itself answers. So the refusals above are due to
					// the key.
					err := call(withKey(t.Context(), good), conn, method, shapes(m)[0])
					require.NotEqual(t, codes.Unauthenticated.String(), status.Code(err).String(),
						method)
				}
				for what, with := range bad {
					ctx := metadata.AppendToOutgoingContext(t.Context(), with.md...)
					err := call(ctx, conn, "/"+service+"/NoSuchMethod", nil)
					require.Equal(t, code.String(), status.Code(err).String(),
						"an unknown method of %s with %s: %v", service, what, err)
				}
			}
			slices.Sort(kinds)
			require.Equal(t, []string{"both", "client", "server", "unary"}, slices.Compact(kinds))
			// A path without a leading slash reaches no handler (CVE-2026-33186).
			err = call(withKey(t.Context(), good), conn, "grpc.testing.TestService/EmptyCall", nil)
			require.Equal(t, codes.Unimplemented.String(), status.Code(err).String(), "%v", err)
			for _, method := range []string{
				"/no.such.Service/Method",
				"/grpc.testing.testservice/EmptyCall",
				"/grpc.testing.TestService/emptyCall",
				"/grpc.testing.TestService/EmptyCall/",
				"//grpc.testing.TestService/EmptyCall",
				"/grpc.testing.TestService/",
				"/TestService/EmptyCall",
			} {
				for what, with := range bad {
					ctx := metadata.AppendToOutgoingContext(t.Context(), with.md...)
					err := call(ctx, conn, method, nil)
					require.Equal(t, code.String(), status.Code(err).String(),
						"%s with %s: %v", method, what, err)
				}
				if unknown { // with a valid key, the handler answers
					err := call(withKey(t.Context(), good), conn, method, nil)
					require.Equal(t, codes.NotFound, status.Code(err), method)
				}
			}
		})
	}
}

// unknownToken returns a key of another store.
func unknownToken(t *testing.T) string {
	s, err := keystore.New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	defer s.Close()
	issued, err := s.Create(t.Context(), keystore.Spec{Name: "test"})
	require.NoError(t, err)
	return issued.Secret.Reveal()
}

func kindOf(m grpc.MethodInfo) string {
	switch {
	case m.IsClientStream && m.IsServerStream:
		return "both"
	case m.IsClientStream:
		return "client"
	case m.IsServerStream:
		return "server"
	}
	return "unary"
}

// shapes returns two ways to call a method: as its own kind, and as another kind. nil means a unary
// call.
func shapes(m grpc.MethodInfo) []*grpc.StreamDesc {
	own := &grpc.StreamDesc{ClientStreams: m.IsClientStream, ServerStreams: m.IsServerStream}
	if !m.IsClientStream && !m.IsServerStream {
		return []*grpc.StreamDesc{nil, {ClientStreams: true, ServerStreams: true}}
	}
	return []*grpc.StreamDesc{own, nil}
}

// call calls a method with an empty message.
func call(ctx context.Context, conn *grpc.ClientConn, method string, desc *grpc.StreamDesc) error {
	ctx, cancel := context.WithTimeout(ctx, hang)
	defer cancel()
	if desc == nil {
		return conn.Invoke(ctx, method, &testpb.Empty{}, &testpb.Empty{})
	}
	stream, err := conn.NewStream(ctx, desc, method)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(&testpb.Empty{}); err != nil && err != io.EOF {
		return err
	}
	if err := stream.CloseSend(); err != nil {
		return err
	}
	// Read only one message, because Watch does not end.
	if err := stream.RecvMsg(&testpb.Empty{}); err != io.EOF {
		return err
	}
	return nil
}

func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return ""
}
