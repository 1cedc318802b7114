package interceptor_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func init() { encoding.RegisterCompressor(countedGzip{}) }

// inflated is the number of bytes that servers have decompressed.
var inflated atomic.Int64

// countedGzip is gzip for messages that the client has compressed already. It counts the
// decompressed bytes.
type countedGzip struct{}

func (countedGzip) Name() string { return "counted" }

func (countedGzip) Compress(w io.Writer) (io.WriteCloser, error) {
	return struct {
		io.Writer
		io.Closer
	}{w, io.NopCloser(nil)}, nil
}

func (countedGzip) Decompress(r io.Reader) (io.Reader, error) {
	z, err := gzip.NewReader(r)
	return countingReader{z}, err
}

type countingReader struct{ io.Reader }

func (c countingReader) Read(p []byte) (int, error) {
	n, err := c.Reader.Read(p)
	inflated.Add(int64(n))
	return n, err
}

// ready is a codec for messages that are encoded already.
type ready struct{}

func (ready) Name() string { return "proto" }

func (ready) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (ready) Unmarshal(mem.BufferSlice, any) error { return nil }

// bomb returns the gzip of a SimpleRequest with the given number of MiB of zeros. A gzip file may
// have several members, so bomb compresses only the first MiB.
func bomb(t *testing.T, mib int) []byte {
	gz := func(b []byte) []byte {
		var member bytes.Buffer
		z := gzip.NewWriter(&member)
		_, err := z.Write(b)
		require.NoError(t, err)
		require.NoError(t, z.Close())
		return member.Bytes()
	}
	payload := protowire.AppendTag(nil, 2, protowire.BytesType) // Payload.body
	payload = protowire.AppendVarint(payload, uint64(mib)<<20)
	head := protowire.AppendTag(nil, 3, protowire.BytesType) // SimpleRequest.payload
	head = protowire.AppendVarint(head, uint64(len(payload)+mib<<20))
	return append(gz(append(head, payload...)), bytes.Repeat(gz(make([]byte, 1<<20)), mib)...)
}

func withTap(auth *interceptor.Authenticator) []grpc.ServerOption {
	return append(auth.ServerOptions(), grpc.InTapHandle(auth.Tap()))
}

// 83 KB from a stranger become 84 MB, unless the tap handle refuses the call before.
func TestTapRefusesBeforeTheBodyIsInflated(t *testing.T) {
	large := bomb(t, 84)
	require.Less(t, len(large), 100<<10)
	little := bomb(t, 1) // enough to show where messages are decompressed
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	_, unknown := issue(t, openStore(t), keystore.Spec{})
	public := interceptor.Public(unaryCall)
	send := func(
		t *testing.T, conn *grpc.ClientConn, message []byte, md ...string,
	) (bytes int64, err error) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		inflated.Store(0)
		err = conn.Invoke(metadata.AppendToOutgoingContext(t.Context(), md...), unaryCall, message,
			nil,
			grpc.UseCompressor("counted"), grpc.ForceCodecV2(ready{}))
		runtime.ReadMemStats(&after)
		t.Logf("%d bytes were sent, %d inflated, and %d KiB allocated", len(message),
			inflated.Load(),
			(after.TotalAlloc-before.TotalAlloc)>>10)
		return inflated.Load(), err
	}
	for name, tt := range map[string]struct {
		tap      bool
		opts     []interceptor.Option
		md       []string
		inflates bool
		code     codes.Code
		reason   string
	}{
		"no credential, without Tap": {false, nil, nil, true, codes.Unauthenticated,
			"CREDENTIALS_MISSING"},
		"a bad key, without Tap": {false, nil, []string{"authorization", "Bearer nonsense"}, true,
			codes.Unauthenticated, "API_KEY_INVALID"},
		"no credential": {true, nil, nil, false, codes.Unauthenticated, "CREDENTIALS_MISSING"},
		"a bad key": {true, nil, []string{"authorization", "Bearer nonsense"}, false,
			codes.Unauthenticated, "API_KEY_INVALID"},
		"a bad checksum": {true, nil, []string{"authorization", "Bearer " + flip(token)}, false,
			codes.Unauthenticated, "API_KEY_INVALID"},
		"two keys": {true, nil,
			[]string{"authorization", "Bearer " + token, "authorization", "Bearer " + token}, false,
			codes.Unauthenticated, "CREDENTIALS_SEVERAL"},
		"plaintext": {true, []interceptor.Option{interceptor.RequireTLS()},
			[]string{"authorization", "Bearer " + token}, false,
			codes.Unauthenticated, "INSECURE_TRANSPORT"},
		"no rule": {true, []interceptor.Option{interceptor.RequireRules()},
			[]string{"authorization", "Bearer " + token}, false,
			codes.PermissionDenied, "METHOD_HAS_NO_RULE"},
		"a bad key for an optional method": {true,
			[]interceptor.Option{interceptor.Optional(unaryCall)},
			[]string{"authorization", "Bearer nonsense"}, false, codes.Unauthenticated,
			"API_KEY_INVALID"},

		"a good key": {true, nil,
			[]string{"authorization", "Bearer " + token}, true, codes.Unimplemented, ""},
		"a public method": {true, []interceptor.Option{public}, nil, true,
			codes.Unimplemented, ""},
		"an optional method": {true,
			[]interceptor.Option{interceptor.Optional(unaryCall)}, nil, true, codes.Unimplemented,
			""},
		"a good key in the form, and made up": {true, nil,
			[]string{"authorization", "Bearer " + unknown}, true, codes.Unauthenticated,
			"API_KEY_INVALID"},
		"a good key that lacks a scope": {true,
			[]interceptor.Option{interceptor.Require(unaryCall, "a")},
			[]string{"authorization", "Bearer " + token}, true, codes.PermissionDenied,
			"INSUFFICIENT_SCOPE"},
		"a good key for a public method, twice": {true, []interceptor.Option{public},
			[]string{"authorization", "Bearer " + token, "authorization", "x"}, true,
			codes.Unimplemented, ""},
	} {
		t.Run(name, func(t *testing.T) {
			auth := newAuth(t, store, tt.opts...)
			opts := auth.ServerOptions()
			if tt.tap {
				opts = withTap(auth)
			}
			message, size := little, int64(1<<20)
			if strings.HasPrefix(name, "no credential") {
				message, size = large, 84<<20
			}
			conn := dial(t, serve(t, &service{}, append(opts, grpc.MaxRecvMsgSize(100<<20))...))
			bytes, err := send(t, conn, message, tt.md...)
			requireRefused(t, err, tt.code, tt.reason)
			require.Equal(t, tt.inflates, bytes >= size, "%d bytes were inflated", bytes)
			if !tt.inflates {
				require.Zero(t, bytes)
			}
		})
	}
}

// flip changes the secret of a token, but not the form.
func flip(token string) string {
	changed := []byte(token)
	changed[40] ^= 1
	return string(changed)
}

// For every credential, callers get the same status with and without the tap handle.
func TestTapGivesTheSameStatuses(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	auth := newAuth(t, store, interceptor.Header("authorization", "Bearer"),
		interceptor.Header("x-api-key", ""))
	svc := &service{duplex: end}
	plain, tap := dial(t, serve(t, svc, auth.ServerOptions()...)),
		dial(t, serve(t, svc, withTap(auth)...))
	for _, md := range [][]string{
		nil,
		{"authorization", "Bearer " + token},
		{"authorization", "bearer  " + token + " "},
		{"x-api-key", token},
		{"authorization", ""},
		{"authorization", "Bearer"},
		{"authorization", token},
		{"authorization", "Basic " + token},
		{"authorization", "Bearer " + flip(token)},
		{"authorization", "Bearer " + token[:50]},
		{"authorization", "Bearer " + token + strings.Repeat("x", 600)},
		{"authorization", "Bearer " + token, "x-api-key", token},
		{"x-api-key", "Bearer " + token},
	} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), md...)
		want := both(ctx, plain)
		for kind, got := range both(ctx, tap) {
			require.True(t,
				proto.Equal(status.Convert(want[kind]).Proto(), status.Convert(got).Proto()),
				"%v, and with Tap %v", want[kind], got)
		}
	}
	for _, err := range []error{
		plain.Invoke(withKey(t.Context(), token), "/no.Service/Method", &testpb.Empty{},
			&testpb.Empty{}),
		tap.Invoke(withKey(t.Context(), token), "/no.Service/Method", &testpb.Empty{},
			&testpb.Empty{}),
	} {
		require.Equal(t, codes.Unimplemented, status.Code(err))
	}
	err := tap.Invoke(t.Context(), "/no.Service/Method", &testpb.Empty{}, &testpb.Empty{})
	requireRefused(t, err, codes.Unauthenticated, "CREDENTIALS_MISSING")
}

func TestTapOverTLS(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	cert, pool := throwawayCertificate(t)
	opts := append(withTap(newAuth(t, store, interceptor.RequireTLS())),
		grpc.Creds(credentials.NewTLS(cert)))
	conn := dial(t, serve(t, &service{duplex: end}, opts...),
		grpc.WithTransportCredentials(credentials.NewClientTLSFromCert(pool, "")))
	for _, err := range both(withKey(t.Context(), token), conn) {
		require.NoError(t, err)
	}
}

// A failure that the tap handle finds counts once.
func TestTapCountsFailures(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	conn := dial(t,
		serve(t, &service{}, withTap(newAuth(t, store, interceptor.LimitFailures(1e-9, 3)))...))
	for range 3 {
		requireRefused(t, call(withKey(t.Context(), "nonsense"), conn), codes.Unauthenticated,
			"API_KEY_INVALID")
	}
	requireRefused(t, call(withKey(t.Context(), token), conn), codes.ResourceExhausted,
		"AUTH_THROTTLED")
}

func TestTapCallsTheErrorMapper(t *testing.T) {
	store := openStore(t)
	_, token := issue(t, store, keystore.Spec{})
	mapper := func(
		ctx context.Context, method string, err error, byDefault *status.Status,
	) *status.Status {
		if !errors.Is(err, keystore.ErrMalformed) || method != emptyCall ||
			len(metadata.ValueFromIncomingContext(ctx, "authorization")) > 0 {
			return byDefault
		}
		return status.New(codes.NotFound, "mapped")
	}
	conn := dial(t,
		serve(t, &service{}, withTap(newAuth(t, store, interceptor.MapErrors(mapper)))...))
	require.Equal(t, codes.NotFound, status.Code(call(withKey(t.Context(), "nonsense"), conn)))
	require.NoError(t, call(withKey(t.Context(), token), conn))

	panics := func(context.Context, string, error, *status.Status) *status.Status {
		panic("in the mapper")
	}
	conn = dial(t,
		serve(t, &service{}, withTap(newAuth(t, store, interceptor.MapErrors(panics)))...))
	requireRefused(t, call(withKey(t.Context(), "nonsense"), conn), codes.Unauthenticated,
		"API_KEY_INVALID")
	require.NoError(t, call(withKey(t.Context(), token), conn), "the connection goes on")
}

func TestRevokeEndsStreamsWithTap(t *testing.T) {
	store := openStore(t)
	key, token := issue(t, store, keystore.Spec{})
	svc := &service{duplex: func(s duplexStream) error {
		_ = s.SendHeader(nil)
		return handlers["blocked in Recv"](s)
	}}
	client := testpb.NewTestServiceClient(dial(t, serve(t, svc, withTap(newAuth(t, store))...)))
	stream, err := client.FullDuplexCall(withKey(t.Context(), token))
	require.NoError(t, err)
	_, err = stream.Header()
	require.NoError(t, err)
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
}

// Each refused call with a deadline costs memory until the deadline. Above a limit, Tap leaves
// calls to the interceptors. No call is accepted.
func TestTapLimitsHeldTimers(t *testing.T) {
	const most, more = 4096, 100
	var reached atomic.Int64
	count := grpc.ChainUnaryInterceptor(func(
		ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler,
	) (any, error) {
		reached.Add(1)
		return next(ctx, req)
	})
	opts := append([]grpc.ServerOption{count}, withTap(newAuth(t, openStore(t)))...)
	conn := dial(t, serve(t, &service{}, opts...),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	for range most {
		requireRefused(t, call(ctx, conn), codes.Unauthenticated, "CREDENTIALS_MISSING")
	}
	require.Zero(t, reached.Load())
	for range more {
		requireRefused(t, call(ctx, conn), codes.Unauthenticated, "CREDENTIALS_MISSING")
	}
	require.EqualValues(t, more, reached.Load())
	requireRefused(t, call(t.Context(), conn), codes.Unauthenticated, "CREDENTIALS_MISSING")
	require.EqualValues(t, more, reached.Load(),
		"a call without a deadline holds nothing, and Tap refuses it")
}
