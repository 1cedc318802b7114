package work

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// A postgres is a primary with one standby, on the loopback interface. Each commit waits for the
// standby, as the guarantees of the store need.
type postgres struct {
	primary, standby *peers.PostgresServer
	pool             *pgxpool.Pool
	client           atomic.Uint64 // bytes from and to clients
}

func startPostgres(ctx context.Context, _ string) (_ *engine, err error) {
	var end closer
	defer func() {
		if err != nil {
			end.into(&err)
		}
	}()
	p := new(postgres)
	options := []string{"-c max_connections=500", "-c synchronous_standby_names=standby",
		"-c max_wal_size=4GB"}
	if p.primary, err = peers.NewPostgresServer(ctx, options...); err != nil {
		return nil, err
	}
	end.add(p.primary.Stop)
	if p.standby, err = p.primary.Standby(ctx, "standby", options...); err != nil {
		return nil, err
	}
	end.add(p.standby.Stop)
	if p.pool, err = p.connect(ctx, 16); err != nil {
		return nil, err
	}
	end.add(func() error { p.pool.Close(); return nil })
	return &engine{
		pids: p.pids,
		open: p.open,
		work: p.work,
		close: func() (err error) {
			end.into(&err)
			return err
		},
		lookUps: func(ctx context.Context) ([]*peers.SharedPeer, error) {
			return peers.StartPostgres(ctx, p.pool)
		},
	}, nil
}

// connect returns a pool whose connections count the bytes.
func (p *postgres) connect(ctx context.Context, connections int) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(p.primary.URL(connections))
	if err != nil {
		return nil, err
	}
	dial := config.ConnConfig.DialFunc
	config.ConnConfig.DialFunc = func(
		ctx context.Context, network, addr string,
	) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &countingConn{conn, &p.client}, nil
	}
	return pgxpool.NewWithConfig(ctx, config)
}

// A countingConn counts the bytes in both directions.
type countingConn struct {
	net.Conn
	bytes *atomic.Uint64
}

func (c *countingConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.bytes.Add(uint64(n))
	return n, err
}

func (c *countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.bytes.Add(uint64(n))
	return n, err
}

func (p *postgres) open(
	ctx context.Context, name string,
) (backend.Feeder, func() error, error) {
	pool, err := p.connect(ctx, 16)
	if err != nil {
		return nil, nil, err
	}
	b, err := pgstore.Open(ctx, pool, name, nil)
	if err != nil {
		pool.Close()
		return nil, nil, err
	}
	return b, func() error { pool.Close(); return nil }, nil
}

// work reads the position of each store, which counts the writes.
func (p *postgres) work(ctx context.Context) (w engineWork, err error) {
	rows, err := p.pool.Query(ctx, "select quote_ident(schemaname) from pg_tables "+
		"where tablename = 'log'")
	if err != nil {
		return w, err
	}
	var schemas []string
	for rows.Next() {
		var schema string
		if err := rows.Scan(&schema); err != nil {
			return w, err
		}
		schemas = append(schemas, schema)
	}
	if err := rows.Err(); err != nil {
		return w, err
	}
	for _, schema := range schemas {
		var last float64
		err := p.pool.QueryRow(ctx, "select max(position) from "+schema+".log").Scan(&last)
		if err != nil {
			return w, err
		}
		w.Writes += last - 1
	}
	// The standby writes the same log again.
	err = p.pool.QueryRow(ctx, "select 2 * pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')").
		Scan(&w.Log)
	w.Client = float64(p.client.Load())
	return w, err
}

// pids returns the IDs of the servers and of their children.
func (p *postgres) pids() (pids []int) {
	for _, s := range []*peers.PostgresServer{p.primary, p.standby} {
		if pid, err := s.PID(); err == nil {
			pids = append(pids, pid)
		}
	}
	parents := slices.Clone(pids)
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue // the process has ended
		}
		// The second field is the name of the program in parentheses.
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		if len(fields) < 2 {
			continue
		}
		parent, _ := strconv.Atoi(fields[1])
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err == nil && slices.Contains(parents, parent) {
			pids = append(pids, pid)
		}
	}
	return pids
}
