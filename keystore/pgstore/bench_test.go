package pgstore_test

import (
	"context"
	"flag"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

var benchKeys = flag.Int("keys", 10_000, "how many keys BenchmarkRevokeAll revokes")

// median returns the median in milliseconds.
func median(d []time.Duration) float64 {
	slices.Sort(d)
	return d[len(d)/2].Seconds() * 1000
}

// BenchmarkRevoke measures a Revoke that is in force in three stores, and one commit of the same
// server, in turns. The server waits for a standby. The ratio is the one of the medians.
func BenchmarkRevoke(b *testing.B) {
	primary := pglab.Start(b, pglab.Config{})
	primary.Standby(b, "b")
	primary.Replicate(b, "b")
	stores := newReplicas(b, primary.URL())
	plain := open(b, newPool(b, primary.URL()), newSchema(), nil)
	ctx := context.Background()
	var commits, revokes []time.Duration
	for n := range max(b.N, 1) {
		issued, err := stores[n%3].Create(ctx, keystore.Spec{Name: "bench"})
		require.NoError(b, err)
		for _, s := range stores {
			_, err := s.Verify(ctx, issued.Secret.Reveal())
			require.NoError(b, err)
		}
		start := time.Now()
		require.NoError(b, plain.Apply(ctx, backend.Change{Key: fmt.Append(nil, n)}))
		commits = append(commits, time.Since(start))
		start = time.Now()
		require.NoError(b, stores[(n+1)%3].Revoke(ctx, issued.Key.ID, "bench"))
		revokes = append(revokes, time.Since(start))
	}
	commit, revoke := median(commits), median(revokes)
	b.ReportMetric(commit, "commit-p50-ms")
	b.ReportMetric(revoke, "revoke-p50-ms")
	b.ReportMetric(float64(revokes[len(revokes)*99/100].Microseconds())/1000, "revoke-p99-ms")
	b.ReportMetric(revoke/commit, "revoke/commit")
}

// startAlone returns a server that syncs each commit, and a store on the server.
func startAlone(b *testing.B) (*pglab.Server, *pgstore.Backend, *keystore.Store) {
	server := pglab.Start(b, pglab.Config{Settings: []string{"max_wal_size=4GB"}})
	engine, s := openStore(b, server, alone)
	return server, engine, s
}

// openStore opens a store that is closed at the end of the benchmark.
func openStore(
	b *testing.B, server *pglab.Server, o *pgstore.Options,
) (*pgstore.Backend, *keystore.Store) {
	engine := open(b, newPool(b, server.URL("pool_max_conns", "32")), "apikeys", o)
	s, err := keystore.New(engine, &keystore.Options{CacheSize: -1, Timeout: patience})
	require.NoError(b, err)
	b.Cleanup(func() { _ = s.Close() })
	return engine, s
}

// BenchmarkCreate measures the creates of 32 writers, and bare INSERTs of as many rows and bytes by
// 32 writers with as many connections, in turns.
func BenchmarkCreate(b *testing.B) {
	server, _, s := startAlone(b)
	ctx := context.Background()
	_, err := s.Create(ctx, keystore.Spec{Name: "bench"})
	require.NoError(b, err)
	pool := newPool(b, server.URL("pool_max_conns", "32"))
	_, err = pool.Exec(ctx, "create table bare (key bytea primary key, value bytea not null)")
	require.NoError(b, err)
	var written, values [][]byte // by one Create
	require.NoError(b, pool.QueryRow(ctx, "select array_agg(key), array_agg(value) "+
		"from apikeys.entry group by position order by count(*) desc, position desc limit 1").
		Scan(&written, &values))
	var number atomic.Uint64
	insert := func() error {
		keys := make([][]byte, len(written))
		for i, key := range written {
			keys[i] = append(fmt.Appendf(nil, "%012d", number.Add(1)), key...)[:max(12, len(key))]
		}
		_, err := pool.Exec(ctx, "insert into bare select * from unnest($1::bytea[], $2::bytea[])",
			keys, values)
		return err
	}
	create := func() error {
		_, err := s.Create(ctx, keystore.Spec{Name: "bench"})
		return err
	}
	const writers, each = 32, 20
	round := func(write func() error) time.Duration {
		var all sync.WaitGroup
		start := time.Now()
		for range writers {
			all.Go(func() {
				for range each {
					if err := write(); err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		return time.Since(start)
	}
	var creates, inserts time.Duration
	for range max(b.N, 1) {
		creates += round(create)
		inserts += round(insert)
	}
	calls := float64(max(b.N, 1) * writers * each)
	b.ReportMetric(calls/creates.Seconds(), "creates/s")
	b.ReportMetric(calls/inserts.Seconds(), "inserts/s")
	b.ReportMetric(inserts.Seconds()/creates.Seconds(), "creates/inserts")
}

// BenchmarkRevokeAll measures RevokeAll, and a bare UPDATE of as many rows in batches of 64. The
// server waits for a standby, as the guarantees of the store need, or is alone.
func BenchmarkRevokeAll(b *testing.B) {
	b.Run("standby", func(b *testing.B) {
		primary := pglab.Start(b, pglab.Config{Settings: []string{"max_wal_size=4GB"}})
		primary.Standby(b, "b")
		primary.Replicate(b, "b")
		_, s := openStore(b, primary, nil)
		benchmarkRevokeAll(b, primary, s)
	})
	b.Run("alone", func(b *testing.B) {
		server, _, s := startAlone(b)
		benchmarkRevokeAll(b, server, s)
	})
}

func benchmarkRevokeAll(b *testing.B, server *pglab.Server, s *keystore.Store) {
	ctx := context.Background()
	pool := newPool(b, server.URL())
	var revokes, updates time.Duration
	for n := range max(b.N, 1) {
		owner := fmt.Sprint("owner ", n)
		var all sync.WaitGroup
		var created atomic.Int64
		for range 32 {
			all.Go(func() {
				for created.Add(1) <= int64(*benchKeys) {
					_, err := s.Create(ctx, keystore.Spec{Name: "k", Owner: owner})
					if err != nil {
						b.Error(err)
						return
					}
				}
			})
		}
		all.Wait()
		_, err := pool.Exec(ctx, "create table bare as select row_number() over () as id, value "+
			"from apikeys.entry where key >= 'k' and key < 'l'")
		require.NoError(b, err)
		_, err = pool.Exec(ctx, "alter table bare add primary key (id)")
		require.NoError(b, err)
		start := time.Now()
		revoked, err := s.RevokeAll(ctx, keystore.Query{Owner: owner}, "bench", nil)
		require.NoError(b, err)
		require.Equal(b, *benchKeys, revoked)
		revokes += time.Since(start)
		start = time.Now()
		for id := 0; id < *benchKeys; id += 64 {
			_, err := pool.Exec(ctx, "update bare set value = value || 'revoked' where id > $1 "+
				"and id <= $1 + 64", id)
			require.NoError(b, err)
		}
		updates += time.Since(start)
		_, err = pool.Exec(ctx, "drop table bare")
		require.NoError(b, err)
	}
	b.ReportMetric(float64(revokes.Milliseconds())/float64(max(b.N, 1)), "revoke-all-ms")
	b.ReportMetric(float64(updates.Milliseconds())/float64(max(b.N, 1)), "update-ms")
	b.ReportMetric(revokes.Seconds()/updates.Seconds(), "revoke-all/update")
}

// BenchmarkVerifyMiss measures a Verify that reads the storage, and a prepared SELECT by the primary
// key, in turns: of the only process on a server without a standby, and of one of three processes
// on a server with a standby. Both have the same context, which has a deadline, as the context of a
// call of gRPC has.
func BenchmarkVerifyMiss(b *testing.B) {
	b.Run("alone", func(b *testing.B) {
		server, engine, s := startAlone(b)
		benchmarkVerifyMiss(b, server, engine, s)
	})
	b.Run("three", func(b *testing.B) {
		primary := pglab.Start(b, pglab.Config{})
		primary.Standby(b, "b")
		primary.Replicate(b, "b")
		for range 2 {
			openStore(b, primary, nil)
		}
		engine, s := openStore(b, primary, nil)
		benchmarkVerifyMiss(b, primary, engine, s)
	})
}

func benchmarkVerifyMiss(
	b *testing.B, server *pglab.Server, engine *pgstore.Backend, s *keystore.Store,
) {
	ctx := context.Background()
	issued, err := s.Create(ctx, keystore.Spec{Name: "bench"})
	require.NoError(b, err)
	var key []byte
	for e, err := range engine.Scan(ctx, []byte("k"), []byte("l")) {
		require.NoError(b, err)
		key = e.Key
	}
	pool := newPool(b, server.URL())
	var value []byte
	var revision int64
	var misses, selects []time.Duration
	for range max(b.N, 1) {
		ctx, cancel := context.WithTimeout(ctx, patience)
		start := time.Now()
		_, err := s.Verify(ctx, issued.Secret.Reveal())
		misses = append(misses, time.Since(start))
		require.NoError(b, err)
		start = time.Now()
		err = pool.QueryRow(ctx, "select value, revision from apikeys.entry where key = $1",
			key).Scan(&value, &revision)
		selects = append(selects, time.Since(start))
		require.NoError(b, err)
		cancel()
	}
	miss, sel := median(misses), median(selects)
	b.ReportMetric(miss*1000, "miss-p50-µs")
	b.ReportMetric(sel*1000, "select-p50-µs")
	b.ReportMetric(miss/sel, "miss/select")
}
