package storemetrics

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// MinInventory is the shortest time between two counts of an Inventory: each count reads every key.
const MinInventory = 10 * time.Minute

// An Inventory counts the keys of a store in the background. An Inventory starts a goroutine for
// each count. The goroutine ends with the count, or when the store is closed.
type Inventory struct {
	store *keystore.Store
	every time.Duration

	mu      sync.Mutex // guards all below
	began   time.Time  // when the last count began; zero: never
	running bool
	latest  *Counts // nil: no count is complete
}

// Counts are the counts of an Inventory. Callers must not change the maps.
type Counts struct {
	At       time.Time      // when the count began
	Keys     map[string]int // by the text of the status
	Expiring map[string]int // active keys, by the time within which they expire
	Unused   map[string]int // active keys, by the time for which no use is known
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
	statuses       = [...]keystore.Status{keystore.StatusActive, keystore.StatusPending,
		keystore.StatusExpired, keystore.StatusDisabled, keystore.StatusRevoked}
)

// NewInventory returns an Inventory that counts at most once in a time. The error says why the time
// is not usable.
func NewInventory(store *keystore.Store, every time.Duration) (*Inventory, error) {
	if every < MinInventory {
		return nil, fmt.Errorf("Inventory is %v: it must be 0, for no inventory, or at least %v, "+
			"because each count reads every key", every, MinInventory)
	}
	return &Inventory{store: store, every: every}, nil
}

// Latest returns the counts of the last complete count, or nil if no count is complete. If the
// last count began long enough ago, Latest starts the next one, and does not wait for it.
func (i *Inventory) Latest() *Counts {
	i.mu.Lock()
	defer i.mu.Unlock()
	if now := time.Now(); !i.running && (i.began.IsZero() || now.Sub(i.began) >= i.every) {
		i.began, i.running = now, true
		go i.run(now)
	}
	return i.latest
}

// run makes one count. If the count fails, the counts before remain.
func (i *Inventory) run(now time.Time) {
	counts, err := count(i.store, now)
	i.mu.Lock()
	defer i.mu.Unlock()
	i.running = false
	if err == nil {
		i.latest = counts
	}
}

// count counts the keys of a store. A damaged key does not count.
func count(store *keystore.Store, now time.Time) (*Counts, error) {
	c := &Counts{At: now, Keys: make(map[string]int), Expiring: make(map[string]int),
		Unused: make(map[string]int)}
	for _, status := range statuses {
		c.Keys[status.String()] = 0
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
		c.Keys[status.String()]++
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
