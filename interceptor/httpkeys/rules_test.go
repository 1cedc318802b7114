package httpkeys_test

import (
	"bufio"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// The rule of a CONNECT request is that of its path, as with other methods. A ServeMux cleans no
// path of CONNECT, and compares the host with its port.
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
		{some, "//admin//x", "b.example", "403"},
		{some, "/%61dmin/x", "b.example", "403"},
		{some, "/admin%2fx", "b.example", "400"},
		{some, "/orders/7", "b.example", "403"},
		{some, "/orders/7%2fitems", "b.example", "400"},
		{some, "/tunnel", "b.example", "403"},
		{some, "/host", "a.example:443", "403"},
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
