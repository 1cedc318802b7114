package interceptor

import (
	"fmt"
	"math"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
)

// LimitMessages counts each message that a stream receives as a use of its key, beside the one that opening it is, for
// keys with a RateLimit. A stream that receives more is ended with ResourceExhausted. Without it a stream is one use.
func LimitMessages() Option {
	return Option{func(c *config) error {
		c.limitMessages = true
		return nil
	}}
}

// LimitFailures limits how often calls from one address may fail for their credential: burst at
// once, and perSecond in the long run. Calls from an address that has used that up are refused with
// ResourceExhausted before the store is asked, those with a good key too: what is counted is
// addresses (of IPv6, networks of 64 bits), never keys, so that nobody can lock the owner of a key
// out from elsewhere. Behind a proxy, give TrustProxy or TrustProxyTransport as well, or all
// callers of the proxy share one limit. It is off by default: guessing a key is hopeless with or
// without it; it saves the work of refusing.
//
// All callers without a known address share one limit: callers over a unix socket or bufconn, and
// callers whose trusted proxy sent no address. So one of these callers can use up the limit for all
// of them.
//
// It remembers the 65,536 addresses that failed last.
func LimitFailures(perSecond float64, burst int) Option {
	return Option{func(c *config) error {
		if !(perSecond > 0) || math.IsInf(perSecond, 0) || burst < 1 {
			return fmt.Errorf("LimitFailures: %v per second and a burst of %d: both must be positive", perSecond, burst)
		}
		c.failures = newFailures(rate.Limit(perSecond), burst)
		return nil
	}}
}

const maxAddresses = 1 << 16

// failures has a bucket for each address that failed of late.
type failures struct {
	limit rate.Limit
	burst int

	mu  sync.Mutex
	lru *simplelru.LRU[netip.Addr, *rate.Limiter]
}

func newFailures(limit rate.Limit, burst int) *failures {
	lru, err := simplelru.NewLRU[netip.Addr, *rate.Limiter](maxAddresses, nil)
	if err != nil {
		panic(err) // not for a positive size
	}
	return &failures{limit: limit, burst: burst, lru: lru}
}

// A throttledError says that too many calls from an address have failed.
type throttledError struct{ retryAfter time.Duration }

func (e *throttledError) Error() string { return "too many calls with bad credentials" }

// bucketOf returns the address that stands for all whose failures are counted together: the network
// of 64 bits of an IPv6 address, and the zero Addr for every caller without a known address.
func bucketOf(addr netip.Addr) netip.Addr {
	if addr.Is6() {
		p, _ := addr.Prefix(64)
		return p.Addr()
	}
	return addr
}

// check returns a *throttledError if addr has failed too often.
func (f *failures) check(addr netip.Addr) error {
	f.mu.Lock()
	l, ok := f.lru.Peek(bucketOf(addr))
	f.mu.Unlock()
	if !ok {
		return nil
	}
	if tokens := l.Tokens(); tokens < 1 {
		return &throttledError{seconds((1 - tokens) / float64(f.limit))}
	}
	return nil
}

// seconds returns n seconds as a Duration, and the longest Duration, 292 years, instead of a longer
// one.
func seconds(n float64) time.Duration {
	if d := n * float64(time.Second); d < math.MaxInt64 {
		return max(0, time.Duration(d))
	}
	return math.MaxInt64
}

// add counts a failure.
func (f *failures) add(addr netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, ok := f.lru.Get(bucketOf(addr))
	if !ok {
		l = rate.NewLimiter(f.limit, f.burst)
		f.lru.Add(bucketOf(addr), l)
	}
	l.Allow()
}
