package interceptor

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func proxied(t testing.TB) *Authenticator {
	a := new(Authenticator)
	require.NoError(t, TrustProxy("X-Forwarded-For", netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")).apply(a))
	return a
}

func TestForwarded(t *testing.T) {
	a := proxied(t)
	require.Equal(t, "x-forwarded-for", a.proxyHeader)
	for _, c := range []struct {
		values []string
		want   string // "" is unknown
	}{
		{nil, ""},
		{[]string{""}, ""},
		{[]string{"192.0.2.1"}, "192.0.2.1"},
		{[]string{"192.0.2.1:443"}, "192.0.2.1"},
		{[]string{"203.0.113.9, 192.0.2.1"}, "192.0.2.1"},              // what the caller sent stands before
		{[]string{"203.0.113.9", "192.0.2.1 , 10.1.1.1"}, "192.0.2.1"}, // in two lines
		{[]string{"192.0.2.1", "10.1.1.1", "fd00::1,10.2.2.2"}, "192.0.2.1"},
		{[]string{"10.1.1.1,10.2.2.2"}, "10.1.1.1"}, // a proxy that calls on its own behalf
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
		got := a.forwarded(c.values)
		if c.want == "" {
			require.False(t, got.IsValid(), "%q: %v", c.values, got)
			continue
		}
		require.Equal(t, c.want, got.String(), "%q", c.values)
	}
}

// Whatever a header holds, the address is unknown, or one that stands in it behind everything that is not a proxy's.
func FuzzForwarded(f *testing.F) {
	f.Add("203.0.113.9, 192.0.2.1, 10.0.0.1")
	f.Add("[2001:db8::1]:443,fd00::1")
	f.Add(",,")
	f.Fuzz(func(t *testing.T, value string) {
		a := proxied(t)
		got := a.forwarded([]string{value})
		require.Equal(t, got, a.forwarded(strings.Split(value, ",")), "one line or several")
		if !got.IsValid() {
			return
		}
		require.False(t, got.Is4In6())
		require.Empty(t, got.Zone())
		// What the caller puts before it changes nothing.
		if !a.isProxy(got) {
			require.Equal(t, got, a.forwarded([]string{"198.51.100.7", value}))
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
		LimitFailures(0, 1),
		LimitFailures(1, 0),
		RulesFrom(nil),
	} {
		require.Error(t, o.apply(new(Authenticator)))
	}
	require.Error(t, TrustProxy("x-forwarded-for", network).apply(proxied(t)), "twice")
}

func TestFailuresByNetwork(t *testing.T) {
	f := newFailures(0.001, 2)
	addr := netip.MustParseAddr("2001:db8::1")
	for range 2 {
		require.NoError(t, f.check(addr))
		f.note(addr)
	}
	var throttled *throttledError
	require.ErrorAs(t, f.check(addr), &throttled)
	require.Positive(t, throttled.retryAfter)
	require.Error(t, f.check(netip.MustParseAddr("2001:db8::ffff")), "the same network of 64 bits")
	require.NoError(t, f.check(netip.MustParseAddr("2001:db8:0:1::1")))
	require.NoError(t, f.check(netip.MustParseAddr("192.0.2.1")))
	f.note(netip.Addr{})
	require.NoError(t, f.check(netip.Addr{}), "an unknown address is not limited")
	for i := range maxFailing {
		f.note(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	require.Equal(t, maxFailing, f.lru.Len())
	require.NoError(t, f.check(addr), "forgotten")
}
