package manage

import (
	"context"
	"errors"
	"maps"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An Inventory counts the keys of a store. A count reads all keys, so an Inventory keeps the last
// count for a while: see NewInventory. Each count runs in a separate goroutine, which ends with
// the count, or when the store is closed. An Inventory is safe for concurrent use.
type Inventory struct {
	store *keystore.Store
	least time.Duration

	mu      sync.Mutex // guards all below
	latest  Counts     // of the last count that has succeeded; nil ByStatus: none has
	until   time.Time  // when latest is too old
	running *counting  // nil: no count is under way
}

// A counting is a count under way.
type counting struct {
	done chan struct{} // closed at the end
	err  error         // written before done is closed
}

// Counts are the numbers of keys of a store. A key whose stored data is damaged does not count.
type Counts struct {
	At       time.Time        // when the count began
	ByStatus map[string]int64 // by the word of the status
	// Expiring are the active keys that expire within ExpiringWithin. Unused are the active keys
	// that are older than UnusedFor, and of which no use in this time is known.
	Expiring, Unused int64
}

// The times of Counts.
const (
	ExpiringWithin = 7 * 24 * time.Hour
	UnusedFor      = 90 * 24 * time.Hour
)

// NewInventory returns an Inventory that has counted nothing yet. The Inventory keeps a count for
// the time least, or for 20 times as long as the count has taken, if that is longer.
func NewInventory(store *keystore.Store, least time.Duration) *Inventory {
	return &Inventory{store: store, least: least}
}

// Counts returns the last count, or counts if the last count is too old. If ctx ends first, Counts
// returns the error of ctx.
func (i *Inventory) Counts(ctx context.Context) (Counts, error) {
	if err := ctx.Err(); err != nil {
		return Counts{}, err
	}
	running := i.refresh()
	if running == nil {
		counts, _ := i.Latest()
		return counts, nil
	}
	select {
	case <-running.done:
	case <-ctx.Done():
		return Counts{}, ctx.Err()
	}
	if running.err != nil {
		return Counts{}, running.err
	}
	counts, _ := i.Latest()
	return counts, nil
}

// Latest returns the last count, however old. If no count has succeeded yet, ok is false.
func (i *Inventory) Latest() (_ Counts, ok bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	counts := i.latest
	counts.ByStatus = maps.Clone(counts.ByStatus)
	return counts, counts.ByStatus != nil
}

// refresh returns the count that is under way. If the last count is too old, refresh starts a
// count. If there is no need to count, refresh returns nil.
func (i *Inventory) refresh() *counting {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.running == nil && (i.latest.ByStatus == nil || !time.Now().Before(i.until)) {
		i.running = &counting{done: make(chan struct{})}
		go i.run(i.running)
	}
	return i.running
}

func (i *Inventory) run(c *counting) {
	begin := time.Now()
	counts, err := i.count(begin)
	end := time.Now()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.running = nil
	if c.err = err; err == nil {
		i.latest, i.until = counts, end.Add(max(i.least, 20*end.Sub(begin)))
	}
	close(c.done)
}

func (i *Inventory) count(now time.Time) (Counts, error) {
	c := Counts{At: now, ByStatus: make(map[string]int64)}
	for status := keystore.StatusActive; status <= keystore.StatusRevoked; status++ {
		c.ByStatus[status.String()] = 0
	}
	expires, unused := now.Add(ExpiringWithin), now.Add(-UnusedFor)
	for key, err := range i.store.List(context.Background(), keystore.Query{}) {
		if errors.Is(err, keystore.ErrCorrupt) {
			continue
		}
		if err != nil {
			return Counts{}, err
		}
		status := key.Status()
		c.ByStatus[status.String()]++
		if status != keystore.StatusActive {
			continue
		}
		if !key.ExpiresAt.IsZero() && key.ExpiresAt.Before(expires) {
			c.Expiring++
		}
		if key.CreatedAt.Before(unused) && key.LastUsedAt.Before(unused) && key.Live == 0 {
			c.Unused++
		}
	}
	return c, nil
}
