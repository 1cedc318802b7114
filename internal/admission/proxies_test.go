package admission

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func proxied(t testing.TB) *Proxies {
	p := new(Proxies)
	require.NoError(t, p.TrustNetworks("X-Forwarded-For", []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}))
	return p
}

func TestForwarded(t *testing.T) {
	p := proxied(t)
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
		p := proxied(t)
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

// In net/http, middleware may set the address to any
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
		got := peerAddr(c.remote, tcp)
		if c.want == "" {
			require.False(t, got.IsValid(), "%v: %v", c.remote, got)
		} else {
			require.Equal(t, c.want, got.String(), "%v", c.remote)
		}
		onSocket := peerAddr(c.remote, &net.UnixAddr{Name: "s", Net: "unix"})
		require.False(t, onSocket.IsValid(), "on a unix socket")
	}
}

// A textAddr is an address made of http.Request.RemoteAddr.
type textAddr string

func (textAddr) Network() string  { return "tcp" }
func (a textAddr) String() string { return string(a) }
