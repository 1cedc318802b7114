package peers

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// The names of the peers that keep keys durably.
const (
	BareBadger      = "Badger, SyncWrites"
	RedisAlways     = "Redis, appendfsync always"
	PostgreSQLTable = "PostgreSQL"
)

// A Table is the alternative to a keystore.Store for writes and for the look-ups of an operator: a
// database that keeps the records of keys durably. A Table does the least that is possible: it
// writes one record for each key and no event of the change, and does not check the record.
type Table struct {
	Name, How string
	// Create writes the record of a new key, and returns once the record is on disk.
	Create func(ctx context.Context, owner string) (id string, err error)
	// Revoke marks the record of a key as revoked, and returns once the mark is on disk.
	Revoke func(ctx context.Context, id string) error
	// CPU returns the processor time of the processes of the database so far. CPU is nil if the
	// database runs in this process.
	CPU func() (time.Duration, error)
	// Fill writes the records of n new keys with the given owners, as fast as possible, and without
	// waiting for the disk after each record. List returns the number of keys of an owner, after
	// reading the records. Get reads one record. RevokeOwner revokes all keys of an owner, and
	// returns their number once the marks are on disk. Some tables do not have these functions.
	Fill        func(ctx context.Context, n int, owner func(i int) string) (ids []string, err error)
	List        func(ctx context.Context, owner string) (int, error)
	Get         func(ctx context.Context, id string) error
	RevokeOwner func(ctx context.Context, owner string) (int, error)
	Close       func() error
}

// StartTables starts the tables with the given names. At most the given number of calls run at the
// same time: the tables of servers have a connection for each of the calls. If indexed is true, the
// tables find the keys of an owner by an index. StartTables skips a table if its server is not
// installed.
func StartTables(
	ctx context.Context, dir string, connections int, indexed bool, names ...string,
) (started []*Table, skipped []Skipped, err error) {
	start := map[string]func(context.Context, string, int, bool) (*Table, error){
		BareBadger:      startBadgerTable,
		RedisAlways:     startRedisTable,
		PostgreSQLTable: startPostgresTable,
	}
	for i, name := range names {
		own := filepath.Join(dir, fmt.Sprintf("table%d", i))
		if err = os.MkdirAll(own, 0o700); err != nil {
			break
		}
		var t *Table
		t, err = start[name](ctx, own, connections, indexed)
		if errors.Is(err, errMissing) {
			skipped = append(skipped, Skipped{name, err.Error()})
			err = nil
			continue
		}
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
			break
		}
		t.Name = name
		started = append(started, t)
	}
	if err != nil {
		return nil, skipped, errors.Join(err, CloseTables(started))
	}
	return started, skipped, nil
}

// CloseTables stops the tables.
func CloseTables(all []*Table) error {
	var errs []error
	for _, t := range all {
		errs = append(errs, t.Close())
	}
	return errors.Join(errs...)
}

// A row is the record of a new key in a Table, with the contents of Spec.
type row struct {
	id, name, owner string
	scopes          []string
	digest          [32]byte
	created         time.Time
}

// newRow returns a row with a random digest. The ID has the length of the IDs of this project, and
// ascends with time, so that the databases append to their indexes.
func newRow(owner string) row {
	spec := Spec()
	r := row{name: spec.Name, owner: owner, scopes: spec.Scopes, created: time.Now()}
	_, _ = rand.Read(r.digest[:])
	id := fmt.Appendf(nil, "%012x", r.created.UnixMilli())
	id = base32.HexEncoding.WithPadding(base32.NoPadding).AppendEncode(id, r.digest[:9])
	r.id = string(id[:26])
	return r
}
