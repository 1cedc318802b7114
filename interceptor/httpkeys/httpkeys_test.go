package httpkeys_test

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func issue(t testing.TB, s *keystore.Store, spec keystore.Spec) (*keystore.Key, string) {
	t.Helper()
	if spec.Name == "" {
		spec.Name = "test"
	}
	issued := keystoretest.MustCreate(t, s, spec)
	return issued.Key, issued.Secret.Reveal()
}

func newAuth(t testing.TB, v httpkeys.Verifier, opts ...httpkeys.Option) *httpkeys.Authenticator {
	t.Helper()
	a, err := httpkeys.New(v, opts...)
	require.NoError(t, err)
	return a
}

// serve runs a server on a real socket until the test ends. With h2, the server speaks HTTP/2 over
// TLS. The log of the http.Server fails the test if a handler panics, except with ErrAbortHandler.
func serve(t testing.TB, h2 bool, h http.Handler) (url string, client *http.Client) {
	t.Helper()
	server := httptest.NewUnstartedServer(h)
	server.EnableHTTP2 = h2
	server.Config.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(failingWriter{t}, nil), 0)
	if h2 {
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	client = server.Client()
	client.Transport.(*http.Transport).MaxIdleConnsPerHost = 1000
	return server.URL, client
}

type failingWriter struct{ t testing.TB }

func (w failingWriter) Write(line []byte) (int, error) {
	if strings.Contains(string(line), "panic") {
		w.t.Errorf("the server logged %s", line)
	}
	return len(line), nil
}

func request(t testing.TB, method, url, token string, body io.Reader) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, body)
	require.NoError(t, err)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	return r
}

// do returns the status and the problem of a response.
func do(t testing.TB, client *http.Client, r *http.Request) (int, problem, http.Header) {
	t.Helper()
	response, err := client.Do(r)
	require.NoError(t, err)
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	require.NoError(t, err)
	var p problem
	if response.Header.Get("Content-Type") == "application/problem+json" && len(body) > 0 {
		require.NoError(t, json.Unmarshal(body, &p), "%s", body)
		require.Equal(t, response.StatusCode, p.Status)
		require.Equal(t, "no-store", response.Header.Get("Cache-Control"))
	}
	return response.StatusCode, p, response.Header
}

type problem struct {
	Title, Detail, Reason string
	Status                int
	Scopes                []string
}

// Each refusal has its status, its reason and its headers, in HTTP/1.1 and in HTTP/2.
func TestRefusals(t *testing.T) {
	store := keystoretest.New(t, nil)
	good, token := issue(t, store, keystore.Spec{Scopes: []string{"orders:read"}})
	revoked, revokedToken := issue(t, store, keystore.Spec{})
	require.NoError(t, store.Revoke(t.Context(), revoked.ID, ""))
	auth := newAuth(t, store,
		httpkeys.Public("GET /open", "/static/"),
		httpkeys.Optional("GET /maybe"),
		httpkeys.Require("GET /orders/{id}", "orders:read"),
		httpkeys.Require("DELETE /orders/{id}", "orders:write", "orders:read"),
		httpkeys.RequireAny("GET /any", "orders:write", "orders:read"),
	)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		assert.Empty(t, r.Header.Values("Authorization"), "the handler gets no credential")
		key, ok := httpkeys.FromContext(r.Context())
		also, _ := interceptor.FromContext(r.Context())
		assert.Equal(t, key, also, "one context key for gRPC and HTTP")
		if ok {
			w.Header().Set("Key", key.ID)
		}
	})
	for _, h2 := range []bool{false, true} {
		url, client := serve(t, h2, auth.Wrap(handler))
		_, limited := issue(t, store, keystore.Spec{
			RateLimit: keystore.RateLimit{PerSecond: 0.001, Burst: 1}})
		for _, c := range []struct {
			name, method, path string
			credentials        []string
			status             int
			reason, challenge  string
		}{
			{"a good key", "GET", "/", []string{"Bearer " + token}, 200, "", ""},
			{"lower case", "GET", "/", []string{"bearer " + token}, 200, "", ""},
			{"upper case", "GET", "/", []string{"BEARER  " + token + " "}, 200, "", ""},
			{"no key", "GET", "/", nil, 401, "CREDENTIALS_MISSING", "Bearer"},
			{"an empty header", "GET", "/", []string{""}, 401, "CREDENTIALS_MISSING", "Bearer"},
			{"a scheme alone", "GET", "/", []string{"Bearer"}, 401, "CREDENTIALS_MISSING", "Bearer"},
			{"Basic", "GET", "/", []string{"Basic dTpw"}, 401, "CREDENTIALS_SCHEME_INVALID", "Bearer"},
			{"no scheme", "GET", "/", []string{token}, 401, "CREDENTIALS_SCHEME_MISSING", "Bearer"},
			{"two keys", "GET", "/", []string{"Bearer " + token, "Bearer " + token}, 401,
				"CREDENTIALS_SEVERAL", "Bearer"},
			{"two keys in a line", "GET", "/", []string{"Bearer " + token + ", Bearer " + token},
				401, "API_KEY_INVALID", `Bearer error="invalid_token"`},
			{"junk", "GET", "/", []string{"Bearer junk"}, 401, "API_KEY_INVALID",
				`Bearer error="invalid_token"`},
			{"a long junk", "GET", "/", []string{"Bearer " + strings.Repeat("j", 100_000)}, 401,
				"API_KEY_INVALID", `Bearer error="invalid_token"`},
			{"a revoked key", "GET", "/", []string{"Bearer " + revokedToken}, 401,
				"API_KEY_INVALID", `Bearer error="invalid_token"`},
			{"HEAD", "HEAD", "/", nil, 401, "", "Bearer"},
			{"OPTIONS", "OPTIONS", "/", nil, 401, "CREDENTIALS_MISSING", "Bearer"},
			{"public", "GET", "/open", nil, 200, "", ""},
			{"public, with a bad key", "GET", "/open", []string{"Bearer junk"}, 200, "", ""},
			{"public is HEAD too", "HEAD", "/open", nil, 200, "", ""},
			{"not public", "POST", "/open", nil, 401, "CREDENTIALS_MISSING", "Bearer"},
			{"a public tree", "GET", "/static/a/b", nil, 200, "", ""},
			{"the root of a public tree", "GET", "/static", nil, 200, "", ""},
			{"out of the tree", "GET", "/static/../orders/7", nil, 400, "PATH_AMBIGUOUS", ""},
			{"out of the tree, encoded", "GET", "/static/%2e%2e/orders/7", nil, 400,
				"PATH_AMBIGUOUS", ""},
			{"an encoded slash", "GET", "/static%2fa", nil, 400, "PATH_AMBIGUOUS", ""},
			{"double slashes", "GET", "//orders//7", []string{"Bearer " + token}, 400,
				"PATH_AMBIGUOUS", ""},
			{"double slashes under one rule", "GET", "/static//a", nil, 200, "", ""},
			{"optional, without a key", "GET", "/maybe", nil, 200, "", ""},
			{"optional, with a key", "GET", "/maybe", []string{"Bearer " + token}, 200, "", ""},
			{"optional, with a bad key", "GET", "/maybe", []string{"Bearer junk"}, 401,
				"API_KEY_INVALID", `Bearer error="invalid_token"`},
			{"has the scope", "GET", "/orders/7", []string{"Bearer " + token}, 200, "", ""},
			{"lacks a scope", "DELETE", "/orders/7", []string{"Bearer " + token}, 403,
				"INSUFFICIENT_SCOPE",
				`Bearer error="insufficient_scope", scope="orders:write orders:read"`},
			{"an encoded slash in a segment", "GET", "/orders/7%2f8", []string{"Bearer " + token},
				400, "PATH_AMBIGUOUS", ""},
			{"has one of the scopes", "GET", "/any", []string{"Bearer " + token}, 200, "", ""},
			{"lacks all scopes", "GET", "/any", []string{"Bearer " + limited}, 403,
				"INSUFFICIENT_SCOPE",
				`Bearer error="insufficient_scope", scope="orders:write orders:read"`},
			{"over its limit", "GET", "/", []string{"Bearer " + limited}, 429,
				"RATE_LIMIT_EXCEEDED", ""},
		} {
			t.Run(c.name, func(t *testing.T) {
				r := request(t, c.method, url+c.path, "", nil)
				for _, value := range c.credentials {
					r.Header.Add("Authorization", value)
				}
				status, p, header := do(t, client, r)
				require.Equal(t, c.status, status, p.Reason)
				require.Equal(t, c.reason, p.Reason)
				require.Equal(t, c.challenge, header.Get("WWW-Authenticate"))
				if len(c.credentials) == 1 && c.status == 200 && c.path != "/open" {
					require.Equal(t, good.ID, header.Get("Key"))
				}
				if c.name == "lacks a scope" {
					require.Contains(t, p.Detail, "needs: orders:write, orders:read")
				}
				if c.status == 429 {
					require.NotEmpty(t, header.Get("Retry-After"))
				}
			})
		}
	}
	require.NoError(t, store.Close())
	url, client := serve(t, false, auth.Wrap(handler))
	status, p, header := do(t, client, request(t, "GET", url, token, nil))
	require.Equal(t, http.StatusServiceUnavailable, status)
	require.Equal(t, "AUTH_BACKEND_UNAVAILABLE", p.Reason)
	require.Contains(t, []string{"1", "2"}, header.Get("Retry-After"))
}
