package interceptor

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"

	"github.com/grpc-api-key/grpc-api-key/internal/admission"
)

func proxied(t testing.TB) *config {
	c := new(config)
	require.NoError(t,
		TrustProxy("X-Forwarded-For", netip.MustParsePrefix("10.0.0.0/8"),
			netip.MustParsePrefix("fd00::/8")).apply(c))
	return c
}

func TestTrustProxyRefuses(t *testing.T) {
	network := netip.MustParsePrefix("10.0.0.0/8")
	for _, o := range []Option{
		TrustProxy("", network),
		TrustProxy("x-forwarded-for"),
		TrustProxy("x-forwarded-for", netip.Prefix{}),
		TrustProxy("x-forwarded-for", netip.MustParsePrefix("::ffff:10.0.0.0/104")),
		TrustProxy("x-forwarded-for", network, netip.MustParsePrefix("10.1.2.3/8")),
		TrustProxy("x-forwarded-for", netip.MustParsePrefix("fd00::1/8")),
		TrustProxy("x-forwarded-for", netip.MustParsePrefix("0.0.0.0/0")),
		TrustProxy("x-forwarded-for", network, netip.MustParsePrefix("::/0")),
		TrustProxy("Forwarded", network),
		TrustProxy("via", network),
		TrustProxy("X-Forwarded-Host", network),
		TrustProxy("x-forwarded-for-bin", network),
		TrustProxy(":authority", network),
		TrustProxy("x forwarded for", network),
		TrustProxyTransport("", "unix"),
		TrustProxyTransport("forwarded", "unix"),
		TrustProxyTransport("x-forwarded-for"),
		TrustProxyTransport("x-forwarded-for", ""),
		TrustProxyTransport("x-forwarded-for", "unix", "tcp"),
		TrustProxyTransport("x-forwarded-for", "tcp4"),
		TrustProxyTransport("x-forwarded-for", "/run/nginx.sock"),
		LimitFailures(0, 1),
		LimitFailures(1, 0),
		RulesFrom(nil),
	} {
		require.Error(t, o.apply(new(config)))
	}
	require.Error(t, TrustProxy("x-forwarded-for", network).apply(proxied(t)), "twice")
	require.ErrorContains(t, TrustProxy("Forwarded", network).apply(new(config)), "RFC 7239")
	require.ErrorContains(t, TrustProxyTransport("x-real-ip", "unix").apply(proxied(t)),
		"all proxies must set the same")
	both := proxied(t)
	require.NoError(t, TrustProxyTransport("X-Forwarded-For", "unix", "bufconn").apply(both))
	require.ErrorContains(t, TrustProxyTransport("X-Forwarded-For", "unix").apply(both), "twice")
	_, err := New(noVerifier{}, Header("x-key", ""), TrustProxy("X-Key", network))
	require.ErrorContains(t, err, "cannot hold both the key and the caller's address")
}

// The time to wait in a status is valid, and not negative.
func TestRetryStatus(t *testing.T) {
	for _, after := range []time.Duration{math.MaxInt64, 0, -1, math.MinInt64} {
		for _, d := range retryStatus(admission.Throttled, after).Details() {
			if r, ok := d.(*errdetails.RetryInfo); ok {
				require.NoError(t, r.RetryDelay.CheckValid())
				require.GreaterOrEqual(t, r.RetryDelay.AsDuration(), time.Duration(0), "%d", after)
			}
		}
	}
}
