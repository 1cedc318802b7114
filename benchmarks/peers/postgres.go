package peers

import (
	"context"
	"crypto/sha256"
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

	"github.com/grpc-api-key/grpc-api-key/internal/freeport"
)

// startPostgreSQL starts a peer that looks every credential up in PostgreSQL.
func startPostgreSQL(ctx context.Context, _ string) (*Peer, error) {
	server, err := NewPostgresServer(ctx)
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Peer, error) { return nil, errors.Join(err, server.Stop()) }
	pool, err := server.Pool(ctx, 16)
	if err != nil {
		return fail(err)
	}
	stored, unknown := issue()
	if err := fillPostgreSQL(ctx, pool, stored); err != nil {
		pool.Close()
		return fail(err)
	}
	p := guard(func(ctx context.Context, credential string) (*principal, error) {
		return findPostgreSQL(ctx, pool, issued{credential: credential}.digest())
	})
	p.How = "a pgx pool of 16 connections; each call runs one prepared SELECT by the SHA-256, " +
		"the primary key; the server is on the loopback interface"
	p.Close = func() error {
		pool.Close()
		return server.Stop()
	}
	p.credentials(stored, unknown)
	return p, nil
}

// findPostgreSQL looks a credential up.
func findPostgreSQL(
	ctx context.Context, pool *pgxpool.Pool, digest [sha256.Size]byte,
) (*principal, error) {
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
}

// A PostgresServer is a new PostgreSQL cluster on the loopback interface.
type PostgresServer struct {
	port int
	data string // the directory of the cluster
	Stop func() error
}

// NewPostgresServer starts a server. The options have the form of "-c name=value". Except for the
// options, the settings are the defaults of PostgreSQL, so each commit is synced.
func NewPostgresServer(ctx context.Context, options ...string) (*PostgresServer, error) {
	return runPostgres(ctx, options, "initdb", "-U", "bench", "-A", "trust", "--no-sync",
		"-E", "UTF8", "--locale=C")
}

// Standby starts a standby with the same options as the server. A server whose
// synchronous_standby_names is the name makes each commit wait for the standby.
func (s *PostgresServer) Standby(
	ctx context.Context, name string, options ...string,
) (*PostgresServer, error) {
	options = append(options, fmt.Sprintf(
		"-c primary_conninfo='host=127.0.0.1 port=%d user=bench application_name=%s'", s.port, name))
	return runPostgres(ctx, options, "pg_basebackup", "-h", "127.0.0.1", "-p", strconv.Itoa(s.port),
		"-U", "bench", "-c", "fast", "-R", "--no-sync")
}

// runPostgres makes the directory of a server with a program, and starts the server.
func runPostgres(
	ctx context.Context, options []string, program string, args ...string,
) (*PostgresServer, error) {
	bin, err := postgresBinaries()
	if err != nil {
		return nil, err
	}
	port, err := freeport.Port()
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
	err = run(program, append(args, "-D", data)...)
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
	return &PostgresServer{port, data, func() error {
		cmd := exec.Command(
			filepath.Join(bin, "pg_ctl"), "-D", data, "-m", "immediate", "-w", "stop")
		cmd.Dir = dir
		as(cmd)
		return errors.Join(cmd.Run(), os.RemoveAll(dir))
	}}, nil
}

// Pool returns a pool with the given maximum number of connections.
func (s *PostgresServer) Pool(ctx context.Context, connections int) (*pgxpool.Pool, error) {
	return pgxpool.New(ctx, s.URL(connections))
}

// URL returns the address of the server, for a pool with the given maximum number of connections.
func (s *PostgresServer) URL(connections int) string {
	const address = "postgres://bench@127.0.0.1:%d/postgres?sslmode=disable&pool_max_conns=%d"
	return fmt.Sprintf(address, s.port, connections)
}

// PID returns the ID of the process whose children serve the connections.
func (s *PostgresServer) PID() (int, error) {
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
		// The PATH may have links to some of the programs only.
		if ctl, err = filepath.EvalSymlinks(ctl); err == nil {
			return filepath.Dir(ctl), nil
		}
	}
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/pg_ctl")
	if len(found) == 0 {
		return "", fmt.Errorf("PostgreSQL is %w: apt-get install postgresql", errMissing)
	}
	return filepath.Dir(slices.Max(found)), nil
}
