package interceptor

import (
	"math"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/peer"
)

func proxied(t testing.TB) *config {
	c := new(config)
	require.NoError(t,
		TrustProxy("X-Forwarded-For", netip.MustParsePrefix("10.0.0.0/8"),
			netip.MustParsePrefix("fd00::/8")).apply(c))
	return c
}

func TestForwarded(t *testing.T) {
	p := &proxied(t).proxies
	require.Equal(t, "x-forwarded-for", p.header)
	for _, c := range []struct {
		values []string
		want   string // "" is unknown
	}{
		{nil, ""},
		{[]string{""}, ""},
		{[]string{"192.0.2.1"}, "192.0.2.1"},
		{[]string{"192.0.2.1:443"}, "192.0.2.1"},
		// the caller sent the first address
		{[]string{"203.0.113.9, 192.0.2.1"}, "192.0.2.1"},
		{[]string{"203.0.113.9", "192.0.2.1 , 10.1.1.1"}, "192.0.2.1"}, // in two lines
		{[]string{"192.0.2.1", "10.1.1.1", "fd00::1,10.2.2.2"}, "192.0.2.1"},
		{[]string{"10.1.1.1,10.2.2.2"}, "10.1.1.1"}, // the proxy itself is the caller
		{[]string{"2001:db8::1"}, "2001:db8::1"},
		{[]string{"[2001:db8::1]:443"}, "2001:db8::1"},
		{[]string{"[2001:db8::1]"}, "2001:db8::1"},
		{[]string{"::ffff:192.0.2.1"}, "192.0.2.1"},
		{[]string{"fe80::1%eth0"}, "fe80::1"},
		{[]string{"192.0.2.1, unknown"}, ""},
		{[]string{"192.0.2.1, unknown, 10.1.1.1"}, ""},
		{[]string{"192.0.2.1,"}, ""},
		{[]string{"[192.0.2.1]"}, ""},
		{[]string{"192.0.2.1:99999"}, ""},
	} {
		got := p.forwarded(c.values)
		if c.want == "" {
			require.False(t, got.IsValid(), "%q: %v", c.values, got)
			continue
		}
		require.Equal(t, c.want, got.String(), "%q", c.values)
	}
}

// For every text in the header, the address is unknown, or it is an address of the text, and only
// addresses of proxies follow it.
func FuzzForwarded(f *testing.F) {
	f.Add("203.0.113.9, 192.0.2.1, 10.0.0.1")
	f.Add("[2001:db8::1]:443,fd00::1")
	f.Add(",,")
	f.Fuzz(func(t *testing.T, value string) {
		p := &proxied(t).proxies
		got := p.forwarded([]string{value})
		require.Equal(t, got, p.forwarded(strings.Split(value, ",")), "one line or several")
		if !got.IsValid() {
			return
		}
		require.False(t, got.Is4In6())
		require.Empty(t, got.Zone())
		// Text that the caller adds at the front changes nothing.
		if !p.isProxy(got) {
			require.Equal(t, got, p.forwarded([]string{"198.51.100.7", value}))
		}
	})
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

// For every time to wait, the RetryInfo is valid.
func TestRetryInfoIsValid(t *testing.T) {
	for _, after := range []time.Duration{math.MaxInt64, 0, -1, math.MinInt64} {
		for _, d := range retryStatus("R", "text", after).Details() {
			if r, ok := d.(*errdetails.RetryInfo); ok {
				require.NoError(t, r.RetryDelay.CheckValid())
				require.GreaterOrEqual(t, r.RetryDelay.AsDuration(), time.Duration(0), "%d", after)
			}
		}
	}
}

// peerAddr reads the address of the peer. Under ServeHTTP, middleware may set the address to any
// text.
func TestAddressOfAPeer(t *testing.T) {
	tcp := &net.TCPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 80}
	for _, c := range []struct {
		remote net.Addr
		want   string // "" is unknown
	}{
		{tcp, "198.51.100.1"},
		{textAddr("192.0.2.1:443"), "192.0.2.1"},
		{textAddr("192.0.2.1"), "192.0.2.1"},
		{textAddr("::ffff:192.0.2.1"), "192.0.2.1"},
		{textAddr("2001:db8::1"), "2001:db8::1"},
		{textAddr("[2001:db8::1]"), "2001:db8::1"},
		{textAddr("[fe80::1%eth0]:80"), "fe80::1"},
		{textAddr(""), ""},
		{textAddr("@"), ""},
		{textAddr("bufconn"), ""},
		{textAddr("192.0.2.1, 192.0.2.2"), ""},
		{textAddr("example.com:80"), ""},
		{&net.UnixAddr{Name: "192.0.2.1", Net: "unix"}, ""},
	} {
		got := peerAddr(&peer.Peer{Addr: c.remote, LocalAddr: tcp})
		if c.want == "" {
			require.False(t, got.IsValid(), "%v: %v", c.remote, got)
		} else {
			require.Equal(t, c.want, got.String(), "%v", c.remote)
		}
		require.False(t,
			peerAddr(
				&peer.Peer{Addr: c.remote,
					LocalAddr: &net.UnixAddr{Name: "s", Net: "unix"}}).IsValid(),
			"on a unix socket")
	}
}

// A textAddr is the address that ServeHTTP makes of http.Request.RemoteAddr.
type textAddr string

func (textAddr) Network() string  { return "tcp" }
func (a textAddr) String() string { return string(a) }
