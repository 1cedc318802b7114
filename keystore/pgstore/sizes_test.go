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
func BenchmarkSizes(b *testing.B) {
	server := pglab.Start(b, pglab.Config{Settings: []string{
		"max_wal_size=4GB", "shared_buffers=1GB",
	}})
	pool := newPool(b, server.URL("pool_max_conns", "8"))
	ctx := context.Background()
	type size struct {
		name, schema  string
		keys          int
		store         *keystore.Store
		tokens        []string
		misses, lists []time.Duration
	}
	sizes := []*size{
		{name: "small", schema: "small", keys: min(100_000, *benchKeys)},
		{name: "large", schema: "large", keys: *benchKeys},
	}
	newStore := func(schema string) *keystore.Store {
		s, err := keystore.New(open(b, pool, schema, alone),
			&keystore.Options{CacheSize: -1, Timeout: patience})
		require.NoError(b, err)
		return s
	}
	for _, z := range sizes {
		require.NoError(b, newStore(z.schema).Close()) // makes the tables, and the state of a store
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
		b.ReportMetric(float64(table)/float64(z.keys), z.name+"-table-B/key")
		b.ReportMetric(float64(all)/float64(z.keys), z.name+"-B/key")
		z.store = newStore(z.schema)
		defer z.store.Close()
	}
	for range max(b.N, 2000) {
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
		b.ReportMetric(median(z.misses)*1000, z.name+"-miss-p50-µs")
		b.ReportMetric(median(z.lists)*1000, z.name+"-list-p50-µs")
	}
	b.ReportMetric(median(sizes[1].misses)/median(sizes[0].misses), "miss-large/small")
	b.ReportMetric(median(sizes[1].lists)/median(sizes[0].lists), "list-large/small")
}
