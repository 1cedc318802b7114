package keycreds_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/big"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor/keycreds"
)

const (
	testKey  = "oil_test_notARealKey1"
	testKey2 = "oil_test_notARealKey2"
)

func TestTLS(t *testing.T) {
	s := serveTLS(t)
	creds := keycreds.New(testKey)
	require.True(t, creds.RequireTransportSecurity())

	t.Run("dial option", func(t *testing.T) {
		client := s.dial(t, grpc.WithPerRPCCredentials(creds))
		require.NoError(t, check(t, client))
		require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
	})
	t.Run("call option", func(t *testing.T) {
		require.NoError(t, check(t, s.dial(t), grpc.PerRPCCredentials(creds)))
		require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
	})
	t.Run("stream", func(t *testing.T) {
		require.NoError(t, watch(t, s.dial(t, grpc.WithPerRPCCredentials(creds))))
		require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
	})
}

// overridden wraps credentials and returns false from RequireTransportSecurity, which disables the
// checks of gRPC.
type overridden struct{ credentials.PerRPCCredentials }

func (overridden) RequireTransportSecurity() bool { return false }

func TestPlaintextIsRefused(t *testing.T) {
	creds := keycreds.New(testKey)

	t.Run("by the dial", func(t *testing.T) {
		s := servePlaintext(t)
		_, err := grpc.NewClient(s.target,
			append(s.dialOptions, grpc.WithPerRPCCredentials(creds))...)
		require.Error(t, err)
		require.Zero(t, s.connections())
	})
	t.Run("by the handshake", func(t *testing.T) {
		// passes the dial, but does not vouch for TCP
		s := serveTCP(t, insecure.NewCredentials(), local.NewCredentials())
		err := check(t, s.dial(t, grpc.WithPerRPCCredentials(creds)))
		require.Equal(t, codes.Unavailable, status.Code(err), err)
		require.False(t, s.sentHeaders(t))
	})
	for name, creds := range map[string]credentials.PerRPCCredentials{
		"gRPC": creds, "keycreds": overridden{creds},
	} {
		t.Run("by the call, in "+name, func(t *testing.T) {
			s := servePlaintext(t)
			err := check(t, s.dial(t), grpc.PerRPCCredentials(creds))
			require.Equal(t, codes.Unauthenticated, status.Code(err), err)
			require.ErrorContains(t, err, "insecure connection")
			require.NotContains(t, err.Error(), testKey)
			require.False(t, s.sentHeaders(t))
		})
	}
	t.Run("by keycreds, of the connection's", func(t *testing.T) {
		s := servePlaintext(t)
		client := s.dial(t, grpc.WithPerRPCCredentials(overridden{creds}))
		require.Equal(t, codes.Unauthenticated, status.Code(check(t, client)))
		require.Equal(t, codes.Unauthenticated, status.Code(watch(t, client)))
		require.False(t, s.sentHeaders(t))
	})
	t.Run("before the source is asked", func(t *testing.T) {
		s := servePlaintext(t)
		creds := keycreds.FromSource(func(context.Context) (string, error) { panic("asked") })
		require.Equal(t, codes.Unauthenticated,
			status.Code(check(t, s.dial(t), grpc.PerRPCCredentials(creds))))
	})
	t.Run("of an unknown connection", func(t *testing.T) {
		_, err := creds.GetRequestMetadata(t.Context())
		require.Equal(t, codes.Unauthenticated, status.Code(err), err)
	})
}

// silent are transport credentials that report no security level, and have none.
type silent struct {
	credentials.TransportCredentials
	credentials.AuthInfo
}

func (s silent) ClientHandshake(
	_ context.Context, _ string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	return conn, s.AuthInfo, nil
}

func (silent) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "silent"}
}
func (s silent) Clone() credentials.TransportCredentials { return s }

type noInfo struct{}

func (noInfo) AuthType() string { return "silent" }

type emptyInfo struct {
	noInfo
	credentials.CommonAuthInfo
}

func TestConnectionWithoutSecurityLevelIsRefused(t *testing.T) {
	for name, info := range map[string]credentials.AuthInfo{
		"no level": noInfo{}, "an invalid level": emptyInfo{}, "nil": nil,
	} {
		t.Run(name, func(t *testing.T) {
			s := servePlaintext(t)
			s.dialOptions = append(s.dialOptions,
				grpc.WithTransportCredentials(silent{insecure.NewCredentials(), info}))
			err := check(t, s.dial(t, grpc.WithPerRPCCredentials(keycreds.New(testKey))))
			require.Equal(t, codes.Unauthenticated, status.Code(err), err)
			require.ErrorContains(t, err,
				"insecure connection: use TLS (the transport credentials do not report the "+
					"security level)")
			require.NotContains(t, err.Error(), testKey)
			require.False(t, s.sentHeaders(t))
		})
	}
}

func TestAllowInsecure(t *testing.T) {
	s := servePlaintext(t)
	creds := keycreds.New(testKey, keycreds.AllowInsecure())
	require.False(t, creds.RequireTransportSecurity())
	require.NoError(t, check(t, s.dial(t, grpc.WithPerRPCCredentials(creds))))
	require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
	require.True(t, s.sentHeaders(t)) // the control for TestPlaintextIsRefused

	s = serveTLS(t)
	require.NoError(t, check(t, s.dial(t, grpc.WithPerRPCCredentials(creds))))
	require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
}

func TestUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sock")
	lis, err := net.Listen("unix", socket)
	require.NoError(t, err)
	s := serve(t, lis, local.NewCredentials())
	s.target = "unix://" + socket
	s.dialOptions = []grpc.DialOption{grpc.WithTransportCredentials(local.NewCredentials())}

	require.NoError(t, check(t, s.dial(t, grpc.WithPerRPCCredentials(keycreds.New(testKey)))))
	require.Equal(t, []string{"Bearer " + testKey}, s.last(t).Get("authorization"))
}

func TestFromSourceRotatesOnOneConnection(t *testing.T) {
	s := serveTLS(t)
	var key atomic.Value
	creds := keycreds.FromSource(func(context.Context) (string, error) {
		return key.Load().(string), nil
	})
	client := s.dial(t, grpc.WithPerRPCCredentials(creds))
	for _, k := range []string{testKey, testKey2} {
		key.Store(k + "\n")
		require.NoError(t, check(t, client))
		require.Equal(t, []string{"Bearer " + k}, s.last(t).Get("authorization"))
	}
	require.Equal(t, 1, s.connections())
}

func TestFromSourceGetsTheCallsContext(t *testing.T) {
	s := serveTLS(t)
	var end context.CancelFunc
	creds := keycreds.FromSource(func(ctx context.Context) (string, error) {
		end()
		<-ctx.Done()
		return "", fmt.Errorf("vault: %w", ctx.Err())
	})
	client := s.dial(t, grpc.WithPerRPCCredentials(creds))

	ctx, cancel := context.WithCancel(t.Context())
	end = cancel
	_, err := client.Check(ctx, &healthpb.HealthCheckRequest{})
	require.Equal(t, codes.Canceled, status.Code(err), err)

	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	end = func() {}
	_, err = client.Check(ctx, &healthpb.HealthCheckRequest{})
	require.Equal(t, codes.DeadlineExceeded, status.Code(err), err)
	require.Empty(t, s.calls())
}

func TestSourceError(t *testing.T) {
	s := serveTLS(t)
	for name, cause := range map[string]error{
		"plain":        fs.ErrNotExist,
		"a status":     status.Error(codes.Unauthenticated, "vault sealed"),
		"its deadline": context.DeadlineExceeded, // of the source's own, not the call's
	} {
		creds := keycreds.FromSource(func(context.Context) (string, error) {
			return testKey, fmt.Errorf("reading: %w", cause)
		})
		verify := func(t *testing.T, err error) {
			require.Equal(t, codes.Unavailable, status.Code(err), err)
			require.ErrorIs(t, err, cause)
			require.Contains(t, status.Convert(err).Message(),
				"keycreds: the source of the API key failed: reading: "+cause.Error())
			require.NotContains(t, err.Error(), testKey)
			require.Empty(t, s.calls())
		}
		t.Run(name+", dial option", func(t *testing.T) {
			client := s.dial(t, grpc.WithPerRPCCredentials(creds))
			verify(t, check(t, client))
			verify(t, watch(t, client))
		})
		t.Run(name+", call option", func(t *testing.T) {
			verify(t, check(t, s.dial(t), grpc.PerRPCCredentials(creds)))
		})
	}
}

func TestSourceErrorIsRetried(t *testing.T) {
	s := serveTLS(t)
	asked := 0
	creds := keycreds.FromSource(func(context.Context) (string, error) {
		if asked++; asked == 1 {
			return "", errors.New("not yet")
		}
		return testKey, nil
	})
	policy := grpc.WithDefaultServiceConfig(`{"methodConfig": [{"name": [{}],
		"retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.001s", "maxBackoff": "0.001s",
			"backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`)
	require.NoError(t, check(t, s.dial(t, grpc.WithPerRPCCredentials(creds), policy)))
	require.Equal(t, 2, asked)
}

func TestBadKeys(t *testing.T) {
	s := serveTLS(t)
	long := strings.Repeat("k", 512)
	for name, c := range map[string]struct{ token, text string }{
		"empty":            {"", "empty"},
		"white space":      {" \r\n\t", "empty"},
		"two lines":        {testKey + "\n" + testKey, "white space"},
		"a space inside":   {"Bearer " + testKey, "without a scheme"},
		"a tab inside":     {testKey + "\t" + testKey, "white space"},
		"a control":        {testKey + "\x00", "printable ASCII"},
		"DEL":              {testKey + "\x7f", "printable ASCII"},
		"not ASCII":        {testKey + "é", "printable ASCII"},
		"not UTF-8":        {testKey + "\xff", "printable ASCII"},
		"a byte order":     {"\ufeff" + testKey, "printable ASCII"},
		"over-long":        {long + "k", "longer than 512 bytes"},
		"long and strange": {long + "é", "longer than 512 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, creds := range []credentials.PerRPCCredentials{
				keycreds.New(c.token),
				keycreds.FromSource(func(context.Context) (string, error) { return c.token, nil }),
			} {
				for _, err := range []error{
					check(t, s.dial(t, grpc.WithPerRPCCredentials(creds))),
					check(t, s.dial(t), grpc.PerRPCCredentials(creds)),
				} {
					require.Equal(t, codes.Unauthenticated, status.Code(err), err)
					require.ErrorContains(t, err, "keycreds: ")
					require.ErrorContains(t, err, c.text)
					require.NotContains(t, err.Error(), "notAReal")
					require.NotContains(t, err.Error(), "kkkk")
				}
			}
			require.Empty(t, s.calls())
		})
	}
	for name, c := range map[string]struct{ token, sent string }{
		"a line break after": {testKey + "\r\n", testKey},
		"white space around": {"\u00a0\t " + testKey + " \n\n", testKey},
		"the longest":        {" " + long + " ", long},
		"every visible ASCII": {"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
			"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t,
				check(t, s.dial(t, grpc.WithPerRPCCredentials(keycreds.New(c.token)))))
			require.Equal(t, []string{"Bearer " + c.sent}, s.last(t).Get("authorization"))
		})
	}
}

func TestWithHeader(t *testing.T) {
	s := serveTLS(t)
	for _, c := range []struct{ name, scheme, wantName, want string }{
		{"authorization", "Bearer", "authorization", "Bearer " + testKey},
		{"Authorization", "ApiKey", "authorization", "ApiKey " + testKey},
		{"X-API-Key", "", "x-api-key", testKey},
		{"x_api.key-1", "a!#$%&'*+-.^_`|~Z9", "x_api.key-1", "a!#$%&'*+-.^_`|~Z9 " + testKey},
	} {
		t.Run(c.name+" "+c.scheme, func(t *testing.T) {
			creds := keycreds.New(testKey, keycreds.WithHeader(c.name, c.scheme))
			require.NoError(t, check(t, s.dial(t, grpc.WithPerRPCCredentials(creds))))
			md := s.last(t)
			require.Equal(t, []string{c.want}, md.Get(c.wantName))
			require.Equal(t, c.wantName == "authorization", len(md.Get("authorization")) > 0)
			require.Equal(t, "keycreds("+c.wantName+", redacted)", fmt.Sprint(creds))
		})
	}
	t.Run("the last one counts", func(t *testing.T) {
		creds := keycreds.New(testKey, keycreds.WithHeader("", ""), keycreds.WithHeader("a", "b"),
			keycreds.WithHeader("x-api-key", ""), keycreds.Option{})
		require.NoError(t, check(t, s.dial(t, grpc.WithPerRPCCredentials(creds))))
		md := s.last(t)
		require.Equal(t, []string{testKey}, md.Get("x-api-key"))
		require.Empty(t, md.Get("a"))
		require.Empty(t, md.Get("authorization"))
	})
}

func TestBadOptions(t *testing.T) {
	s := serveTLS(t)
	for name, c := range map[string]struct {
		creds credentials.PerRPCCredentials
		text  string
	}{
		"empty name":    {withHeader("", "Bearer"), "name is empty"},
		"binary":        {withHeader("key-Bin", ""), "-bin"},
		"gRPC's own":    {withHeader("GRPC-key", ""), "grpc-"},
		"pseudo header": {withHeader(":authority", ""), "other than letters"},
		"space in name": {withHeader("api key", ""), "other than letters"},
		"value in name": {withHeader("authorization: Bearer "+testKey, ""),
			"other than letters"},
		"not ASCII name":  {withHeader("clé", ""), "other than letters"},
		"user-agent":      {withHeader("User-Agent", ""), "choose another"},
		"host":            {withHeader("host", ""), "choose another"},
		"space in scheme": {withHeader("authorization", "Bearer "), "not an RFC 9110 token"},
		"key in scheme": {withHeader("authorization", "Bearer "+testKey),
			"not an RFC 9110 token"},
		"line in scheme":   {withHeader("authorization", "Bea\nrer"), "not an RFC 9110 token"},
		"not ASCII scheme": {withHeader("authorization", "Béarer"), "not an RFC 9110 token"},
		"the last is bad": {
			keycreds.New(testKey, keycreds.WithHeader("a", ""), keycreds.WithHeader("", "")),
			"name is empty"},
		"nil source": {keycreds.FromSource(nil), "source is nil"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, err := range []error{
				check(t, s.dial(t, grpc.WithPerRPCCredentials(c.creds))),
				check(t, s.dial(t), grpc.PerRPCCredentials(c.creds)),
			} {
				require.Equal(t, codes.Internal, status.Code(err), err)
				require.ErrorContains(t, err, "keycreds: ")
				require.ErrorContains(t, err, c.text)
				require.NotContains(t, err.Error(), testKey)
			}
			require.NotContains(t, fmt.Sprint(c.creds), testKey)
			require.Empty(t, s.calls())
		})
	}
}

func withHeader(name, scheme string) credentials.PerRPCCredentials {
	return keycreds.New(testKey, keycreds.WithHeader(name, scheme))
}

func TestRedaction(t *testing.T) {
	type nested struct{ creds credentials.PerRPCCredentials }
	path := filepath.Join(t.TempDir(), "api-key")
	write(t, path, testKey)
	fromFile := keycreds.FromFile(path, keycreds.AllowInsecure())
	require.Equal(t, "Bearer "+testKey, sent(t, fromFile), "it holds the key now")
	for name, creds := range map[string]credentials.PerRPCCredentials{
		"New": keycreds.New(testKey),
		"FromSource": keycreds.FromSource(func(context.Context) (string, error) {
			return testKey, nil
		}),
		"FromFile": fromFile,
	} {
		t.Run(name, func(t *testing.T) {
			redacted := func(how, printed string) {
				t.Helper()
				for _, form := range []string{"%s", "%x", "%X", "% x", "%d"} {
					key := strings.Trim(fmt.Sprintf(form, []byte(testKey)), "[]")
					require.False(t, strings.Contains(printed, key), "%s prints the key", how)
				}
			}
			for _, v := range []any{
				creds, nested{creds}, &nested{creds}, []any{nested{creds}},
				map[string]nested{"": {creds}},
			} {
				for _, verb := range strings.Fields(
					"%v %+v %#v %s %+s %q %x %X %d %b %o %c %U %t %e %p %T",
				) {
					redacted(verb, fmt.Sprintf(verb, v))
				}
				encoded, err := json.Marshal(v)
				require.NoError(t, err)
				redacted("JSON", string(encoded))

				var logged bytes.Buffer
				slog.New(slog.NewTextHandler(&logged, nil)).Info("text", "creds", v)
				slog.New(slog.NewJSONHandler(&logged, nil)).Info("json", "creds", v)
				redacted("slog", logged.String())
			}
			require.Equal(t, "keycreds(authorization, redacted)", fmt.Sprint(creds))
		})
	}
}

// A pitfall of gRPC: two keys in one call. Package interceptor refuses the call.
func TestDialAndCallCredentialsAreBothSent(t *testing.T) {
	s := serveTLS(t)
	dial, call := grpc.WithPerRPCCredentials(keycreds.New(testKey)),
		grpc.PerRPCCredentials(keycreds.New(testKey2))

	require.NoError(t, check(t, s.dial(t, dial), call))
	require.Equal(t, []string{"Bearer " + testKey, "Bearer " + testKey2},
		s.last(t).Get("authorization"))

	// Two credentials of the same kind do not add up.
	require.NoError(t,
		check(t, s.dial(t, dial, grpc.WithPerRPCCredentials(keycreds.New(testKey2)))))
	require.Equal(t, []string{"Bearer " + testKey2}, s.last(t).Get("authorization"))
}

func TestEachCallGetsItsOwnMap(t *testing.T) {
	creds := keycreds.New(testKey, keycreds.AllowInsecure())
	first, err := creds.GetRequestMetadata(t.Context())
	require.NoError(t, err)
	clear(first)
	second, err := creds.GetRequestMetadata(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[string]string{"authorization": "Bearer " + testKey}, second)
}

func TestConcurrentUse(t *testing.T) {
	s := serveTLS(t)
	var asked atomic.Int64
	client := s.dial(t,
		grpc.WithPerRPCCredentials(keycreds.FromSource(func(context.Context) (string, error) {
			asked.Add(1)
			return testKey, nil
		})))
	var wg sync.WaitGroup
	errs := make([]error, 16)
	for i := range errs {
		wg.Go(func() { errs[i] = check(t, client) })
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	require.EqualValues(t, len(errs), asked.Load())
}

// check makes a unary call.
func check(t *testing.T, client healthpb.HealthClient, opts ...grpc.CallOption) error {
	_, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}, opts...)
	return err
}

// watch opens a stream, reads one message, and closes the stream.
func watch(t *testing.T, client healthpb.HealthClient) error {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		return err
	}
	_, err = stream.Recv()
	return err
}

// A server records the metadata of its calls, and the bytes that clients write to their
// connections.
type server struct {
	*grpc.Server
	target      string
	dialOptions []grpc.DialOption

	mu       sync.Mutex
	received []metadata.MD
	clients  []*grpc.ClientConn
	conns    []*recordingConn
}

func serveTLS(t *testing.T) *server {
	cert, roots := throwAwayCertificate(t)
	return serveTCP(t, credentials.NewServerTLSFromCert(&cert),
		credentials.NewClientTLSFromCert(roots, ""))
}

func servePlaintext(t *testing.T) *server {
	return serveTCP(t, insecure.NewCredentials(), insecure.NewCredentials())
}

func serveTCP(t *testing.T, ofServer, ofClient credentials.TransportCredentials) *server {
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := serve(t, lis, ofServer)
	s.target = lis.Addr().String()
	s.dialOptions = []grpc.DialOption{grpc.WithTransportCredentials(ofClient),
		grpc.WithContextDialer(s.connect)}
	return s
}

func serve(t *testing.T, lis net.Listener, transport credentials.TransportCredentials) *server {
	s := &server{}
	record := func(ctx context.Context) {
		md, _ := metadata.FromIncomingContext(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.received = append(s.received, md)
	}
	s.Server = grpc.NewServer(grpc.Creds(transport),
		grpc.UnaryInterceptor(func(
			ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
		) (any, error) {
			record(ctx)
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(
			srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
		) error {
			record(ss.Context())
			return next(srv, ss)
		}))
	healthpb.RegisterHealthServer(s, health.NewServer())
	var serving sync.WaitGroup
	// which fails if the test has stopped the server before that
	serving.Go(func() { _ = s.Serve(lis) })
	t.Cleanup(func() {
		s.Stop()
		serving.Wait()
	})
	return s
}

// dial returns a client. The options override those of the server.
func (s *server) dial(t *testing.T, opts ...grpc.DialOption) healthpb.HealthClient {
	conn, err := grpc.NewClient(s.target, slices.Concat(s.dialOptions, opts)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients = append(s.clients, conn)
	return healthpb.NewHealthClient(conn)
}

// calls returns and forgets the metadata of the calls so far.
func (s *server) calls() []metadata.MD {
	s.mu.Lock()
	defer s.mu.Unlock()
	calls := s.received
	s.received = nil
	return calls
}

func (s *server) last(t *testing.T) metadata.MD {
	calls := s.calls()
	require.NotEmpty(t, calls)
	return calls[len(calls)-1]
}

func (s *server) connect(ctx context.Context, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	rc := &recordingConn{Conn: conn}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conns = append(s.conns, rc)
	return rc, nil
}

// connections returns the number of connections that clients have made.
func (s *server) connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.conns)
}

// sentHeaders closes the clients and reports whether they wrote a HEADERS frame, which would
// contain a key. A search for the bytes of the key would prove nothing, because HPACK compresses
// them.
func (s *server) sentHeaders(t *testing.T) bool {
	s.mu.Lock()
	clients := s.clients
	s.mu.Unlock()
	for _, c := range clients {
		require.NoError(t, c.Close()) // it waits for what is being written
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.ContainsFunc(s.conns, func(c *recordingConn) bool { return c.hasHeaders(t) })
}

type recordingConn struct {
	net.Conn
	mu      sync.Mutex
	written bytes.Buffer
}

func (c *recordingConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written.Write(p)
	return c.Conn.Write(p)
}

// hasHeaders parses the frames of RFC 9113, section 4.1: length (24 bits), type (8), flags (8),
// stream (32), payload.
func (c *recordingConn) hasHeaders(t *testing.T) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	frames := bytes.TrimPrefix(c.written.Bytes(), []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
	for len(frames) >= 9 {
		if frames[3] == 0x01 {
			return true
		}
		end := 9 + int(frames[0])<<16 + int(frames[1])<<8 + int(frames[2])
		require.LessOrEqual(t, end, len(frames))
		frames = frames[end:]
	}
	require.Empty(t, frames)
	return false
}

func throwAwayCertificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	leaf, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}
