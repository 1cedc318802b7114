package httpkeys_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// A proxy on a unix socket names the address of the caller, and only if the server trusts the
// transport.
func TestTrustProxyTransport(t *testing.T) {
	store := keystoretest.New(t, nil)
	_, token := issue(t, store, keystore.Spec{AllowedNetworks: []netip.Prefix{
		netip.MustParsePrefix("198.51.100.7/32")}})
	status := func(auth *httpkeys.Authenticator, from string) int {
		dir, err := os.MkdirTemp("", "unix") // the name of a socket must be short
		require.NoError(t, err)
		defer os.RemoveAll(dir)
		server := httptest.NewUnstartedServer(auth.Wrap(http.HandlerFunc(
			func(w http.ResponseWriter, r *http.Request) {})))
		require.NoError(t, server.Listener.Close())
		socket := filepath.Join(dir, "s")
		server.Listener, err = net.Listen("unix", socket)
		require.NoError(t, err)
		server.Start()
		defer server.Close()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			}}}
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://orders/", nil)
		require.NoError(t, err)
		r.Header.Set("Authorization", "Bearer "+token)
		r.Header.Set("X-Forwarded-For", from)
		response, err := client.Do(r)
		require.NoError(t, err)
		require.NoError(t, response.Body.Close())
		return response.StatusCode
	}
	trusting := newAuth(t, store, httpkeys.TrustProxyTransport("X-Forwarded-For", "unix"))
	require.Equal(t, 200, status(trusting, "198.51.100.7"))
	require.Equal(t, 401, status(trusting, "203.0.113.9"))
	other := newAuth(t, store, httpkeys.TrustProxyTransport("X-Forwarded-For", "bufconn"))
	require.Equal(t, 401, status(other, "198.51.100.7"), "the header is ignored")
	require.Equal(t, 401, status(newAuth(t, store), "198.51.100.7"), "the header is ignored")
}
