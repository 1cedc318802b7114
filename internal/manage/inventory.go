package manage

import (
	"context"
	"errors"
	"maps"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An Inventory counts the keys of a store by status. A count reads all keys, so an Inventory keeps
// the last count for a minute, or for 20 times as long as the count has taken. An Inventory is safe
// for concurrent use.
type Inventory struct {
	store *keystore.Store
	// turn holds one token. The caller who has the token may use the fields below.
	turn   chan struct{}
	counts map[string]int64 // by the word of the status; nil: not counted yet
	at     time.Time        // when the count began
	until  time.Time        // when the count is too old
}

const keepCount = time.Minute

// NewInventory returns an Inventory that has counted nothing yet.
func NewInventory(store *keystore.Store) *Inventory {
	return &Inventory{store: store, turn: make(chan struct{}, 1)}
}

// Keys returns the number of keys in each status, by the word of the status, and when the keys were
// counted. Keys counts if the last count is too old. While a caller counts, the other callers wait
// for the count, each until its ctx ends. A key whose stored data is damaged does not count.
func (i *Inventory) Keys(ctx context.Context) (map[string]int64, time.Time, error) {
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return nil, time.Time{}, ctx.Err()
	}
	if i.counts == nil || !time.Now().Before(i.until) {
		if err := i.count(ctx); err != nil {
			return nil, time.Time{}, err
		}
	}
	return maps.Clone(i.counts), i.at, nil
}

func (i *Inventory) count(ctx context.Context) error {
	begin := time.Now()
	counts := make(map[string]int64)
	for status := keystore.StatusActive; status <= keystore.StatusRevoked; status++ {
		counts[status.String()] = 0
	}
	for key, err := range i.store.List(ctx, keystore.Query{}) {
		if errors.Is(err, keystore.ErrCorrupt) {
			continue
		}
		if err != nil {
			return err
		}
		counts[key.Status().String()]++
	}
	end := time.Now()
	i.counts, i.at, i.until = counts, begin, end.Add(max(keepCount, 20*end.Sub(begin)))
	return nil
}
