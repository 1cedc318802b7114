package keystore

import (
	"math"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A limiter is the token bucket of one key. It outlives the entries that point to it.
type limiter struct {
	*rate.Limiter
	revision uint64 // of the key whose limit it has; guarded by limits.mu
}

// take takes one use.
func (l *limiter) take() error {
	now := time.Now()
	if l.AllowN(now, 1) {
		return nil
	}
	missing := 1 - l.TokensAt(now)
	after := missing / float64(l.Limit()) * float64(time.Second)
	if after >= math.MaxInt64 { // 292 years, and more than a Duration holds
		return &RateLimitError{RetryAfter: math.MaxInt64}
	}
	return &RateLimitError{RetryAfter: max(0, time.Duration(after))}
}

// Allow takes one use from the key's RateLimit, as Verify and Bind do, for what should count and is neither: each message
// of a stream, for example. It returns nil, or a *RateLimitError. A key that did not come from Verify or Bind, or that
// has no limit, allows everything.
func (k *Key) Allow() error {
	if k.limit == nil {
		return nil
	}
	return k.limit.take()
}

// limits holds the limiters of keys that have a RateLimit, apart from the cache, so that a key which falls out of that
// comes back with as little left as it had. Its own memory is bounded too: a key that maxLimiters others were used after
// begins anew.
type limits struct {
	mu  sync.Mutex
	lru *simplelru.LRU[token.ID, *limiter]
}

const maxLimiters = 1 << 16

func newLimits() *limits {
	// The only error is for a size below 1.
	lru, _ := simplelru.NewLRU[token.ID, *limiter](maxLimiters, nil)
	return &limits{lru: lru}
}

// of returns the limiter for a key that was read from the store; nil if it has no limit.
func (l *limits) of(id token.ID, k *Key) *limiter {
	if k.RateLimit == (RateLimit{}) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	have, ok := l.lru.Get(id)
	if !ok {
		have = &limiter{Limiter: rate.NewLimiter(rate.Limit(k.RateLimit.PerSecond), k.RateLimit.Burst), revision: k.Revision}
		l.lru.Add(id, have)
	}
	if have.revision < k.Revision { // readers of two revisions may come in either order
		have.SetLimit(rate.Limit(k.RateLimit.PerSecond))
		have.SetBurst(k.RateLimit.Burst)
		have.revision = k.Revision
	}
	return have
}
