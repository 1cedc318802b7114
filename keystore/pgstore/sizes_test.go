package pgstore_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A loader is the backend of a store whose new keys go into rows instead, which COPY then writes
// faster than commits could. The rows are those that the store would have written.
type loader struct{ backend.Feeder }

// rowsOf is the context key of the *[][]any that collects the rows of a caller.
type rowsOf struct{}

func (l loader) Apply(ctx context.Context, changes ...backend.Change) error {
	rows, ok := ctx.Value(rowsOf{}).(*[][]any)
	if !ok {
		return l.Feeder.Apply(ctx, changes...)
	}
	for _, c := range changes {
		if !c.Check {
			value := append([]byte{}, c.Value...) // not the null of SQL
			*rows = append(*rows, []any{c.Key, value, int64(1), int64(1)})
		}
	}
	return nil
}

// keysOfOwner is the number of keys of each owner. The keys of an owner are created far apart.
const keysOfOwner = 10

func owner(n int) string { return fmt.Sprint("customer ", n) }

// load adds keys to the tables of a schema, and returns some of the tokens.
func load(b *testing.B, pool *pgxpool.Pool, schema string, keys int) (tokens []string) {
	store, err := keystore.New(loader{backendtest.NewShared().Open()},
		&keystore.Options{CacheSize: -1, Timeout: 10 * time.Minute})
	require.NoError(b, err)
	defer store.Close()
	const writers, chunk = 4, 2000
	var next atomic.Int64
	var mu sync.Mutex
	var all sync.WaitGroup
	for range writers {
		all.Go(func() {
			for {
				from := int(next.Add(chunk)) - chunk
				if from >= keys {
					return
				}
				var rows [][]any
				ctx := context.WithValue(context.Background(), rowsOf{}, &rows)
				for n := from; n < min(from+chunk, keys); n++ {
					issued, err := store.Create(ctx, keystore.Spec{
						Name:   fmt.Sprint("key ", n),
						Owner:  owner(n % max(1, keys/keysOfOwner)),
						Scopes: []string{"orders:read", "orders:write"},
					})
					if err != nil {
						b.Error(err)
						return
					}
					if n%max(1, keys/1000) == 0 {
						mu.Lock()
						tokens = append(tokens, issued.Secret.Reveal())
						mu.Unlock()
					}
				}
				_, err := pool.CopyFrom(ctx, pgx.Identifier{schema, "entry"},
					[]string{"key", "value", "revision", "position"}, pgx.CopyFromRows(rows))
				if err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	return tokens
}

// BenchmarkSizes makes a store of 100,000 keys and a store of -keys keys on one server. In both,
// BenchmarkSizes measures the space of a key, and in turns a Verify that reads the storage, and a
// list of the ten keys of an owner.
//
// BenchmarkSizes also reports how many pages the server read for a Verify and a list together, and
// the mean time of such a read. These pages were not in shared_buffers. A read that takes a few µs
// copies the page from the memory of the operating system. If the reads take longer, the memory of
// the machine does not hold the store, and the list measures the disk.
func BenchmarkSizes(b *testing.B) {
	server := pglab.Start(b, pglab.Config{Settings: []string{
		"max_wal_size=4GB", "shared_buffers=1GB", "track_io_timing=on",
	}})
	ctx := context.Background()
	type size struct {
		name, schema  string
		keys          int
		space         float64 // of a key, with all indexes, in bytes
		store         *keystore.Store
		tokens        []string
		misses, lists []time.Duration
	}
	small := &size{name: "small", schema: "small", keys: min(100_000, *benchKeys)}
	large := &size{name: "large", schema: "large", keys: *benchKeys}
	sizes := []*size{small, large}
	connect := func() *pgxpool.Pool { return newPool(b, server.URL("pool_max_conns", "8")) }
	// disconnect waits for the ends of the connections: the statistics of the server lack what a
	// connection has read last, until the connection ends.
	disconnect := func(pool *pgxpool.Pool) {
		pool.Close()
		server.Await(b, "select count(*) from pg_stat_activity "+
			"where backend_type = 'client backend' and pid <> pg_backend_pid()", "0")
	}
	newStore := func(pool *pgxpool.Pool, schema string) *keystore.Store {
		s, err := keystore.New(open(b, pool, schema, alone),
			&keystore.Options{CacheSize: -1, Timeout: patience})
		require.NoError(b, err)
		return s
	}
	pool := connect()
	for _, z := range sizes {
		// Makes the tables, and the state of a store.
		require.NoError(b, newStore(pool, z.schema).Close())
		began := time.Now()
		z.tokens = load(b, pool, z.schema, z.keys)
		b.ReportMetric(time.Since(began).Seconds(), z.name+"-load-s")
		began = time.Now()
		_, err := pool.Exec(ctx, "vacuum (analyze) "+z.schema+".entry")
		require.NoError(b, err)
		b.ReportMetric(time.Since(began).Seconds(), z.name+"-vacuum-s")
		var table, all int64
		require.NoError(b, pool.QueryRow(ctx, "select pg_table_size($1::text::regclass), "+
			"pg_total_relation_size($1::text::regclass)",
			z.schema+".entry").Scan(&table, &all))
		z.space = float64(all) / float64(z.keys)
		b.ReportMetric(float64(table)/float64(z.keys), z.name+"-table-B/key")
		b.ReportMetric(z.space, z.name+"-B/key")
	}
	disconnect(pool)
	server.Exec(b, "select pg_stat_reset()")
	pool = connect()
	for _, z := range sizes {
		z.store = newStore(pool, z.schema)
		defer z.store.Close()
	}
	rounds := max(b.N, 2000)
	for range rounds {
		for _, z := range sizes {
			token := z.tokens[rand.IntN(len(z.tokens))]
			began := time.Now()
			_, err := z.store.Verify(ctx, token)
			z.misses = append(z.misses, time.Since(began))
			require.NoError(b, err)
			who := owner(rand.IntN(max(1, z.keys/keysOfOwner)))
			began = time.Now()
			n := 0
			for _, err := range z.store.List(ctx, keystore.Query{Owner: who}) {
				require.NoError(b, err)
				n++
			}
			z.lists = append(z.lists, time.Since(began))
			require.Equal(b, keysOfOwner, n)
		}
	}
	for _, z := range sizes {
		require.NoError(b, z.store.Close())
	}
	disconnect(pool)
	pool = connect()
	var pages int64
	var micros float64
	require.NoError(b, pool.QueryRow(ctx, "select s.heap_blks_read + s.idx_blks_read, "+
		"1000 * d.blk_read_time / greatest(d.blks_read, 1) "+
		"from pg_stat_database d, pg_statio_user_tables s where d.datname = current_database() "+
		"and s.schemaname = $1 and s.relname = 'entry'", large.schema).Scan(&pages, &micros))
	perRound := float64(pages) / float64(rounds)
	b.ReportMetric(perRound, "large-pages/round")
	b.ReportMetric(micros, "page-µs")
	for _, z := range sizes {
		b.ReportMetric(median(z.misses)*1000, z.name+"-miss-p50-µs")
		b.ReportMetric(median(z.lists)*1000, z.name+"-list-p50-µs")
	}
	misses := median(large.misses) / median(small.misses)
	lists := median(large.lists) / median(small.lists)
	b.ReportMetric(misses, "miss-large/small")
	b.ReportMetric(lists, "list-large/small")
	figures.Record(b, "%d and %d keys: a key takes %.0f and %.0f bytes; p50 of a Verify that reads "+
		"the storage %.0fµs and %.0fµs (%.2f ×), of a list of %d keys %.0fµs and %.0fµs (%.2f ×); "+
		"for a Verify and a list among %d keys, the server read %.1f pages that were not in "+
		"shared_buffers, each in %.1fµs", small.keys, large.keys, small.space, large.space,
		median(small.misses)*1000, median(large.misses)*1000, misses, keysOfOwner,
		median(small.lists)*1000, median(large.lists)*1000, lists, large.keys, perRound, micros)
}
