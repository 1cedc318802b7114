// Package failures limits how often callers from one address may send a bad credential. Packages
// interceptor and httpkeys limit calls and requests, and the console limits logins.
package failures

import (
	"math"
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
)

// maxAddresses is how many addresses that failed a Limit remembers.
const maxAddresses = 1 << 16

// A Limit has a token bucket for each address that failed recently. For IPv6, the bucket belongs to
// the network of 64 bits. All callers without a known address share one bucket. A Limit is safe for
// concurrent use.
type Limit struct {
	limit rate.Limit
	burst int

	mu  sync.Mutex // guards lru
	lru *simplelru.LRU[netip.Addr, *rate.Limiter]
}

// New returns a Limit. An address may fail burst times in a row, and limit times per second in the
// long run. Both must be positive.
func New(limit rate.Limit, burst int) *Limit {
	lru, err := simplelru.NewLRU[netip.Addr, *rate.Limiter](maxAddresses, nil)
	if err != nil {
		panic(err) // NewLRU fails only if the size is not positive
	}
	return &Limit{limit: limit, burst: burst, lru: lru}
}

// Network returns what counts as one caller: the network of 64 bits for an IPv6 address, the
// address itself for IPv4, and the zero Addr for callers without a known address.
func Network(addr netip.Addr) netip.Addr {
	if addr.Is6() {
		p, _ := addr.Prefix(64)
		return p.Addr()
	}
	return addr
}

// Wait returns how long a caller from addr must wait before the next attempt. 0 means that the
// caller may try now.
func (l *Limit) Wait(addr netip.Addr) time.Duration {
	l.mu.Lock()
	bucket, ok := l.lru.Peek(Network(addr))
	l.mu.Unlock()
	if !ok {
		return 0
	}
	if tokens := bucket.Tokens(); tokens < 1 {
		return max(1, seconds((1-tokens)/float64(l.limit)))
	}
	return 0
}

// seconds returns n seconds as a Duration, or the longest Duration (292 years) if n is larger.
func seconds(n float64) time.Duration {
	if d := n * float64(time.Second); d < math.MaxInt64 {
		return max(0, time.Duration(d))
	}
	return math.MaxInt64
}

// Add counts a failure of a caller from addr.
func (l *Limit) Add(addr netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	bucket, ok := l.lru.Get(Network(addr))
	if !ok {
		bucket = rate.NewLimiter(l.limit, l.burst)
		l.lru.Add(Network(addr), bucket)
	}
	bucket.Allow()
}
