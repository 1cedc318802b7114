package keystore

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A limiter is the token bucket of one key. A limiter outlives the cached keys that point to the
// limiter.
type limiter struct {
	*rate.Limiter
	revision uint64 // of the key that the limit is from; guarded by limits.mu

	id    token.ID
	usage *usage
	used  atomic.Uint32 // the mark of the minute of the last use that usage has recorded
}

// take takes one use from the bucket, and records the use for LastUsedAt. If the bucket has no
// use left, take returns a *RateLimitError.
func (l *limiter) take() error {
	now := time.Now()
	if l.AllowN(now, 1) {
		if l.usage.due(&l.used) {
			l.usage.note(l.id, &l.used)
		}
		return nil
	}
	return &RateLimitError{RetryAfter: l.wait(now)}
}

// peek returns the result that take would return, and takes nothing.
func (l *limiter) peek() error {
	if wait := l.wait(time.Now()); wait > 0 {
		return &RateLimitError{RetryAfter: wait}
	}
	return nil
}

// wait returns how long a caller must wait until the bucket has one use.
func (l *limiter) wait(now time.Time) time.Duration {
	missing := 1 - l.TokensAt(now)
	after := missing / float64(l.Limit()) * float64(time.Second)
	if after >= math.MaxInt64 { // 292 years: more than a Duration can hold
		return math.MaxInt64
	}
	return max(0, time.Duration(after))
}

// Allow takes one use from the key's RateLimit, as Verify and Bind do. Call Allow for other
// things that should count, for example each message of a stream. Allow returns nil, or a
// *RateLimitError. The use counts for LastUsedAt too. If the key did not come from Verify or
// Bind, or has no limit, Allow always returns nil, and does not count a use.
func (k *Key) Allow() error { return k.granted().allow() }

func (g *grants) allow() error {
	if g.quota == nil || g.quota.limiter == nil {
		return nil
	}
	return g.quota.limiter.take()
}

// A quota counts the uses of a key. A quota is immutable when its key is published, except for
// account.
type quota struct {
	limiter *limiter // nil: no limit

	revision uint64                  // of the key
	since    uint64                  // the revision at which the credits were set; 0: no credits
	accounts *accounts               // nil: no credits, or the key is not from Verify or Bind
	account  atomic.Pointer[account] // nil if accounts is nil
}

// limits holds the limiters of keys that have a RateLimit. The limiters are separate from the
// cache, so a key that leaves the cache and returns has as few uses left as before. The memory of
// limits is bounded too: after maxLimiters other keys were used, a key starts again with a full
// bucket.
type limits struct {
	usage *usage

	mu  sync.Mutex
	lru *simplelru.LRU[token.ID, *limiter]
}

const maxLimiters = 1 << 16

func newLimits(u *usage) *limits {
	// The only error is for a size below 1.
	lru, _ := simplelru.NewLRU[token.ID, *limiter](maxLimiters, nil)
	return &limits{usage: u, lru: lru}
}

// of returns the limiter for a key that was read from the store, or nil if the key has no limit.
func (l *limits) of(id token.ID, k *Key) *limiter {
	if k.RateLimit == (RateLimit{}) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	have, ok := l.lru.Get(id)
	if !ok {
		have = &limiter{
			Limiter:  rate.NewLimiter(rate.Limit(k.RateLimit.PerSecond), k.RateLimit.Burst),
			revision: k.Revision,
			id:       id,
			usage:    l.usage,
		}
		l.lru.Add(id, have)
	}
	have.setLocked(k)
	return have
}

// setLocked sets the limiter to the limit of the key, unless the limiter already has the limit of
// a later revision. Readers of two revisions may call setLocked in either order.
func (l *limiter) setLocked(k *Key) {
	if l.revision < k.Revision {
		l.SetLimit(rate.Limit(k.RateLimit.PerSecond))
		l.SetBurst(k.RateLimit.Burst)
		l.revision = k.Revision
	}
}

// peek returns the error that the next use of a key would get from its limit, and takes nothing.
func (l *limits) peek(id token.ID, k *Key) error {
	if k.RateLimit == (RateLimit{}) {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	have, ok := l.lru.Peek(id)
	if !ok {
		return nil // the first use is always allowed
	}
	have.setLocked(k)
	return have.peek()
}
