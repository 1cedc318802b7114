package peers

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/golang-lru/v2/expirable"
)

// startLookAside starts a peer with a typical hand-written cache. The peer accepts a revoked key
// until the TTL of the cached entry ends.
func startLookAside(_ context.Context, dir string) (*Peer, error) {
	db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil).WithSyncWrites(true))
	if err != nil {
		return nil, err
	}
	stored, unknown := issue()
	batch := db.NewWriteBatch()
	defer batch.Cancel()
	for _, i := range stored {
		digest := i.digest()
		if err := batch.Set(digest[:], []byte(i.id)); err != nil {
			return nil, errors.Join(err, db.Close())
		}
	}
	if err := batch.Flush(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	cache := expirable.NewLRU[[sha256.Size]byte, *principal](1<<16, nil, time.Minute)
	p := guard(func(_ context.Context, credential string) (*principal, error) {
		digest := sha256.Sum256([]byte(credential))
		if p, ok := cache.Get(digest); ok {
			return p, nil
		}
		var p *principal
		err := db.View(func(txn *badger.Txn) error {
			item, err := txn.Get(digest[:])
			if err != nil {
				return err
			}
			return item.Value(func(id []byte) error {
				p = &principal{string(id)}
				return nil
			})
		})
		if errors.Is(err, badger.ErrKeyNotFound) {
			return nil, errRefused
		}
		if err != nil {
			return nil, err
		}
		cache.Add(digest, p)
		return p, nil
	})
	p.How = "golang-lru's expirable.LRU by SHA-256 in front of Badger, with 65,536 entries and a " +
		"TTL of one minute: a revoked key is accepted until the TTL ends"
	p.Close = db.Close
	p.credentials(stored, unknown)
	return p, nil
}
