package pgstore_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// patience is the longest time for which a test waits.
const patience = time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var schemas atomic.Int64

// newSchema returns a schema that no other test uses.
func newSchema() string { return fmt.Sprint("test", schemas.Add(1)) }

// newPool returns a pool that is closed at the end of the test.
func newPool(t testing.TB, url string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(context.Background(), url)
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	return pool
}

// open opens a store that is closed at the end of the test.
func open(t testing.TB, pool *pgxpool.Pool, schema string, o *pgstore.Options) *pgstore.Backend {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := pgstore.Open(ctx, pool, schema, o)
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// alone are the Options for a server without a standby.
var alone = &pgstore.Options{Unreplicated: true}

func TestConformance(t *testing.T) {
	t.Parallel()
	pool := newPool(t, pglab.Start(t, pglab.Config{NoSync: true}).URL())
	backendtest.Run(t, func(t *testing.T) backend.Backend {
		return open(t, pool, newSchema(), alone)
	})
}

// An engine is a schema of a server. Each handle has a pool of its own, as each process has.
type engine struct {
	t      *testing.T
	server *pglab.Server
	schema string
	pools  []*pgxpool.Pool
	next   atomic.Int64
}

func (e *engine) Open() backend.Feeder {
	return open(e.t, e.pools[e.next.Add(1)%int64(len(e.pools))], e.schema, alone)
}

// Trim removes all rows of the log that pgstore does not need for new changes.
func (e *engine) Trim() {
	e.server.Exec(e.t, fmt.Sprintf("delete from %[1]s.log where position < "+
		"(select max(position) from %[1]s.log)", e.schema))
}

// Save returns a function that puts the tables back. TestPromotionThatLosesChanges has a server
// with another history.
func (e *engine) Save() (restore func()) {
	e.server.Exec(e.t, fmt.Sprintf("create table %[1]s.saved_log as table %[1]s.log; "+
		"create table %[1]s.saved_entry as table %[1]s.entry", e.schema))
	return func() {
		e.server.Exec(e.t, fmt.Sprintf("delete from %[1]s.log; delete from %[1]s.entry; "+
			"insert into %[1]s.log select * from %[1]s.saved_log; "+
			"insert into %[1]s.entry select * from %[1]s.saved_entry", e.schema))
	}
}

func TestFeedConformance(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pools := []*pgxpool.Pool{newPool(t, server.URL()), newPool(t, server.URL()),
		newPool(t, server.URL())}
	backendtest.RunFeed(t, func(t *testing.T) backendtest.Engine {
		return &engine{t: t, server: server, schema: newSchema(), pools: pools}
	})
}
