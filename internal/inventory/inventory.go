// Package inventory counts the keys of a store, for the admin service, the console and the metrics.
package inventory

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An Inventory counts the keys of a store. A count reads all keys, so an Inventory keeps the last
// count for a while. Each count runs in a separate goroutine, which ends with the count, or when
// the store is closed. An Inventory is safe for concurrent use.
type Inventory struct {
	store *keystore.Store
	least time.Duration

	mu      sync.Mutex // guards all below
	began   time.Time  // when the last count began; zero: never
	latest  *Counts    // of the last count that has succeeded; nil: none has
	until   time.Time  // when latest is too old for Counts
	running *counting  // nil: no count is under way
}

// A counting is a count under way.
type counting struct {
	done   chan struct{} // closed at the end
	counts *Counts       // written before done is closed
	err    error         // written before done is closed
}

// Counts are the numbers of keys of a store. A key whose stored data is damaged does not count.
// Callers must not change the maps.
type Counts struct {
	At       time.Time        // when the count began
	ByStatus map[string]int64 // by the word of the status
	Expiring map[string]int64 // active keys, by the time within which they expire: 24h, 7d, 30d
	// Unused are the active keys that are older than a time, and of which no use in this time is
	// known, by the time: 30d, 90d.
	Unused map[string]int64
}

// A period is a label of a time.
type period struct {
	label string
	time.Duration
}

const day = 24 * time.Hour

var (
	expiringWithin = [...]period{{"24h", day}, {"7d", 7 * day}, {"30d", 30 * day}}
	unusedSince    = [...]period{{"30d", 30 * day}, {"90d", 90 * day}}
)

// New returns an Inventory that has counted nothing yet. least is the least time from the beginning
// of a count to the next count of Refresh, and from the end of a count to the next count of Counts.
func New(store *keystore.Store, least time.Duration) *Inventory {
	return &Inventory{store: store, least: least}
}

// Counts returns the last count, or counts if the last count is too old: older than least, and than
// 20 times as long as the count has taken. If ctx ends first, Counts returns the error of ctx.
func (i *Inventory) Counts(ctx context.Context) (*Counts, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	latest, running := i.current()
	if running == nil {
		return latest, nil
	}
	select {
	case <-running.done:
		return running.counts, running.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// current returns the last count, and the count under way. If the last count is too old, current
// starts a count.
func (i *Inventory) current() (*Counts, *counting) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now := time.Now(); i.latest == nil || !now.Before(i.until) {
		i.startLocked(now)
	}
	return i.latest, i.running
}

// Latest returns the last count, however old, or nil if no count has succeeded yet.
func (i *Inventory) Latest() *Counts {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.latest
}

// Refresh returns the same count as Latest does. If the last count began long enough ago, Refresh
// starts the next one, and does not wait for the result.
func (i *Inventory) Refresh() *Counts {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now := time.Now(); i.began.IsZero() || now.Sub(i.began) >= i.least {
		i.startLocked(now)
	}
	return i.latest
}

// startLocked starts a count, unless a count is under way.
func (i *Inventory) startLocked(now time.Time) {
	if i.running == nil {
		i.began, i.running = now, &counting{done: make(chan struct{})}
		go i.run(i.running, now)
	}
}

// run makes one count. If the count fails, the last count remains.
func (i *Inventory) run(c *counting, begin time.Time) {
	c.counts, c.err = count(i.store, begin)
	end := time.Now()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.running = nil; c.err == nil {
		i.latest, i.until = c.counts, end.Add(max(i.least, 20*end.Sub(begin)))
	}
	close(c.done)
}

func count(store *keystore.Store, now time.Time) (*Counts, error) {
	c := &Counts{At: now, ByStatus: make(map[string]int64), Expiring: make(map[string]int64),
		Unused: make(map[string]int64)}
	for status := keystore.StatusActive; status <= keystore.StatusRevoked; status++ {
		c.ByStatus[status.String()] = 0
	}
	for _, p := range expiringWithin {
		c.Expiring[p.label] = 0
	}
	for _, p := range unusedSince {
		c.Unused[p.label] = 0
	}
	for key, err := range store.List(context.Background(), keystore.Query{}) {
		if errors.Is(err, keystore.ErrCorrupt) {
			continue
		}
		if err != nil {
			return nil, err
		}
		status := key.Status()
		c.ByStatus[status.String()]++
		if status != keystore.StatusActive {
			continue
		}
		for _, p := range expiringWithin {
			if !key.ExpiresAt.IsZero() && key.ExpiresAt.Before(now.Add(p.Duration)) {
				c.Expiring[p.label]++
			}
		}
		for _, p := range unusedSince {
			since := now.Add(-p.Duration)
			if key.CreatedAt.Before(since) && key.LastUsedAt.Before(since) && key.Live == 0 {
				c.Unused[p.label]++
			}
		}
	}
	return c, nil
}
