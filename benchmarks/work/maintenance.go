package work

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The maintenance workload measures what reads or changes the whole store. The references for
// Backup and CheckIntegrity are bare scans of the same entries in a copy of the same directory,
// with the layer of the store over Badger. A Backup reads the keys and the uses, but no events and
// no indexes; CheckIntegrity reads everything. The reference for a Restore into an empty store is
// to create as many keys, from 1,024 goroutines. Purge removes these created keys, after RevokeAll
// has revoked all of the keys.
var maintenanceWork = Workload{
	Name:  "maintenance",
	Title: "Work on the whole store",
	About: "All figures are for each million keys. A scan reads the entries with " +
		"`internal/badgerdb`, the layer of the store over Badger, from a copy of the same " +
		"directory. Backup writes to nowhere, and Restore reads from a file. 1,024 goroutines " +
		"create keys. Backup, CheckIntegrity and the scans use a store of 1 M keys; the rest uses " +
		"stores of 200,000 keys.",
	Goals: []Goal{
		{ID: "backup", Work: "Backup / a bare Scan of the same entries", Bound: atMost(1.5, Times)},
		{ID: "check", Work: "CheckIntegrity / a bare Scan of all entries", Bound: atMost(2, Times)},
		{ID: "restore", Work: "Restore / creating as many keys", Bound: atMost(1, Times)},
	},
}

func init() { maintenanceWork.Run = runMaintenance }

const (
	wholeBackup   = "Backup"
	wholeCheck    = "CheckIntegrity"
	wholeScanKeys = "bare Scan of the entries that a Backup has"
	wholeScan     = "bare Scan of all entries"

	wholeCreate  = "creating keys, 1,024 goroutines"
	wholeRestore = "Restore"
	wholeRevoke  = "RevokeAll of all keys"
	wholePurge   = "Purge of all keys"
)

func runMaintenance(ctx context.Context, e *Env) (o *Outcome, err error) {
	read, err := e.readWhole(ctx, e.size(million))
	if err != nil {
		return nil, err
	}
	changed, err := e.changeWhole(ctx, e.size(200_000))
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	w := &maintenanceWork
	o.judge(w, "backup", measure.Ratios(read[wholeBackup], read[wholeScanKeys]))
	o.judge(w, "check", measure.Ratios(read[wholeCheck], read[wholeScan]))
	o.judge(w, "restore", measure.Ratios(changed[wholeRestore], changed[wholeCreate]))
	for _, name := range []string{wholeBackup, wholeScanKeys, wholeCheck, wholeScan} {
		o.figure(name, Nanos, read[name])
	}
	for _, name := range []string{wholeCreate, wholeRestore, wholeRevoke, wholePurge} {
		o.figure(name, Nanos, changed[name])
	}
	return o, nil
}

// readWhole measures what reads a store with the given number of keys.
func (e *Env) readWhole(ctx context.Context, keys int) (s measure.Samples, err error) {
	sized, err := e.sized(ctx, keys)
	if err != nil {
		return nil, err
	}
	copied, err := e.copyOf(sized)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	layer, err := badgerdb.Open(copied, badgerdb.Options{})
	if err != nil {
		return nil, err
	}
	end.add(layer.Close)
	store, err := keystore.Open(sized.dir, peers.Options(0))
	if err != nil {
		return nil, err
	}
	end.add(store.Close)
	// scan yields at least the number of keys, because every key has a record.
	scan := func(from, to []byte) func(context.Context) error {
		return func(ctx context.Context) error {
			n := 0
			for _, err := range layer.Scan(ctx, from, to) {
				if err != nil {
					return err
				}
				n++
			}
			if n < keys {
				return exactly(n, keys)
			}
			return nil
		}
	}
	contestants := []measure.Contestant{
		once(wholeBackup, func(ctx context.Context) error { return store.Backup(ctx, io.Discard) }),
		once(wholeCheck, store.CheckIntegrity),
		once(wholeScanKeys, scan([]byte{'g'}, []byte{'u' + 1})), // as keystore.Backup
		once(wholeScan, scan(nil, nil)),
	}
	rounds, err := e.affordable(ctx, 11, contestants)
	if err != nil {
		return nil, err
	}
	s, err = measure.Rounds(ctx, rounds, e.progress("reading the whole store"), contestants...)
	return forMillion(s, keys), err
}

// forMillion scales durations to a million keys.
func forMillion(s measure.Samples, keys int) measure.Samples {
	for name, samples := range s {
		s[name] = measure.Scaled(samples, million/float64(keys))
	}
	return s
}

// changeWhole measures what changes a store with the given number of keys. Each round has new
// stores. Restore comes after the creation, because Restore restores the created keys.
func (e *Env) changeWhole(ctx context.Context, keys int) (measure.Samples, error) {
	s := make(measure.Samples)
	rounds := e.rounds(5)
	for round := range rounds + 1 {
		e.progress("creating, restoring and purging")(round, rounds+1)
		took, err := e.changeOnce(ctx, keys)
		if err != nil {
			return nil, err
		}
		for name, d := range took {
			if round > 0 { // the first round warms up
				s[name] = append(s[name], float64(d.Nanoseconds()))
			}
		}
	}
	return forMillion(s, keys), nil
}

func (e *Env) changeOnce(
	ctx context.Context, keys int,
) (took map[string]time.Duration, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	var end closer
	defer end.into(&err)
	opened := func(name string) (*keystore.Store, error) {
		store, err := keystore.Open(filepath.Join(dir, name), peers.Options(0))
		if err == nil {
			end.add(store.Close)
		}
		return store, err
	}
	created, err := opened("created")
	if err != nil {
		return nil, err
	}
	restored, err := opened("restored")
	if err != nil {
		return nil, err
	}
	backup, err := os.Create(filepath.Join(dir, "backup"))
	if err != nil {
		return nil, err
	}
	end.add(backup.Close)

	took = make(map[string]time.Duration)
	timed := func(name string, do func() error) {
		if err != nil {
			return
		}
		begin := time.Now()
		err = do()
		took[name] = time.Since(begin)
	}
	all := func(do func() (int, error)) func() error {
		return func() error {
			n, err := do()
			if err != nil {
				return err
			}
			return exactly(n, keys)
		}
	}
	owners := ownersOf(keys)
	timed(wholeCreate, func() error {
		return peers.CreateEach(ctx, created, keys, func(number int) keystore.Spec {
			spec := peers.Spec()
			spec.Owner = ownerName(number % owners)
			return spec
		}, func(int, *keystore.Issued) {}, nil)
	})
	timed("", func() error {
		if err := created.Backup(ctx, backup); err != nil {
			return err
		}
		_, err := backup.Seek(0, io.SeekStart)
		return err
	})
	delete(took, "")
	timed(wholeRestore, func() error { return restored.Restore(ctx, backup) })
	timed(wholeRevoke, all(func() (int, error) {
		return created.RevokeAll(ctx, keystore.Query{}, "measured",
			&keystore.RevokeAllOptions{All: true})
	}))
	timed(wholePurge, all(func() (int, error) { return created.Purge(ctx, time.Now()) }))
	return took, err
}
