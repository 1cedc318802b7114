package crashtest

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func init() { roles["opener"] = opener }

// opener opens the store, which builds the indexes, and closes the store.
func opener(dir string) error {
	report("opening")
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	report("open")
	return store.Close()
}

// makeWithoutIndexes makes a store as a program without indexes would have made the store.
func makeWithoutIndexes(t *testing.T, dir string, keys int) {
	t.Helper()
	store, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	for n := range keys {
		spec := keystore.Spec{Name: "n", Owner: fmt.Sprint("owner ", n%7)}
		issued, err := store.Create(t.Context(), spec)
		require.NoError(t, err)
		if n%5 == 0 {
			require.NoError(t, store.Disable(t.Context(), issued.Key.ID, ""))
		}
	}
	require.NoError(t, store.Close())
	db, err := badgerdb.Open(dir, badgerdb.Options{})
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	var batch []backend.Change
	// The state of the store has the state of the indexes at its end. The indexes come after it.
	for e, err := range db.Scan(t.Context(), []byte{'w'}, nil) {
		require.NoError(t, err)
		c := backend.Change{Key: e.Key, Expect: e.Revision, Delete: true}
		if e.Key[0] == 'w' {
			c = backend.Change{Key: e.Key, Value: e.Value[:9], Expect: e.Revision}
		}
		if batch = append(batch, c); len(batch) == backend.MaxChanges {
			require.NoError(t, db.Apply(t.Context(), batch...))
			batch = nil
		}
	}
	if len(batch) > 0 {
		require.NoError(t, db.Apply(t.Context(), batch...))
	}
}

// TestKillOfAMigration kills the process again and again while Open builds the indexes. In the end,
// the indexes are complete.
func TestKillOfAMigration(t *testing.T) {
	random := seeded(t)
	began := time.Now()
	kills := 0
	for range max(1, *cycles/5) {
		dir := t.TempDir()
		const keys = 1000
		makeWithoutIndexes(t, dir, keys)
		// A slow machine needs a long time before it continues where it was.
		for within, done := 150*time.Millisecond, false; !done; within += within / 20 {
			p := start(t, "opener", dir)
			line, _ := p.line()
			require.Equal(t, "opening", line, p.stderr)
			time.AfterFunc(moment(random, within), func() { _ = p.cmd.Process.Kill() })
			for line, ok := p.line(); ok; line, ok = p.line() {
				done = done || line == "open"
			}
			if err := p.cmd.Wait(); err != nil {
				require.ErrorContains(t, err, "signal: killed", p.stderr)
				kills++
			}
		}
		store, err := keystore.Open(dir, nil)
		require.NoError(t, err)
		require.NoError(t, checkEvents(t.Context(), store))
		require.NoError(t, store.Close())
	}
	figures.Record(t, "%d kills while Open builds the indexes: nothing is missing; %.2f s a kill",
		kills, time.Since(began).Seconds()/float64(max(1, kills)))
}
