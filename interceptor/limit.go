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

// LimitMessages applies the RateLimit of a key to each message that a stream receives, not only to
// the opening of the stream. A stream that exceeds the limit ends with ResourceExhausted. Without
// LimitMessages, a stream counts as one use of the key.
func LimitMessages() Option {
	return Option{func(c *config) error {
		c.limitMessages = true
		return nil
	}}
}

// LimitFailures limits the failed calls from one address. A call fails if its credential is
// refused. An address may fail burst times in a row, and perSecond times per second in the long
// run. After that, the server refuses every call from the address with ResourceExhausted, even a
// call with a valid key, and does not ask the store.
//
// The limit counts addresses (for IPv6, networks of 64 bits), never keys. So an attacker cannot
// lock out the owner of a key from another address. With a proxy in front of the server, give
// TrustProxy or TrustProxyTransport too, or all callers of the proxy share one limit. LimitFailures
// is off by default: a key cannot be guessed with or without it. LimitFailures saves the work of
// the refusals.
//
// All callers without a known address share one limit: callers over a unix socket or bufconn, and
// callers whose trusted proxy sent no address. So one of these callers can use up the limit for the
// others.
//
// LimitFailures remembers the last 65,536 addresses that failed.
func LimitFailures(perSecond float64, burst int) Option {
	return Option{func(c *config) error {
		if !(perSecond > 0) || math.IsInf(perSecond, 0) || burst < 1 {
			return fmt.Errorf("LimitFailures: %v per second with a burst of %d: "+
				"both must be positive and finite", perSecond, burst)
		}
		c.failures = newFailures(rate.Limit(perSecond), burst)
		return nil
	}}
}

const maxAddresses = 1 << 16

// failures has a token bucket for each address that failed recently.
type failures struct {
	limit rate.Limit
	burst int

	mu  sync.Mutex
	lru *simplelru.LRU[netip.Addr, *rate.Limiter]
}

func newFailures(limit rate.Limit, burst int) *failures {
	lru, err := simplelru.NewLRU[netip.Addr, *rate.Limiter](maxAddresses, nil)
	if err != nil {
		panic(err) // NewLRU fails only if the size is not positive
	}
	return &failures{limit: limit, burst: burst, lru: lru}
}

// A throttledError means that too many calls from an address have failed.
type throttledError struct{ retryAfter time.Duration }

func (e *throttledError) Error() string { return "too many calls with bad credentials" }

// bucketOf returns the key of the bucket for an address: the network of 64 bits for an IPv6
// address, the address itself for IPv4, and the zero Addr for callers without a known address.
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

// seconds returns n seconds as a Duration, or the longest Duration (292 years) if n is larger.
func seconds(n float64) time.Duration {
	if d := n * float64(time.Second); d < math.MaxInt64 {
		return max(0, time.Duration(d))
	}
	return math.MaxInt64
}

// add counts a failed call from addr.
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
