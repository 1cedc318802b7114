package httpkeys_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// Requests that no client library would send get a response, and reach no handler.
func TestRawRequests(t *testing.T) {
	store := keystoretest.New(t, nil)
	_, token := issue(t, store, keystore.Spec{})
	url, _ := serve(t, false, newAuth(t, store).Wrap(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = io.WriteString(w, "reached")
		})))
	good := "Authorization: Bearer " + token + "\r\n"
	for _, c := range []struct{ name, raw, want string }{
		{"HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", "HTTP/1.0 401"},
		{"HTTP/1.0 with a key", "GET / HTTP/1.0\r\n" + good + "\r\n", "HTTP/1.0 200"},
		{"Upgrade", "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
			"HTTP/1.1 401"},
		{"two keys of two cases", "GET / HTTP/1.1\r\nHost: a\r\n" + good +
			"AUTHORIZATION: Bearer " + token + "\r\n\r\n", "CREDENTIALS_SEVERAL"},
		{"Expect, and the body is not asked for", "POST / HTTP/1.1\r\nHost: a\r\n" +
			"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n", "HTTP/1.1 401"},
		{"Expect with a key", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n" + good +
			"Expect: 100-continue\r\n\r\nhello", "HTTP/1.1 100"},
		{"headers of 2 MB", "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " +
			strings.Repeat("x", 2<<20) + "\r\n\r\n", "HTTP/1.1 431"},
		{"a key in a trailer", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n" +
			"Trailer: Authorization\r\n\r\n0\r\n" + good + "\r\n", "HTTP/1.1 401"},
		{"a folded header", "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer\r\n " + token +
			"\r\nConnection: close\r\n\r\n", "HTTP/1.1 "},
		{"OPTIONS *", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200"}, // of net/http itself
		{"CONNECT", "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n", "HTTP/1.1 401"},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
			require.NoError(t, err)
			defer conn.Close()
			go func() { _, _ = io.WriteString(conn, c.raw) }()
			answer := make([]byte, 1<<12)
			n, err := io.ReadAtLeast(conn, answer, 12)
			require.NoError(t, err)
			if strings.HasPrefix(c.want, "HTTP") {
				require.True(t, strings.HasPrefix(string(answer[:n]), c.want), "%s", answer[:n])
			} else {
				require.Contains(t, string(answer[:n]), c.want)
			}
			require.NotContains(t, string(answer[:n]), token)
		})
	}
}

// Panics and http.ErrAbortHandler pass, and leave no session.
func TestPanicsPass(t *testing.T) {
	store := keystoretest.New(t, nil)
	_, token := issue(t, store, keystore.Spec{})
	handler := newAuth(t, store).Wrap(http.HandlerFunc(
		func(_ http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/abort" {
				panic(http.ErrAbortHandler)
			}
			panic("of the handler")
		}))
	for path, want := range map[string]any{"/abort": http.ErrAbortHandler, "/": "of the handler"} {
		r := httptest.NewRequest("GET", path, nil)
		r.Header.Set("Authorization", "Bearer "+token)
		require.PanicsWithValue(t, want, func() {
			handler.ServeHTTP(httptest.NewRecorder(), r)
		})
	}
	require.Zero(t, store.Stats().Live)
}

// http.TimeoutHandler works inside Wrap and around Wrap, also when the key ends.
func TestTimeoutHandler(t *testing.T) {
	for _, around := range []bool{false, true} {
		for _, revoke := range []bool{false, true} {
			t.Run(fmt.Sprint("around ", around, ", revoke ", revoke), func(t *testing.T) {
				store := keystoretest.New(t, nil)
				key, token := issue(t, store, keystore.Spec{})
				auth := newAuth(t, store)
				var handlers sync.WaitGroup
				handlers.Add(1)
				inner := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					defer handlers.Done()
					if revoke {
						assert.NoError(t, store.Revoke(t.Context(), key.ID, ""))
					}
					<-r.Context().Done()
					// The outer handler may have returned.
					_, _ = w.Write([]byte("late"))
					_, _ = io.ReadAll(r.Body)
				})
				limit := 100 * time.Millisecond
				if revoke {
					limit = time.Minute // so that the key ends first, also on a slow machine
				}
				handler := http.TimeoutHandler(auth.Wrap(inner), limit, "timeout")
				if !around {
					handler = auth.Wrap(http.TimeoutHandler(inner, limit, "timeout"))
				}
				url, client := serve(t, false, handler)
				status, p, _ := do(t, client, request(t, "POST", url, token, strings.NewReader("x")))
				handlers.Wait()
				if revoke {
					require.Equal(t, http.StatusUnauthorized, status)
					require.Equal(t, "API_KEY_REVOKED", p.Reason)
				} else {
					require.Equal(t, http.StatusServiceUnavailable, status)
				}
			})
		}
	}
}

// A goroutine of the handler may read the body after the handler has returned.
func TestReadAfterReturn(t *testing.T) {
	for _, protocol := range protocols {
		store := keystoretest.New(t, nil)
		key, token := issue(t, store, keystore.Spec{})
		started, readers := make(chan struct{}), make(chan error, 1)
		url, client := serve(t, protocol.h2, newAuth(t, store).Wrap(http.HandlerFunc(
			func(_ http.ResponseWriter, r *http.Request) {
				go func() {
					_, _ = io.ReadFull(r.Body, make([]byte, 1))
					close(started)
					_, err := io.Copy(io.Discard, r.Body)
					readers <- err
				}()
				<-started
			})))
		body, pipe := io.Pipe()
		go func() { _, _ = pipe.Write([]byte("x")) }()
		r := request(t, "POST", url, token, body)
		r.Header.Set("Connection", "close")
		answered := make(chan struct{})
		go func() {
			defer close(answered)
			response, err := client.Do(r)
			if err == nil {
				_ = response.Body.Close()
			}
		}()
		<-started
		if protocol.h2 {
			<-answered // HTTP/1.1 waits for the end of the body
		}
		require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
		require.NoError(t, pipe.Close())
		<-answered
		<-readers
	}
}

// A flood of failures from an address is refused without the store, and the log has no credential.
func TestFailuresAndLog(t *testing.T) {
	store := keystoretest.New(t, nil)
	key, token := issue(t, store, keystore.Spec{AllowedNetworks: []netip.Prefix{
		netip.MustParsePrefix("198.51.100.7/32")}})
	var text strings.Builder
	var calls []httpkeys.Call
	auth := newAuth(t, store,
		httpkeys.LimitFailures(0.001, 2),
		httpkeys.TrustProxy("X-Forwarded-For", netip.MustParsePrefix("192.0.2.0/24")),
		httpkeys.Require("GET /orders/{id}", "orders:read"),
		httpkeys.LogRefusals(slog.New(slog.NewTextHandler(&text, nil))),
		httpkeys.Observe(func(context.Context, httpkeys.Call) { panic("of the observer") }),
		httpkeys.Observe(func(_ context.Context, c httpkeys.Call) { calls = append(calls, c) }))
	send := func(from, path, credential string) int {
		r := httptest.NewRequest("GET", path, nil) // RemoteAddr is 192.0.2.1
		r.Header.Set("X-Forwarded-For", from)
		r.Header.Set("Authorization", credential)
		recorder := httptest.NewRecorder()
		auth.Wrap(http.NotFoundHandler()).ServeHTTP(recorder, r)
		return recorder.Code
	}
	require.Equal(t, 404, send("198.51.100.7", "/", "Bearer "+token))
	require.Equal(t, 403, send("198.51.100.7", "/orders/7?secret=q_secret", "Bearer "+token))
	require.Equal(t, 401, send("203.0.113.9", "/\u202e", "Bearer "+token), "another network")
	require.Equal(t, 401, send("203.0.113.9", "/", "Bearer "+token[:len(token)-1]))
	require.Equal(t, 429, send("203.0.113.9", "/", "Bearer "+token))
	require.Equal(t, 404, send("198.51.100.7", "/", "Bearer "+token), "the owner is not locked out")

	require.NotContains(t, text.String(), token[len(token)-20:])
	require.NotContains(t, text.String(), "q_secret")
	require.NotContains(t, text.String(), "\u202e")
	for _, want := range []string{
		`msg="HTTP request refused" reason=scope request="GET /orders/7" key=` + key.ID +
			" scopes=orders:read addr=198.51.100.7 proxy=192.0.2.1",
		"reason=network", "reason=malformed", "reason=throttled", "function of Observe panicked",
	} {
		require.Contains(t, text.String(), want)
	}
	var reasons []string
	for _, c := range calls {
		reasons = append(reasons, c.Refusal.Reason)
		require.False(t, c.Ended)
	}
	require.Equal(t, []string{"scope", "network", "malformed", "throttled"}, reasons)
	require.Equal(t, "GET /orders/{id}", calls[0].Pattern)
	require.ErrorIs(t, calls[1].Refusal, keystore.ErrNetworkNotAllowed)
}

// Each wrong option is an error of New.
func TestNewRefuses(t *testing.T) {
	store := keystoretest.New(t, nil)
	for _, o := range []httpkeys.Option{
		httpkeys.Public("orders"),
		httpkeys.Public("GET /a/{"),
		httpkeys.Public("/a", "/a"),
		httpkeys.Public("/{x}/b", "/a/{y}"),
		httpkeys.Require("/a"),
		httpkeys.Require("/a", "no scope"),
		httpkeys.Header("", "Bearer"),
		httpkeys.Header("Authorization", "Bearer x"),
		httpkeys.TrustProxy("X-Forwarded-For"),
		httpkeys.TrustProxyTransport("X-Forwarded-For", "tcp"),
		httpkeys.LimitFailures(0, 1),
		httpkeys.LogRefusals(nil),
		httpkeys.Observe(nil),
		httpkeys.WriteErrors(nil),
	} {
		_, err := httpkeys.New(store, o)
		require.ErrorContains(t, err, "httpkeys: ")
	}
	_, err := httpkeys.New(nil)
	require.Error(t, err)
	_, err = httpkeys.New((*keystore.Store)(nil))
	require.Error(t, err)
	_, err = httpkeys.New(store, httpkeys.Option{})
	require.NoError(t, err)
}

// Other headers, RequireTLS, RequireRules, two Authenticators, and the pattern of an inner
// ServeMux.
func TestOtherOptions(t *testing.T) {
	store := keystoretest.New(t, nil)
	_, token := issue(t, store, keystore.Spec{})
	inner := http.NewServeMux()
	inner.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.PathValue("id"))
	})
	send := func(h http.Handler, headers ...string) (*httptest.ResponseRecorder, *http.Request) {
		r := httptest.NewRequest("GET", "/orders/7", nil)
		for i := 0; i < len(headers); i += 2 {
			r.Header.Add(headers[i], headers[i+1])
		}
		recorder := httptest.NewRecorder()
		h.ServeHTTP(recorder, r)
		return recorder, r
	}
	auth := newAuth(t, store, httpkeys.Header("X-Api-Key", ""), httpkeys.Header("Authorization", "Key"))
	answer, r := send(auth.Wrap(inner), "X-Api-Key", token)
	require.Equal(t, "7", answer.Body.String())
	require.Equal(t, "GET /orders/{id}", r.Pattern, "for a middleware around Wrap")
	answer, _ = send(auth.Wrap(inner), "X-Api-Key", token, "Authorization", "Key "+token)
	require.Contains(t, answer.Body.String(), "CREDENTIALS_SEVERAL")
	answer, _ = send(auth.Wrap(inner))
	require.Equal(t, []string{`ApiKey header="x-api-key"`, "Key"},
		answer.Header().Values("WWW-Authenticate"))
	require.Contains(t, answer.Body.String(), "send it in a header, x-api-key: ")

	bearer := []string{"Authorization", "Bearer " + token}
	answer, _ = send(newAuth(t, store, httpkeys.RequireTLS()).Wrap(inner), bearer...)
	require.Contains(t, answer.Body.String(), "INSECURE_TRANSPORT")
	answer, _ = send(newAuth(t, store, httpkeys.RequireRules(),
		httpkeys.AnyKey("/other")).Wrap(inner), bearer...)
	require.Equal(t, 403, answer.Code)
	require.Contains(t, answer.Body.String(), "METHOD_HAS_NO_RULE")
	answer, _ = send(newAuth(t, store).Wrap(newAuth(t, store).Wrap(inner)), bearer...)
	require.Contains(t, answer.Body.String(), "AUTHENTICATED_TWICE")
	answer, _ = send(newAuth(t, noAnswer{}).Wrap(inner), bearer...)
	require.Equal(t, 503, answer.Code)
	custom := newAuth(t, store, httpkeys.WriteErrors(func(
		w http.ResponseWriter, _ *http.Request, _ *httpkeys.Refusal, p httpkeys.Problem,
	) {
		http.Error(w, p.Reason, p.Status)
	}))
	answer, _ = send(custom.Wrap(inner))
	require.Equal(t, "CREDENTIALS_MISSING\n", answer.Body.String())
}

// noAnswer is a faulty Verifier.
type noAnswer struct{}

func (noAnswer) Bind(context.Context, string) (*keystore.Session, error) { return nil, nil }

// A hijacked connection is closed after its handler had time to say goodbye.
func TestHijackedConnection(t *testing.T) {
	for _, watches := range []bool{true, false} {
		store := keystoretest.New(t, nil)
		key, token := issue(t, store, keystore.Spec{})
		returned := make(chan struct{})
		url, _ := serve(t, false, newAuth(t, store).Wrap(http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {
				defer close(returned)
				conn, buffered, err := w.(http.Hijacker).Hijack()
				if !assert.NoError(t, err) {
					return
				}
				defer conn.Close()
				_, _ = io.WriteString(conn, "hello\n")
				if watches {
					<-r.Context().Done()
					_, err = io.WriteString(conn, "goodbye\n")
					assert.NoError(t, err)
					return
				}
				_, err = buffered.ReadString('\n')
				assert.ErrorIs(t, err, net.ErrClosed)
			})))
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		require.NoError(t, err)
		_, err = fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\n\r\n",
			token)
		require.NoError(t, err)
		lines := bufio.NewReader(conn)
		line, err := lines.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "hello\n", line)
		require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
		rest, err := io.ReadAll(lines)
		require.NoError(t, err)
		if watches {
			require.Equal(t, "goodbye\n", string(rest))
		}
		<-returned
		require.NoError(t, conn.Close())
	}
}

// dialHijack sends a request, and a text immediately after the request, to a handler that hijacks
// the connection.
func dialHijack(t *testing.T, url, token, early string) net.Conn {
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	_, err = fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %s\r\n\r\n%s",
		token, early)
	require.NoError(t, err)
	return conn
}

// No message that a client sends after Revoke has returned arrives on a hijacked connection, and
// the handler can still say goodbye.
func TestNothingArrivesOnAHijackedConnection(t *testing.T) {
	store := keystoretest.New(t, nil)
	key, token := issue(t, store, keystore.Spec{})
	read, done := make(chan string, 8), make(chan error, 1)
	url, _ := serve(t, false, newAuth(t, store).Wrap(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			conn, buffered, err := w.(http.Hijacker).Hijack()
			if err != nil {
				done <- err
				return
			}
			defer conn.Close()
			defer context.AfterFunc(r.Context(), func() {
				_, _ = io.WriteString(conn, "goodbye\n")
				_ = conn.(interface{ CloseWrite() error }).CloseWrite()
			})()
			for {
				line, err := buffered.ReadString('\n')
				if err != nil {
					done <- err
					return
				}
				read <- line
			}
		})))
	conn := dialHijack(t, url, token, "early\n")
	require.Equal(t, "early\n", <-read)
	_, err := io.WriteString(conn, "before\n")
	require.NoError(t, err)
	require.Equal(t, "before\n", <-read)
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err = io.WriteString(conn, "after\n")
	require.NoError(t, err)
	rest, err := io.ReadAll(conn)
	require.NoError(t, err)
	require.Equal(t, "goodbye\n", string(rest))
	require.NoError(t, conn.Close())
	require.Error(t, <-done)
	require.Empty(t, read)
}

// A key ends a hijacked connection even if the handler has returned and left the connection to
// other goroutines. A session does not outlive its connection.
func TestHijackedConnectionOfAHandlerThatHasReturned(t *testing.T) {
	store := keystoretest.New(t, nil)
	key, token := issue(t, store, keystore.Spec{})
	conns, returned := make(chan net.Conn, 1), make(chan struct{})
	handler := newAuth(t, store).Wrap(http.HandlerFunc(
		func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if !assert.NoError(t, err) {
				return
			}
			conns <- conn
		}))
	url, _ := serve(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r)
		returned <- struct{}{}
	}))
	dialHijack(t, url, token, "")
	conn := <-conns
	<-returned
	require.EqualValues(t, 1, store.Stats().Live)
	require.NoError(t, conn.Close())
	require.Zero(t, store.Stats().Live)

	dialHijack(t, url, token, "")
	conn = <-conns
	<-returned
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, net.ErrClosed)
	require.ErrorIs(t, conn.Close(), net.ErrClosed)
}

// A slowHijacker is a ResponseWriter whose Hijack takes so long that the key ends before.
type slowHijacker struct {
	http.ResponseWriter
	during func()
	conn   net.Conn
}

func (w *slowHijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.during()
	return w.conn, bufio.NewReadWriter(bufio.NewReader(w.conn), bufio.NewWriter(w.conn)), nil
}

// A connection that is hijacked while its key ends is closed.
func TestRevokeDuringHijack(t *testing.T) {
	store := keystoretest.New(t, nil)
	key, token := issue(t, store, keystore.Spec{})
	server, client := net.Pipe()
	w := &slowHijacker{ResponseWriter: httptest.NewRecorder(), conn: server,
		during: func() { require.NoError(t, store.Revoke(t.Context(), key.ID, "")) }}
	newAuth(t, store).Wrap(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _, err := w.(http.Hijacker).Hijack()
		require.ErrorIs(t, err, keystore.ErrRevoked)
	})).ServeHTTP(w, request(t, "GET", "/", token, nil))
	_, err := client.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}

// A request takes its cost from the credits of its key, and a refused request takes nothing.
func TestCost(t *testing.T) {
	store := keystoretest.New(t, nil)
	_, token := issue(t, store, keystore.Spec{Credits: &keystore.Credits{Remaining: 3}})
	auth := newAuth(t, store, httpkeys.Cost(2, "GET /report"), httpkeys.Cost(0, "GET /free"),
		httpkeys.Require("GET /forbidden", "a"))
	for _, c := range []struct {
		path string
		want int
	}{
		{"/forbidden", 403}, {"/free", 404}, {"/report", 404}, {"/report", 429}, {"/", 404}, {"/", 429},
		{"/free", 404},
	} {
		r := httptest.NewRequest("GET", c.path, nil)
		r.Header.Set("Authorization", "Bearer "+token)
		recorder := httptest.NewRecorder()
		auth.Wrap(http.NotFoundHandler()).ServeHTTP(recorder, r)
		require.Equal(t, c.want, recorder.Code, c.path)
		if c.want == 429 {
			require.Contains(t, recorder.Body.String(), "CREDITS_EXHAUSTED")
			require.Empty(t, recorder.Header().Get("Retry-After"), "there is no refill")
		}
	}
}

// A slowLease calls during before a lease of credits is written.
type slowLease struct {
	backend.Backend
	during func()
}

func (b *slowLease) Apply(ctx context.Context, changes ...backend.Change) error {
	if len(changes) == 1 && b.during != nil { // a change of a key has an event too
		b.during()
	}
	return b.Backend.Apply(ctx, changes...)
}

// A request whose credits arrive after Revoke has returned does not reach the handler.
func TestRevokeWhileCreditsAreLeased(t *testing.T) {
	slow := &slowLease{Backend: memory.New()}
	store, err := keystore.New(slow, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	key, token := issue(t, store, keystore.Spec{Credits: &keystore.Credits{Remaining: 3}})
	slow.during = sync.OnceFunc(func() {
		assert.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	})
	answer := httptest.NewRecorder()
	newAuth(t, store).Wrap(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the handler runs")
	})).ServeHTTP(answer, request(t, "GET", "/", token, nil))
	require.Equal(t, http.StatusUnauthorized, answer.Code)
	require.Contains(t, answer.Body.String(), "API_KEY_INVALID")
}
