package interceptor_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A logBook is the output of a logger. It is safe for concurrent use.
type logBook struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *logBook) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBook) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

func (b *logBook) logger() *slog.Logger { return slog.New(slog.NewJSONHandler(b, nil)) }

// lines returns the logged lines, without the time.
func (b *logBook) lines(t testing.TB) (lines []map[string]any) {
	t.Helper()
	for _, text := range strings.Split(strings.TrimSpace(b.String()), "\n") {
		if text == "" {
			continue
		}
		line := make(map[string]any)
		require.NoError(t, json.Unmarshal([]byte(text), &line), "%s", text)
		delete(line, "time")
		lines = append(lines, line)
	}
	return lines
}

// logDefault sends the output of slog.Default to the logBook until the test ends.
func logDefault(t testing.TB) *logBook {
	book := new(logBook)
	before := slog.Default()
	slog.SetDefault(book.logger())
	t.Cleanup(func() { slog.SetDefault(before) })
	return book
}

type addr string

func (addr) Network() string  { return "tcp" }
func (a addr) String() string { return string(a) }

// incoming returns the context of a call from an address, as gRPC gives it to a handler.
func incoming(ctx context.Context, from string, md ...string) context.Context {
	return peer.NewContext(metadata.NewIncomingContext(ctx, metadata.Pairs(md...)),
		&peer.Peer{Addr: addr(from)})
}

// A serverStream is a stream without a transport.
type serverStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s serverStream) Context() context.Context { return s.ctx }

// directStream opens a stream without a server. The handler does nothing.
func directStream(ctx context.Context, a *interceptor.Authenticator, method string) error {
	return a.Stream()(nil, serverStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: method},
		func(any, grpc.ServerStream) error {
			return nil
		})
}

// A nothing is a faulty Verifier: its error is nil, and at least one other result is nil too.
type nothing struct {
	verifier
	session func() *keystore.Session
}

func (n nothing) Bind(context.Context, string) (*keystore.Session, error) {
	return n.session(), nil
}

func TestVerifierReturnsNothing(t *testing.T) {
	for name, session := range map[string]func() *keystore.Session{
		"nothing":          func() *keystore.Session { return nil },
		"the zero Session": func() *keystore.Session { return new(keystore.Session) },
		"no key": func() *keystore.Session {
			session := keystore.NewSession(context.Background(), nil)
			t.Cleanup(func() { require.Error(t, session.Context().Err(), "it was closed") })
			return session
		},
	} {
		v := nothing{session: session}
		for _, opts := range [][]interceptor.Option{
			nil, {interceptor.Require(emptyCall, "a"), interceptor.Require(duplex, "a")},
		} {
			t.Run(name, func(t *testing.T) {
				book := logDefault(t)
				auth := newAuth(t, v, opts...)
				handler := func() { t.Error("let in") }
				svc := &service{
					empty:  func(context.Context) error { handler(); return nil },
					duplex: func(duplexStream) error { handler(); return nil },
				}
				conn := dial(t, serve(t, svc, auth.ServerOptions()...))
				for _, err := range both(withKey(t.Context(), "k"), conn) {
					requireRefused(t, err, codes.Unavailable, "AUTH_BACKEND_UNAVAILABLE")
				}
				lines := book.lines(t)
				require.Len(t, lines, 2)
				for _, line := range lines {
					require.Equal(t, "ERROR", line["level"])
					require.Equal(t, "unavailable", line["reason"])
					require.Contains(t, line["error"], "the Verifier returned no key and no error")
				}
			})
		}
	}
}

// If an ErrorMapper panics, callers get the default status, no goroutine or context remains, and
// the log has the panic.
func TestErrorMapperPanics(t *testing.T) {
	store := openStore(t)
	key, good := issue(t, store, keystore.Spec{})
	book := logDefault(t)
	mapper := interceptor.MapErrors(func(
		context.Context, string, error, *status.Status,
	) *status.Status {
		panic(errors.New("in the mapper\nof the test"))
	})
	svc := &service{duplex: echo}
	conn := dial(t, serve(t, svc, newAuth(t, store, mapper).ServerOptions()...))
	for _, err := range both(withKey(t.Context(), "nonsense"), conn) {
		requireRefused(t, err, codes.Unauthenticated, "API_KEY_INVALID")
	}
	scoped := dial(t,
		serve(t, svc,
			newAuth(t, store, mapper, interceptor.Require(emptyCall, "a"),
				interceptor.Require(duplex, "a")).ServerOptions()...))
	for range 10 {
		for _, err := range both(withKey(t.Context(), good), scoped) {
			requireRefused(t, err, codes.PermissionDenied, "INSUFFICIENT_SCOPE")
		}
	}
	require.Zero(t, store.Stats().Live)
	_, limited := issue(t, store,
		keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 0.001, Burst: 1}})
	counted := dial(t,
		serve(t, svc, newAuth(t, store, mapper, interceptor.LimitMessages()).ServerOptions()...))
	requireRefused(t, exchange(withKey(t.Context(), limited), counted, 1), codes.ResourceExhausted,
		"RATE_LIMIT_EXCEEDED")
	stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(withKey(t.Context(), good))
	require.NoError(t, err)
	require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
	_, err = stream.Recv()
	require.NoError(t, err)
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err = stream.Recv()
	requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	line := book.lines(t)[0]
	require.Equal(t, "ErrorMapper panicked: the caller gets the default status", line["msg"])
	require.Equal(t, "*errors.errorString", line["panic"], "the value may hold a credential")
	require.NotContains(t, book.String(), "of the test")
	require.Contains(t, line["stack"], "report_test.go")
}

// A refusals records the refusals that an ErrorMapper gets.
type refusals struct {
	mu  sync.Mutex
	all []*interceptor.Refusal
}

func (r *refusals) option() interceptor.Option {
	return interceptor.MapErrors(func(
		_ context.Context, _ string, err error, byDefault *status.Status,
	) *status.Status {
		r.mu.Lock()
		defer r.mu.Unlock()
		refusal := (*interceptor.Refusal)(nil)
		if !errors.As(err, &refusal) {
			return status.New(codes.Internal, fmt.Sprintf("%T", err))
		}
		r.all = append(r.all, refusal)
		return byDefault
	})
}

func (r *refusals) last(t testing.TB) *interceptor.Refusal {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	require.NotEmpty(t, r.all)
	return r.all[len(r.all)-1]
}

// The ErrorMapper and the log get each reason, the address of the caller, and the key if the caller
// has the key.
func TestRefusalsAreExplained(t *testing.T) {
	store := openStore(t)
	make := func(spec keystore.Spec) (string, string) {
		key, token := issue(t, store, spec)
		return key.ID, token
	}
	good, goodToken := make(keystore.Spec{})
	revoked, revokedToken := make(keystore.Spec{})
	require.NoError(t, store.Revoke(t.Context(), revoked, ""))
	disabled, disabledToken := make(keystore.Spec{})
	require.NoError(t, store.Disable(t.Context(), disabled, ""))
	early, earlyToken := make(keystore.Spec{NotBefore: time.Now().Add(time.Hour)})
	elsewhere, elsewhereToken := make(keystore.Spec{AllowedNetworks: networks("192.0.2.0/24")})
	limited, limitedToken := make(
		keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1e-9, Burst: 1}})
	_, err := store.Verify(t.Context(), limitedToken)
	require.NoError(t, err)
	_, foreignToken := issue(t, openStore(t), keystore.Spec{})
	closed := openStore(t)
	require.NoError(t, closed.Close())
	bearer := func(token string) []string { return []string{"authorization", "Bearer " + token} }

	for _, c := range []struct {
		reason, key string
		md          []string
		level       string
		v           interceptor.Verifier
		o           interceptor.Option
	}{
		{"missing", "", nil, "WARN", store, interceptor.Option{}},
		{"scheme", "", []string{"authorization", goodToken}, "WARN", store, interceptor.Option{}},
		{
			"scheme", "", []string{"authorization", "Basic " + goodToken}, "WARN", store,
			interceptor.Option{},
		},
		{
			"several", "", append(bearer(goodToken), bearer(goodToken)...), "WARN", store,
			interceptor.Option{},
		},
		{"insecure", "", bearer(goodToken), "WARN", store, interceptor.RequireTLS()},
		{"malformed", "", bearer(goodToken + "x"), "WARN", store, interceptor.Option{}},
		{"unknown", "", bearer(foreignToken), "WARN", store, interceptor.Option{}},
		{"revoked", revoked, bearer(revokedToken), "WARN", store, interceptor.Option{}},
		{"disabled", disabled, bearer(disabledToken), "WARN", store, interceptor.Option{}},
		{"not_yet_valid", early, bearer(earlyToken), "WARN", store, interceptor.Option{}},
		{"network", elsewhere, bearer(elsewhereToken), "WARN", store, interceptor.Option{}},
		{"rate_limited", limited, bearer(limitedToken), "WARN", store, interceptor.Option{}},
		{"scope", good, bearer(goodToken), "WARN", store, interceptor.Require("/p.S/M", "a", "b")},
		{"no_rule", "", bearer(goodToken), "WARN", store, interceptor.RequireRules()},
		{"closed", "", bearer(goodToken), "ERROR", closed, interceptor.Option{}},
		{
			"unavailable", "", bearer(goodToken), "ERROR",
			verifier{fmt.Errorf("disk: %w", keystore.ErrUnavailable)}, interceptor.Option{},
		},
		{
			"other", "", bearer(goodToken), "ERROR", verifier{errors.New("disk: surprise")},
			interceptor.Option{},
		},
	} {
		type caller = func(context.Context, *interceptor.Authenticator, string) error
		for kind, do := range map[string]caller{"unary": direct, "stream": directStream} {
			t.Run(c.reason+" "+kind, func(t *testing.T) {
				var mapped refusals
				book := new(logBook)
				auth := newAuth(t, c.v, c.o, mapped.option(),
					interceptor.LogRefusals(book.logger()),
					interceptor.TrustProxy("x-forwarded-for", networks("10.0.0.0/8")...))
				ctx := incoming(t.Context(), "10.0.0.4:5555",
					append([]string{"x-forwarded-for", "203.0.113.9"}, c.md...)...)
				require.Error(t, do(ctx, auth, "/p.S/M"))

				got := mapped.last(t)
				require.Equal(t, c.reason, got.Reason)
				require.Equal(t, c.key, got.KeyID)
				require.Equal(t, "/p.S/M", got.Method)
				require.Equal(t, "203.0.113.9", got.Addr.String())
				require.Equal(t, "10.0.0.4", got.Proxy)
				require.ErrorContains(t, got,
					": the call came from 203.0.113.9 through proxy 10.0.0.4")

				want := map[string]any{"level": c.level, "msg": "gRPC call refused",
					"reason": c.reason, "method": "/p.S/M",
					"addr": "203.0.113.9", "proxy": "10.0.0.4"}
				if c.key != "" {
					want["key"] = c.key
				}
				if c.reason == "scope" {
					want["scopes"] = "a b"
				}
				if c.level == "ERROR" {
					want["error"] = errors.Unwrap(got).Error()
				}
				require.Equal(t, []map[string]any{want}, book.lines(t))
				for _, token := range []string{
					goodToken, revokedToken, foreignToken, limitedToken, elsewhereToken, earlyToken,
					disabledToken,
				} {
					secret := token[35:]
					require.False(t, strings.Contains(book.String(), secret),
						"the credential is in the log")
					require.False(t,
						strings.Contains(fmt.Sprintf("%v %+v %#v", got, got, got), secret),
						"the credential is in the error")
				}
			})
		}
	}
	t.Run("throttled", func(t *testing.T) {
		var mapped refusals
		auth := newAuth(t, store, mapped.option(), interceptor.LimitFailures(0.001, 1))
		ctx := incoming(t.Context(), "203.0.113.9")
		require.Error(t, direct(ctx, auth, emptyCall))
		require.Error(t, direct(ctx, auth, emptyCall))
		require.Equal(t, "throttled", mapped.last(t).Reason)
		require.Empty(t, mapped.last(t).Proxy)
		require.ErrorContains(t, mapped.last(t), ": the call came from 203.0.113.9")
	})
	t.Run("wrong network", func(t *testing.T) {
		var mapped refusals
		auth := newAuth(t, store, mapped.option(),
			interceptor.TrustProxyTransport("x-forwarded-for", "bufconn"))
		require.Error(t,
			direct(incoming(t.Context(), "", bearer(elsewhereToken)...), auth, emptyCall))
		require.EqualError(t, mapped.last(t),
			"API key denied: wrong network: the call came from an unknown address")
		require.ErrorIs(t, mapped.last(t), keystore.ErrNetworkNotAllowed)
	})
	t.Run("canceled", func(t *testing.T) {
		book := new(logBook)
		auth := newAuth(t, slow{}, interceptor.LogRefusals(book.logger()))
		ctx, cancel := context.WithCancel(incoming(t.Context(), "203.0.113.9:1", bearer("k")...))
		cancel()
		require.Error(t, direct(ctx, auth, emptyCall))
		require.Equal(t,
			[]map[string]any{{"level": "INFO", "msg": "gRPC call refused", "reason": "canceled",
				"method": emptyCall,
				"addr":   "203.0.113.9"}}, book.lines(t))
	})
	_, err = interceptor.New(store, interceptor.LogRefusals(nil))
	require.ErrorContains(t, err, "the logger is nil")
}

// A stream that ends with its key is logged once, with the key, on each transport.
func TestEndsOfStreamsAreExplained(t *testing.T) {
	for name, connect := range map[string]connector{
		"grpc-go's transport": func(svc *service, opts ...grpc.ServerOption) *grpc.ClientConn {
			return dial(t, serve(t, svc, opts...))
		},
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
			var mapped refusals
			book := new(logBook)
			over := make(chan struct{}, 1)
			outer := grpc.ChainStreamInterceptor(func(
				srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
			) error {
				defer func() { over <- struct{}{} }()
				return next(srv, ss)
			})
			opts := newAuth(t, store, mapped.option(), interceptor.LogRefusals(book.logger()),
				interceptor.LimitMessages()).ServerOptions()
			conn := connect(&service{duplex: echo}, append([]grpc.ServerOption{outer}, opts...)...)
			for reason, end := range map[string]func(id string) error{
				"revoked":  func(id string) error { return store.Revoke(t.Context(), id, "") },
				"disabled": func(id string) error { return store.Disable(t.Context(), id, "") },
				"narrowed": func(id string) error {
					_, err := store.Update(t.Context(), id, func(s *keystore.Spec) error {
						s.Scopes = nil
						return nil
					})
					return err
				},
				"rate_limited": nil,
			} {
				spec := keystore.Spec{Scopes: []string{"a"}}
				if end == nil {
					spec.RateLimit = keystore.RateLimit{PerSecond: 1e-9, Burst: 2}
				}
				key, token := issue(t, store, spec)
				stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
					withKey(t.Context(), token),
				)
				require.NoError(t, err)
				require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
				_, err = stream.Recv()
				require.NoError(t, err)
				if end != nil {
					require.NoError(t, end(key.ID))
				} else {
					require.NoError(t, stream.Send(&testpb.StreamingOutputCallRequest{}))
				}
				_, err = stream.Recv()
				require.Error(t, err)
				<-over

				got := mapped.last(t)
				require.Equal(t, reason, got.Reason)
				require.Equal(t, key.ID, got.KeyID)
				require.Equal(t, duplex, got.Method)
				require.Equal(t, "127.0.0.1", got.Addr.String())
				lines := book.lines(t)
				require.Equal(t,
					map[string]any{"level": "WARN", "msg": "gRPC call ended with its API key",
						"reason": reason,
						"method": duplex, "key": key.ID, "addr": "127.0.0.1"}, lines[len(lines)-1])
			}
			require.Len(t, book.lines(t), 4)
			require.Len(t, mapped.all, 4)
		})
	}
}

// In a flood, lines are dropped and counted for each reason. Callers cannot make the log larger by
// varying their texts.
func TestLogIsSampled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		book := new(logBook)
		unknown := newAuth(t, verifier{keystore.ErrUnknown}, interceptor.LogRefusals(book.logger()))
		flood := func(n int) {
			for i := range n {
				require.Error(t,
					direct(
						incoming(t.Context(), fmt.Sprintf("192.0.2.%d", i%256), "authorization",
							"Bearer k"), unknown,
						fmt.Sprintf("/p.S/M%d", i)))
			}
		}
		flood(1000)
		require.Len(t, book.lines(t), 10)
		require.Error(t, direct(incoming(t.Context(), "192.0.2.1"), unknown, emptyCall))
		lines := book.lines(t)
		require.Len(t, lines, 11, "another reason has a share of its own")
		require.Equal(t, "missing", lines[10]["reason"])
		time.Sleep(time.Second)
		flood(1000)
		lines = book.lines(t)
		require.Len(t, lines, 12)
		require.EqualValues(t, 990, lines[11]["suppressed"])
		time.Sleep(time.Hour)
		flood(1000)
		lines = book.lines(t)
		require.Len(t, lines, 22)
		require.EqualValues(t, 999, lines[12]["suppressed"])
		require.NotContains(t, lines[13], "suppressed")
	})
}

// The method is the only text of callers in the log, with a bounded length and without unprintable
// characters.
func TestLogOfAHostileMethod(t *testing.T) {
	method := "/p.S/\n\x1b[31mfake level=ERROR \xff\u202e\u0085" + strings.Repeat("x", 1<<20)
	for name, handler := range map[string]func(*logBook) slog.Handler{
		"text": func(b *logBook) slog.Handler { return slog.NewTextHandler(b, nil) },
		"JSON": func(b *logBook) slog.Handler { return slog.NewJSONHandler(b, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			book := new(logBook)
			auth := newAuth(t, verifier{keystore.ErrUnknown},
				interceptor.LogRefusals(slog.New(handler(book))))
			require.Error(t,
				direct(incoming(t.Context(), "192.0.2.1", "authorization", "Bearer k"), auth,
					method))
			require.Less(t, len(book.String()), 1000)
			require.Equal(t, 1, strings.Count(book.String(), "\n"), "%q", book.String())
			for _, raw := range []string{"\x1b", "\u202e", "\u0085", "\xff"} {
				require.False(t, strings.Contains(book.String(), raw), "%q", raw)
			}
			require.Contains(t, book.String(), "bytes)")
		})
	}
}

// A handlerFunc is a slog.Handler that calls a function of a test.
type handlerFunc func(slog.Record)

func (handlerFunc) Enabled(context.Context, slog.Level) bool        { return true }
func (f handlerFunc) Handle(_ context.Context, r slog.Record) error { f(r); return nil }
func (f handlerFunc) WithAttrs([]slog.Attr) slog.Handler            { return f }
func (f handlerFunc) WithGroup(string) slog.Handler                 { return f }

// A logger that panics does not end the process or a call. A logger that blocks does not delay the
// clients of streams that end.
func TestLoggerPanics(t *testing.T) {
	for name, handle := range map[string]func(release <-chan struct{}){
		"panics": func(<-chan struct{}) { panic("in the logger") },
		"blocks": func(release <-chan struct{}) { <-release },
	} {
		t.Run(name, func(t *testing.T) {
			store := openStore(t)
			key, token := issue(t, store, keystore.Spec{})
			release := make(chan struct{})
			var logged atomic.Int64
			logger := slog.New(handlerFunc(func(slog.Record) {
				logged.Add(1)
				handle(release)
			}))
			received := make(chan error, 1)
			svc := &service{duplex: func(s duplexStream) error {
				_ = s.SendHeader(nil)
				_, err := s.Recv()
				received <- err
				return err
			}}
			over := make(chan struct{})
			outer := grpc.ChainStreamInterceptor(func(
				srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
			) error {
				defer close(over)
				return next(srv, ss)
			})
			opts := append([]grpc.ServerOption{outer},
				newAuth(t, store, interceptor.LogRefusals(logger)).ServerOptions()...)
			conn := dial(t, serve(t, svc, opts...))
			stream, err := testpb.NewTestServiceClient(conn).FullDuplexCall(
				withKey(t.Context(), token),
			)
			require.NoError(t, err)
			_, err = stream.Header()
			require.NoError(t, err)
			require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
			_, err = stream.Recv()
			requireRefused(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
			requireRefused(t, <-received, codes.Unauthenticated, "API_KEY_REVOKED")
			close(release)
			<-over
			if name == "panics" {
				requireRefused(t, call(withKey(t.Context(), token), conn), codes.Unauthenticated,
					"API_KEY_INVALID")
				require.EqualValues(t, 2, logged.Load())
			}
		})
	}
}

var _ net.Addr = addr("")
