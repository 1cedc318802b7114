package peers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/dgraph-io/badger/v4"
)

// startBadgerTable starts a table that a user of Badger would write first: each change is one
// transaction of db.Update, with SyncWrites.
func startBadgerTable(_ context.Context, dir string, _ int, indexed bool) (*Table, error) {
	if indexed {
		return nil, errors.New("the table has no index")
	}
	db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil).WithSyncWrites(true))
	if err != nil {
		return nil, err
	}
	type record struct {
		Name, Owner, Reason string
		Scopes              []string
		Digest              []byte
		Created, Revoked    time.Time
	}
	set := func(txn *badger.Txn, id string, r *record) error {
		value, err := json.Marshal(r)
		if err != nil {
			return err
		}
		return txn.Set([]byte(id), value)
	}
	return &Table{
		How: "one transaction of db.Update for each change, with SyncWrites; one JSON record",
		Create: func(_ context.Context, owner string) (string, error) {
			r := newRow(owner)
			return r.id, db.Update(func(txn *badger.Txn) error {
				return set(txn, r.id, &record{
					Name: r.name, Owner: r.owner, Scopes: r.scopes,
					Digest: r.digest[:], Created: r.created,
				})
			})
		},
		Revoke: func(_ context.Context, id string) error {
			return db.Update(func(txn *badger.Txn) error {
				item, err := txn.Get([]byte(id))
				if err != nil {
					return fmt.Errorf("key %s: %w", id, err)
				}
				var r record
				err = item.Value(func(value []byte) error { return json.Unmarshal(value, &r) })
				if err != nil {
					return err
				}
				r.Revoked, r.Reason = time.Now(), "measured"
				return set(txn, id, &r)
			})
		},
		Close: db.Close,
	}, nil
}
