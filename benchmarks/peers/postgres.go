package peers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// startPostgreSQL starts a peer that looks every credential up in PostgreSQL.
func startPostgreSQL(ctx context.Context, _ string) (*Peer, error) {
	server, err := newPostgresServer(ctx)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Peer, error) { return nil, errors.Join(err, server.stop()) }
	pool, err := server.pool(ctx, 16)
	if err != nil {
		return fail(err)
	}
	stored, unknown := issue()
	if err := fillPostgreSQL(ctx, pool, stored); err != nil {
		pool.Close()
		return fail(err)
	}
	p := guard(func(ctx context.Context, credential string) (*principal, error) {
		digest := issued{credential: credential}.digest()
		p := new(principal)
		const query = "SELECT id FROM api_keys WHERE digest = $1 AND revoked_at IS NULL"
		err := pool.QueryRow(ctx, query, digest[:]).Scan(&p.id)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil, errRefused
		}
		if err != nil {
			return nil, err
		}
		return p, nil
	})
	p.How = "a pgx pool of 16 connections; each call runs one prepared SELECT by the SHA-256, " +
		"the primary key; the server is on the loopback interface"
	p.Close = func() error {
		pool.Close()
		return server.stop()
	}
	p.credentials(stored, unknown)
	return p, nil
}

// A postgresServer is a new PostgreSQL cluster on the loopback interface.
type postgresServer struct {
	port int
	data string // the directory of the cluster
	stop func() error
}

// newPostgresServer starts a server. The options have the form of "-c name=value". Except for the
// options, the settings are the defaults of PostgreSQL, so each commit is synced.
func newPostgresServer(ctx context.Context, options ...string) (*postgresServer, error) {
	bin, err := postgresBinaries()
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	// The servers of PostgreSQL refuse to run as root, and another user cannot enter a directory of
	// root.
	dir, err := os.MkdirTemp("", "grpc-api-key-postgres-")
	if err != nil {
		return nil, err
	}
	as, err := unprivileged(dir)
	if err != nil {
		_ = os.Remove(dir)
		return nil, fmt.Errorf(
			"PostgreSQL does not run as root, and no other user is available: %w: %w",
			errMissing, err)
	}
	run := func(program string, args ...string) error {
		cmd := exec.CommandContext(ctx, filepath.Join(bin, program), args...)
		cmd.Dir = dir
		as(cmd)
		if out, err := output(cmd, filepath.Join(dir, program+".out")); err != nil {
			return fmt.Errorf("%s: %w: %s", program, err, out)
		}
		return nil
	}
	data := filepath.Join(dir, "data")
	err = run("initdb", "-D", data, "-U", "bench", "-A", "trust", "--no-sync",
		"-E", "UTF8", "--locale=C")
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	settings := strings.Join(append([]string{
		"-c listen_addresses=127.0.0.1", fmt.Sprintf("-c port=%d", port),
		"-c unix_socket_directories=''",
	}, options...), " ")
	log := filepath.Join(dir, "log")
	err = run("pg_ctl", "-D", data, "-o", settings, "-l", log, "-w", "-t", "120", "start")
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return &postgresServer{port, data, func() error {
		cmd := exec.Command(
			filepath.Join(bin, "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
		cmd.Dir = dir
		as(cmd)
		return errors.Join(cmd.Run(), os.RemoveAll(dir))
	}}, nil
}

// pool returns a pool with the given maximum number of connections.
func (s *postgresServer) pool(ctx context.Context, connections int) (*pgxpool.Pool, error) {
	const address = "postgres://bench@127.0.0.1:%d/postgres?sslmode=disable&pool_max_conns=%d"
	return pgxpool.New(ctx, fmt.Sprintf(address, s.port, connections))
}

// pid returns the ID of the process whose children serve the connections.
func (s *postgresServer) pid() (int, error) {
	text, err := os.ReadFile(filepath.Join(s.data, "postmaster.pid"))
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), "\n")
	return strconv.Atoi(first)
}

func fillPostgreSQL(ctx context.Context, pool *pgxpool.Pool, stored []issued) error {
	_, err := pool.Exec(ctx,
		"CREATE TABLE api_keys (digest bytea PRIMARY KEY, id text NOT NULL, revoked_at timestamptz)")
	if err != nil {
		return err
	}
	_, err = pool.CopyFrom(ctx, pgx.Identifier{"api_keys"}, []string{"digest", "id"},
		pgx.CopyFromSlice(len(stored), func(i int) ([]any, error) {
			digest := stored[i].digest()
			return []any{digest[:], stored[i].id}, nil
		}))
	if err != nil {
		return err
	}
	_, err = pool.Exec(ctx, "VACUUM ANALYZE api_keys")
	return err
}

// postgresBinaries returns the directory of the server programs, which are not in the PATH on
// Debian.
func postgresBinaries() (string, error) {
	if ctl, err := exec.LookPath("pg_ctl"); err == nil {
		if _, err := exec.LookPath("initdb"); err == nil {
			return filepath.Dir(ctl), nil
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_ctl")
	if len(found) == 0 {
		return "", fmt.Errorf("PostgreSQL is %w: apt-get install postgresql", errMissing)
	}
	return filepath.Dir(slices.Max(found)), nil
}
