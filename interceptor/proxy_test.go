package interceptor_test

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// serveHTTPOn runs a server behind an http.Server without TLS until the end of the test.
// Middleware, if not nil, stands before the server.
func serveHTTPOn(t testing.TB, lis net.Listener, middleware func(http.Handler) http.Handler,
	svc *service,
	opts ...grpc.ServerOption) string {
	t.Helper()
	server := grpc.NewServer(append(opts, grpc.WaitForHandlers(true))...)
	testpb.RegisterTestServiceServer(server, svc)
	web := &http.Server{Handler: server, Protocols: new(http.Protocols)}
	if middleware != nil {
		web.Handler = middleware(server)
	}
	web.Protocols.SetUnencryptedHTTP2(true)
	done := make(chan error, 1)
	go func() { done <- web.Serve(lis) }()
	t.Cleanup(func() {
		require.NoError(t, web.Close())
		require.ErrorIs(t, <-done, http.ErrServerClosed)
		server.Stop()
	})
	return lis.Addr().String()
}

// remoteAddr is middleware that sets the address of each request, as middleware for X-Real-IP does.
func remoteAddr(text string) func(http.Handler) http.Handler {
	return func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.RemoteAddr = text
			next.ServeHTTP(w, r)
		})
	}
}

func listenTCP(t testing.TB) net.Listener {
	t.Helper()
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return lis
}

func TestAddressesUnderServeHTTP(t *testing.T) {
	store := openStore(t)
	_, local := issue(t, store, keystore.Spec{AllowedNetworks: networks("127.0.0.0/8")})
	_, remote := issue(t, store, keystore.Spec{AllowedNetworks: networks("192.0.2.0/24")})
	_, remote6 := issue(t, store, keystore.Spec{AllowedNetworks: networks("2001:db8::/32")})
	svc := &service{duplex: echo}
	ctx := t.Context()
	opts := newAuth(t, store).ServerOptions()
	for _, tt := range []struct {
		name                   string
		middleware             func(http.Handler) http.Handler
		local, remote, remote6 bool
	}{
		{"of the connection", nil, true, false, false},
		{"with a port", remoteAddr("192.0.2.7:1234"), false, true, false},
		{"without a port", remoteAddr("192.0.2.7"), false, true, false},
		{"IPv6 without a port", remoteAddr("2001:db8::7"), false, false, true},
		{"none", remoteAddr(""), false, false, false},
		{"a name", remoteAddr("client.example"), false, false, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn := dial(t, serveHTTPOn(t, listenTCP(t), tt.middleware, svc, opts...))
			for token, admitted := range map[string]bool{
				local: tt.local, remote: tt.remote, remote6: tt.remote6,
			} {
				for _, err := range []error{
					call(withKey(ctx, token), conn), exchange(withKey(ctx, token), conn, 1),
				} {
					if admitted {
						require.NoError(t, err)
					} else {
						requireRefused(t, err, codes.Unauthenticated, "API_KEY_INVALID")
					}
				}
			}
		})
	}
}

// LimitFailures limits callers whose address has no port, and callers without an address.
func TestLimitFailuresOfUnusualAddresses(t *testing.T) {
	store := openStore(t)
	_, good := issue(t, store, keystore.Spec{})
	for name, serve := range map[string]func(opts ...grpc.ServerOption) string{
		"an address without a port": func(opts ...grpc.ServerOption) string {
			return serveHTTPOn(t, listenTCP(t), remoteAddr("192.0.2.7"), &service{}, opts...)
		},
		"no address": func(opts ...grpc.ServerOption) string {
			return serveHTTPOn(t, listenTCP(t), remoteAddr(""), &service{}, opts...)
		},
		"a unix socket": func(opts ...grpc.ServerOption) string {
			lis, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			require.NoError(t, err)
			return "unix:" + serveOn(t, lis, &service{}, opts...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t,
				serve(newAuth(t, store, interceptor.LimitFailures(0.001, 2)).ServerOptions()...))
			for range 2 {
				requireRefused(t, call(withKey(t.Context(), "nonsense"), conn),
					codes.Unauthenticated, "API_KEY_INVALID")
			}
			for _, token := range []string{"nonsense", good} {
				requireRefused(t, call(withKey(t.Context(), token), conn), codes.ResourceExhausted,
					"AUTH_THROTTLED")
			}
		})
	}
}

// A proxy that connects over a transport without addresses is trusted only if an option names the
// transport.
func TestTrustProxyTransport(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{AllowedNetworks: networks("192.0.2.0/24")})
	from := func(header, addr string) context.Context {
		return metadata.AppendToOutgoingContext(withKey(t.Context(), token), header, addr)
	}
	socket := func() net.Listener {
		lis, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
		require.NoError(t, err)
		return lis
	}
	over := func(lis *bufconn.Listener) *grpc.ClientConn {
		return dial(t, "passthrough:///bufconn",
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return lis.DialContext(ctx)
			}))
	}
	svc := &service{duplex: echo}
	for name, tt := range map[string]struct {
		transport string
		connect   func(opts ...grpc.ServerOption) *grpc.ClientConn
	}{
		"a unix socket": {"unix", func(opts ...grpc.ServerOption) *grpc.ClientConn {
			return dial(t, "unix:"+serveOn(t, socket(), svc, opts...))
		}},
		"a unix socket under ServeHTTP": {"unix", func(opts ...grpc.ServerOption) *grpc.ClientConn {
			return dial(t, "unix:"+serveHTTPOn(t, socket(), nil, svc, opts...))
		}},
		"bufconn": {"bufconn", func(opts ...grpc.ServerOption) *grpc.ClientConn {
			lis := bufconn.Listen(1 << 16)
			serveOn(t, lis, svc, opts...)
			return over(lis)
		}},
		"bufconn under ServeHTTP": {"bufconn", func(opts ...grpc.ServerOption) *grpc.ClientConn {
			lis := bufconn.Listen(1 << 16)
			serveHTTPOn(t, lis, nil, svc, opts...)
			return over(lis)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			trusted := tt.connect(newAuth(t, store,
				interceptor.TrustProxyTransport("X-Forwarded-For", tt.transport),
				interceptor.TrustProxy("x-forwarded-for",
					networks("10.0.0.0/8")...)).ServerOptions()...)
			require.NoError(t,
				call(from("x-forwarded-for", "203.0.113.9, 192.0.2.1, 10.1.1.1"), trusted))
			require.NoError(t, exchange(from("x-forwarded-for", "192.0.2.1"), trusted, 1))
			for _, ctx := range []context.Context{
				withKey(t.Context(), token), from("x-forwarded-for", "192.0.2.1, 203.0.113.9"),
				from("x-real-ip", "192.0.2.1"),
			} {
				requireRefused(t, call(ctx, trusted), codes.Unauthenticated, "API_KEY_INVALID")
			}
			for _, o := range []interceptor.Option{
				interceptor.TrustProxyTransport("x-forwarded-for", "vsock"),
				interceptor.TrustProxy("x-forwarded-for", networks("127.0.0.0/8")...), {},
			} {
				other := tt.connect(newAuth(t, store, o).ServerOptions()...)
				requireRefused(t, call(from("x-forwarded-for", "192.0.2.1"), other),
					codes.Unauthenticated, "API_KEY_INVALID")
			}
		})
	}
	t.Run("a caller with an address is no such proxy", func(t *testing.T) {
		auth := newAuth(t, store,
			interceptor.TrustProxyTransport("x-forwarded-for", "unix", "bufconn"))
		conn := dial(t, serve(t, svc, auth.ServerOptions()...))
		requireRefused(t, call(from("x-forwarded-for", "192.0.2.1"), conn), codes.Unauthenticated,
			"API_KEY_INVALID")
	})
}
