package sharedlab

import (
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// A Postgres is a primary, and a standby that the primary waits for with each commit. A third
// server does not run. In a failover, the third server becomes the new standby. The servers end
// with the test.
type Postgres struct {
	servers                 []*pglab.Server // the addresses, in an order that never changes
	primary, standby, spare *pglab.Server
}

// standbyName is the name of every standby.
const standbyName = "standby"

// StartPostgres starts the servers. On a machine without PostgreSQL, StartPostgres skips the test.
func StartPostgres(t testing.TB) *Postgres {
	t.Helper()
	c := pglab.Config{NoSync: true, Settings: []string{
		// A standby that was away finds the primary, and what the primary has logged since.
		"wal_retrieve_retry_interval=200ms", "wal_keep_size=256MB",
	}}
	primary := pglab.Start(t, c)
	p := &Postgres{primary: primary, standby: primary.Standby(t, standbyName),
		spare: pglab.New(t, c)}
	primary.Replicate(t, standbyName)
	p.servers = []*pglab.Server{p.primary, p.standby, p.spare}
	return p
}

// Addresses implements Engine.
func (p *Postgres) Addresses() (hostports []string) {
	for _, s := range p.servers {
		hostports = append(hostports, s.Addr())
	}
	return hostports
}

// openPostgres opens a store in PostgreSQL. The space is the schema. Each process tries the servers
// in another order, so after a failover, some processes remain on an old primary that is alive.
func openPostgres(
	ctx context.Context, addresses []string, space string,
) (backend.Feeder, error) {
	addresses = append([]string{}, addresses...)
	rand.Shuffle(len(addresses), func(i, j int) {
		addresses[i], addresses[j] = addresses[j], addresses[i]
	})
	pool, err := pgxpool.New(ctx, pglab.URL(strings.Join(addresses, ","),
		"target_session_attrs", "read-write", "connect_timeout", "2"))
	if err != nil {
		return nil, err
	}
	b, err := pgstore.Open(ctx, pool, space, nil)
	if err != nil {
		pool.Close()
		return nil, err
	}
	return postgresHandle{b, pool}, nil
}

// A postgresHandle is a Backend that closes its pool.
type postgresHandle struct {
	*pgstore.Backend
	pool *pgxpool.Pool
}

// Close closes the Backend and the pool.
func (h postgresHandle) Close() error {
	defer h.pool.Close()
	return h.Backend.Close()
}
