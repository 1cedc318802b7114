package badgerdb

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A durable commit against one that is not kept a second time, and against Badger's own of the same
// entries, by turns: x-unkept and x-badger are the ratios of the medians. Badger's own compares no
// revisions and checks nothing.
func BenchmarkCommit(b *testing.B) {
	for _, changes := range []int{1, 64} {
		b.Run(fmt.Sprint(changes), func(b *testing.B) {
			db, unkept, bare := open(b, b.TempDir()), open(b, b.TempDir()), openBare(b)
			unkept.writeCommitFile = func(commitfile.Record) error { return nil }
			value := make([]byte, 200)
			var with, without, badgers []time.Duration
			apply := func(db *DB, all []backend.Change) time.Duration {
				begin := time.Now()
				require.NoError(b, db.Apply(b.Context(), all...))
				return time.Since(begin)
			}
			for n := uint64(1); b.Loop(); n++ {
				var all []backend.Change
				for i := range changes {
					key := fmt.Appendf(nil, "k%016d-%d", n, i)
					all = append(all, backend.Change{Key: key, Value: value})
				}
				with = append(with, apply(db, all))
				without = append(without, apply(unkept, all))

				begin := time.Now()
				txn := bare.NewTransactionAt(n, true)
				for _, c := range all {
					require.NoError(b, txn.SetEntry(badger.NewEntry(c.Key, c.Value)))
				}
				require.NoError(b, txn.CommitAt(n, nil))
				badgers = append(badgers, time.Since(begin))
			}
			b.ReportMetric(float64(median(with).Microseconds()), "µs/commit")
			b.ReportMetric(float64(median(without).Microseconds()), "µs/unkept")
			b.ReportMetric(float64(median(with))/float64(median(without)), "x-unkept")
			b.ReportMetric(float64(median(with))/float64(median(badgers)), "x-badger")
		})
	}
}

// A read, against Badger's own of the same entry, by turns.
func BenchmarkGet(b *testing.B) {
	db := open(b, b.TempDir())
	const keys = 1000
	value := make([]byte, 200)
	key := func(n int) []byte { return fmt.Appendf(nil, "k%015d", n%keys) }
	for n := range keys {
		require.NoError(b, db.Apply(b.Context(), backend.Change{Key: key(n), Value: value}))
	}
	for _, bm := range []struct {
		name   string
		offset int
	}{{"present", 0}, {"absent", keys}} {
		b.Run(bm.name, func(b *testing.B) {
			var with, without []time.Duration
			const batch = 200
			keyOf := func(n int) []byte { return fmt.Appendf(nil, "k%015d", n%keys+bm.offset) }
			b.ReportAllocs()
			for b.Loop() {
				begin := time.Now()
				for n := range batch {
					_, _ = db.Get(b.Context(), keyOf(n))
				}
				with = append(with, time.Since(begin))
				begin = time.Now()
				for n := range batch {
					txn := db.badger.NewTransactionAt(db.durable.Load(), false)
					key := append([]byte{layout.KeyPrefix}, keyOf(n)...)
					if item, err := txn.Get(key); err == nil {
						_, _ = item.ValueCopy(nil)
					}
					txn.Discard()
				}
				without = append(without, time.Since(begin))
			}
			b.ReportMetric(float64(median(with).Nanoseconds())/batch, "ns/get")
			b.ReportMetric(float64(median(without).Nanoseconds())/batch, "ns/badger")
			b.ReportMetric(float64(median(with))/float64(median(without)), "x-badger")
		})
	}
}

// A scan of everything, and of ten entries among all.
func BenchmarkScan(b *testing.B) {
	db := open(b, b.TempDir())
	const keys = 20_000
	key := func(n int) []byte { return fmt.Appendf(nil, "k%015d", n) }
	all := make([]backend.Change, keys)
	for n := range all {
		all[n] = backend.Change{Key: key(n), Value: make([]byte, 200)}
	}
	for part := range slices.Chunk(all, backend.MaxChanges) {
		require.NoError(b, db.Apply(b.Context(), part...))
	}
	for _, entries := range []int{10, keys} {
		b.Run(fmt.Sprint(entries), func(b *testing.B) {
			for b.Loop() {
				n := 0
				for _, err := range db.Scan(b.Context(), key(keys-entries), key(keys)) {
					require.NoError(b, err)
					n++
				}
				require.Equal(b, entries, n)
			}
		})
	}
}

func openBare(b *testing.B) *badger.DB {
	db := &DB{dir: b.TempDir(), space: newSpaceGuard(b.TempDir(), 0, 0)}
	bare, err := badger.OpenManaged(db.options(Options{}).WithLogger(nil))
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, bare.Close()) })
	return bare
}

func median(values []time.Duration) time.Duration {
	return slices.Sorted(slices.Values(values))[len(values)/2]
}
