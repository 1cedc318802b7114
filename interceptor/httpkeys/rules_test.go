package httpkeys_test

import (
	"bufio"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// The rule of a CONNECT request is that of its path, as with other methods. A ServeMux cleans no
// path of CONNECT, and compares the host with its port. If the ServeMux would choose another rule,
// the request is refused.
func TestRulesOfCONNECT(t *testing.T) {
	store := keystoretest.New(t, nil)
	_, token := issue(t, store, keystore.Spec{})
	h := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
	all := newAuth(t, store, httpkeys.Require("/", "admin"))
	some := newAuth(t, store,
		httpkeys.Require("/admin/", "admin"),
		httpkeys.Require("/orders/{id}/", "admin"),
		httpkeys.Require("CONNECT /tunnel", "admin"),
		httpkeys.Require("a.example/host", "admin"),
		httpkeys.AnyKey("/orders/7/items"),
	)
	for _, c := range []struct {
		auth         *httpkeys.Authenticator
		target, host string
		status       string
	}{
		{all, "b.example:443", "b.example:443", "403"},
		{all, "/", "b.example", "403"},
		{some, "/admin/x", "b.example", "403"},
		{some, "/admin", "b.example", "403"},
		{some, "//admin//x", "b.example", "400"},
		{some, "/admin//x", "b.example", "403"},
		{some, "/%61dmin/x", "b.example", "403"},
		{some, "/admin%2fx", "b.example", "400"},
		{some, "/orders/7", "b.example", "403"},
		{some, "/orders/7%2fitems", "b.example", "400"},
		{some, "/tunnel", "b.example", "403"},
		{some, "/host", "a.example:443", "400"},
		{some, "/host", "a.example", "403"},
		{some, "/host", "b.example:443", "200"},
		{some, "/orders/7/items", "b.example", "200"},
		{some, "b.example:443", "b.example:443", "200"},
	} {
		url, _ := serve(t, false, c.auth.Wrap(h))
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		require.NoError(t, err)
		_, err = conn.Write([]byte("CONNECT " + c.target + " HTTP/1.1\r\nHost: " + c.host +
			"\r\nConnection: close\r\nAuthorization: Bearer " + token + "\r\n\r\n"))
		require.NoError(t, err)
		line, err := bufio.NewReader(conn).ReadString('\n')
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(line, "HTTP/1.1 "+c.status), "%s of %s: %s",
			c.target, c.host, line)
		require.NoError(t, conn.Close())
	}
}

// A ServeMux and the rules must not take different patterns for one CONNECT request: the handler of
// one pattern would run under the rule of another.
func TestRulesOfCONNECTAreThoseOfAServeMux(t *testing.T) {
	store := keystoretest.New(t, nil)
	auth := newAuth(t, store, httpkeys.Require("/", "admin"), httpkeys.Public("/public/"),
		httpkeys.Public("open.example/"), httpkeys.Public("/{$}"))
	mux := http.NewServeMux()
	for _, pattern := range []string{"/", "/public/", "open.example/", "/{$}"} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			assert.Equal(t, pattern, r.Pattern)
			w.Header().Set("Pattern", pattern)
		})
	}
	url, _ := serve(t, false, auth.Wrap(mux))
	for _, c := range []struct{ target, host, status, pattern string }{
		{"/public/x", "b.example", "200", "/public/"},
		{"/x", "open.example", "200", "open.example/"},
		{"/", "b.example", "200", "/{$}"},
		{"/x", "b.example", "401", ""},
		{"//public/x", "b.example", "400", ""},
		{"//", "b.example", "400", ""},
		{"/x", "open.example:443", "400", ""},
		{"/public//x", "b.example", "200", "/public/"},
		{"b.example:443", "b.example:443", "404", ""},
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		require.NoError(t, err)
		_, err = conn.Write([]byte("CONNECT " + c.target + " HTTP/1.1\r\nHost: " + c.host +
			"\r\nConnection: close\r\n\r\n"))
		require.NoError(t, err)
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		status := strconv.Itoa(response.StatusCode)
		assert.Equal(t, c.status, status, "%s of %s", c.target, c.host)
		assert.Equal(t, c.pattern, response.Header.Get("Pattern"), "%s of %s", c.target, c.host)
		require.NoError(t, conn.Close())
	}
}

// A router that is no ServeMux may take double slashes as they are. The request must not get the
// rule of another path than the router sees.
func TestDoubleSlashes(t *testing.T) {
	store := keystoretest.New(t, nil)
	auth := newAuth(t, store, httpkeys.Public("/health", "/static/"),
		httpkeys.Require("/orders/{id}/items", "admin"), httpkeys.Require("/orders/", "admin"))
	url, client := serve(t, false, auth.Wrap(http.HandlerFunc(
		func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.URL.Path == "/health", strings.HasPrefix(r.URL.Path, "/static/"):
			default:
				_, ok := httpkeys.FromContext(r.Context())
				assert.True(t, ok, "%s without a key", r.URL.Path)
			}
		})))
	for path, want := range map[string]int{
		"/health":            http.StatusOK,
		"/static//x":         http.StatusOK,
		"/static/x//":        http.StatusOK,
		"//health":           http.StatusBadRequest,
		"///health":          http.StatusBadRequest,
		"//static/x":         http.StatusBadRequest,
		"/%2Fhealth":         http.StatusBadRequest,
		"//other":            http.StatusUnauthorized,
		"//orders/7":         http.StatusBadRequest,
		"/orders//7":         http.StatusUnauthorized,
		"/orders//items":     http.StatusBadRequest, // the id may be empty
		"/orders/7//items//": http.StatusUnauthorized,
	} {
		status, p, _ := do(t, client, request(t, "GET", url+path, "", nil))
		require.Equal(t, want, status, "%s: %s", path, p.Reason)
	}
}

// A URL without a slash after the scheme has an empty path, but a proxy sends what follows the
// scheme to the next server. The rule of the root must not open that.
func TestURLWithoutAPath(t *testing.T) {
	store := keystoretest.New(t, nil)
	auth := newAuth(t, store, httpkeys.Public("/{$}"), httpkeys.Require("/admin/", "admin"))
	url, _ := serve(t, false, auth.Wrap(http.HandlerFunc(
		func(_ http.ResponseWriter, r *http.Request) {
			assert.Equal(t, "/", r.URL.RequestURI())
		})))
	for _, c := range []struct{ target, status string }{
		{"http:admin/x", "400"}, {"x:admin/x", "400"}, {"http:/admin/x", "401"},
		{"http://b.example/admin/x", "401"}, {"http://b.example", "200"}, {"/", "200"},
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
		require.NoError(t, err)
		_, err = conn.Write([]byte("GET " + c.target + " HTTP/1.1\r\nHost: b.example\r\n" +
			"Connection: close\r\n\r\n"))
		require.NoError(t, err)
		line, err := bufio.NewReader(conn).ReadString('\n')
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(line, "HTTP/1.1 "+c.status), "%s: %s", c.target, line)
		require.NoError(t, conn.Close())
	}
}
