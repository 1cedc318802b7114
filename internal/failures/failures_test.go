package failures

import (
	"math"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/time/rate"
)

// For every permitted rate of failures, the time to wait is positive.
func TestWaitIsPositive(t *testing.T) {
	for _, perSecond := range []float64{
		math.SmallestNonzeroFloat64, 1e-300, 1e-10, 1e-9, 0.5, math.MaxFloat64 / 2,
	} {
		l := New(rate.Limit(perSecond), 1)
		addr := netip.MustParseAddr("192.0.2.1")
		l.Add(addr)
		wait := l.Wait(addr)
		if wait == 0 {
			require.Greater(t, perSecond, 1.0)
			continue
		}
		require.Positive(t, wait, "%v per second", perSecond)
		if perSecond < 1e-9 {
			require.Equal(t, time.Duration(math.MaxInt64), wait)
		}
	}
}

func TestBuckets(t *testing.T) {
	l := New(0.001, 2)
	addr := netip.MustParseAddr("2001:db8::1")
	for range 2 {
		require.Zero(t, l.Wait(addr))
		l.Add(addr)
	}
	require.Positive(t, l.Wait(addr))
	require.Positive(t, l.Wait(netip.MustParseAddr("2001:db8::ffff")),
		"the same network of 64 bits")
	require.Zero(t, l.Wait(netip.MustParseAddr("2001:db8:0:1::1")))
	require.Zero(t, l.Wait(netip.MustParseAddr("192.0.2.1")))
	require.Zero(t, l.Wait(netip.Addr{}))
	for range 2 {
		l.Add(netip.Addr{})
	}
	require.Positive(t, l.Wait(netip.Addr{}), "all without an address share one limit")
	require.Zero(t, l.Wait(netip.IPv4Unspecified()))
	for i := range maxAddresses {
		l.Add(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}))
	}
	require.Equal(t, maxAddresses, l.lru.Len())
	require.Zero(t, l.Wait(addr), "forgotten")
}
