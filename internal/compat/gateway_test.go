package compat

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/internal/compat/gateway"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// startGateway starts the gateway as a separate process, and returns the URL of the gateway.
func startGateway(t *testing.T, server string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "proxy")
	out, err := exec.Command("go", "build", "-o", program, "./gateway/proxy").CombinedOutput()
	require.NoError(t, err, "%s", out)
	proxy := exec.Command(program, "-listen", "127.0.0.1:0", "-server", server)
	stdout, err := proxy.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, proxy.Start())
	t.Cleanup(func() {
		require.NoError(t, proxy.Process.Kill())
		_ = proxy.Wait()
	})
	address, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(t, err)
	return "http://" + strings.TrimSpace(address)
}

// A watched is a health server that records the metadata of each Check.
type watched struct {
	*health.Server
	seen chan metadata.MD
}

func (w watched) Check(
	ctx context.Context, r *healthpb.HealthCheckRequest,
) (*healthpb.HealthCheckResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	w.seen <- md
	return w.Server.Check(ctx, r)
}

func TestGateway(t *testing.T) {
	store, err := keystore.Open(t.TempDir(), nil)
	require.NoError(t, err)
	defer store.Close()
	issued, err := store.Create(t.Context(), keystore.Spec{Name: "test"})
	require.NoError(t, err)
	token := issued.Secret.Reveal()
	auth, err := interceptor.New(store,
		interceptor.TrustProxy("x-forwarded-for", netip.MustParsePrefix("127.0.0.1/32")))
	require.NoError(t, err)
	server := grpc.NewServer(auth.ServerOptions()...)
	checks := watched{health.NewServer(), make(chan metadata.MD, 16)}
	healthpb.RegisterHealthServer(server, checks)
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	gatewayURL := startGateway(t, lis.Addr().String())
	from := "127.0.0.2"
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			return d.DialContext(ctx, network, address)
		}}}
	get := func(url, key string) (int, string) {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		require.NoError(t, err)
		request.Header.Set("X-Forwarded-For", "127.0.0.2") // true or false, depending on from
		if key != "" {
			request.Header.Set("Authorization", "Bearer "+key)
		}
		answer, err := client.Do(request)
		require.NoError(t, err)
		defer answer.Body.Close()
		body, err := io.ReadAll(answer.Body)
		require.NoError(t, err)
		return answer.StatusCode, strings.ReplaceAll(string(body), " ", "")
	}

	code, body := get(gatewayURL+"/v1/health", token)
	require.Equal(t, http.StatusOK, code, body)
	require.Contains(t, body, `"SERVING"`)
	md := <-checks.seen
	require.Equal(t, []string{"127.0.0.2, 127.0.0.2"}, md.Get("x-forwarded-for"))
	for name, values := range md {
		for _, value := range values {
			require.False(t, strings.Contains(value, token), "the metadata %s contains the key",
				name)
		}
	}
	code, body = get(gatewayURL+"/v1/health", "")
	require.Equal(t, http.StatusUnauthorized, code)
	require.Contains(t, body, "CREDENTIALS_MISSING")

	bound, err := store.Create(t.Context(), keystore.Spec{
		Name: "bound", AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}})
	require.NoError(t, err)
	code, _ = get(gatewayURL+"/v1/health", bound.Secret.Reveal())
	require.Equal(t, http.StatusOK, code)
	<-checks.seen
	from = "127.0.0.3"
	code, _ = get(gatewayURL+"/v1/health", bound.Secret.Reveal())
	require.Equal(t, http.StatusUnauthorized, code,
		"the gateway reports the true address of the caller")

	// A stream ends in the middle of its body.
	request, err := http.NewRequestWithContext(
		t.Context(), http.MethodGet, gatewayURL+"/v1/health:watch", nil)
	require.NoError(t, err)
	request.Header.Set("Authorization", "Bearer "+token)
	stream, err := client.Do(request)
	require.NoError(t, err)
	defer stream.Body.Close()
	require.Equal(t, http.StatusOK, stream.StatusCode)
	require.NoError(t, store.Revoke(t.Context(), issued.Key.ID, ""))
	rest, err := io.ReadAll(stream.Body)
	require.NoError(t, err)
	require.Contains(t, string(rest), "API_KEY_REVOKED")
	code, _ = get(gatewayURL+"/v1/health", token)
	require.Equal(t, http.StatusUnauthorized, code)

	// The guide warns of this form: it calls the service without any interceptor.
	open := runtime.NewServeMux()
	require.NoError(t, gateway.RegisterHealthHandlerServer(t.Context(), open, checks))
	web := httptest.NewServer(open)
	code, _ = get(web.URL+"/v1/health", "")
	require.Equal(t, http.StatusOK, code, "the service does not require a key")
	web.Close()
	<-checks.seen

	// A middleware of net/http protects this form, as the guide says.
	another, err := store.Create(t.Context(), keystore.Spec{Name: "another"})
	require.NoError(t, err)
	httpAuth, err := httpkeys.New(store)
	require.NoError(t, err)
	web = httptest.NewServer(httpAuth.Wrap(open))
	defer web.Close()
	code, body = get(web.URL+"/v1/health", "")
	require.Equal(t, http.StatusUnauthorized, code)
	require.Contains(t, body, "CREDENTIALS_MISSING")
	code, _ = get(web.URL+"/v1/health", another.Secret.Reveal())
	require.Equal(t, http.StatusOK, code)
	md = <-checks.seen
	require.Empty(t, checks.seen, "each Check was looked at, in order")
	for name, values := range md {
		require.False(t, strings.Contains(strings.Join(values, " "), another.Secret.Reveal()),
			"the metadata %s contains the key", name)
	}

	server.Stop()
	require.NoError(t, <-served)
}
