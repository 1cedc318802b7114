package peers

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// startPostgresTable starts a table in PostgreSQL with the default settings, except for larger
// shared buffers. Each change is one statement, and so one transaction that is synced to the disk.
func startPostgresTable(
	ctx context.Context, _ string, connections int, indexed bool,
) (*Table, error) {
	server, err := NewPostgresServer(ctx, "-c shared_buffers=512MB", "-c max_connections=200")
	if err != nil {
		return nil, err
	}
	fail := func(err error) (*Table, error) { return nil, errors.Join(err, server.Stop()) }
	pool, err := server.Pool(ctx, connections)
	if err != nil {
		return fail(err)
	}
	fail = func(err error) (*Table, error) {
		pool.Close()
		return nil, errors.Join(err, server.Stop())
	}
	_, err = pool.Exec(ctx, `CREATE TABLE api_keys (id text PRIMARY KEY, digest bytea NOT NULL,
		name text NOT NULL, owner text NOT NULL, scopes text[] NOT NULL,
		created_at timestamptz NOT NULL, revoked_at timestamptz, revoke_reason text)`)
	if err == nil && indexed {
		_, err = pool.Exec(ctx, "CREATE INDEX api_keys_owner ON api_keys (owner)")
	}
	if err != nil {
		return fail(err)
	}
	pid, err := server.PID()
	if err != nil {
		return fail(err)
	}
	columns := []string{"id", "digest", "name", "owner", "scopes", "created_at"}
	values := func(r row) []any {
		return []any{r.id, r.digest[:], r.name, r.owner, r.scopes, r.created}
	}
	t := &Table{
		How: fmt.Sprintf("a pgx pool of %d connections over loopback; one prepared INSERT or "+
			"UPDATE for each change; the defaults of PostgreSQL, with shared_buffers=512MB",
			connections),
		Create: func(ctx context.Context, owner string) (string, error) {
			r := newRow(owner)
			_, err := pool.Exec(ctx, `INSERT INTO api_keys
				(id, digest, name, owner, scopes, created_at)
				VALUES ($1, $2, $3, $4, $5, $6)`, values(r)...)
			return r.id, err
		},
		Revoke: func(ctx context.Context, id string) error {
			done, err := pool.Exec(ctx, `UPDATE api_keys SET revoked_at = now(), revoke_reason = $2
				WHERE id = $1 AND revoked_at IS NULL`, id, "measured")
			if err == nil && done.RowsAffected() != 1 {
				err = fmt.Errorf("key %s cannot be revoked", id)
			}
			return err
		},
		CPU: func() (time.Duration, error) { return processorTime(pid) },
		Fill: func(ctx context.Context, n int, owner func(i int) string) (ids []string, err error) {
			_, err = pool.CopyFrom(ctx, pgx.Identifier{"api_keys"}, columns,
				pgx.CopyFromSlice(n, func(i int) ([]any, error) {
					r := newRow(owner(i))
					if len(ids) < maxFilled {
						ids = append(ids, r.id)
					}
					return values(r), nil
				}))
			if err == nil {
				_, err = pool.Exec(ctx, "VACUUM ANALYZE api_keys")
			}
			return ids, err
		},
		List: func(ctx context.Context, owner string) (n int, err error) {
			rows, err := pool.Query(ctx, `SELECT id, name, owner, scopes, created_at, revoked_at,
				revoke_reason FROM api_keys WHERE owner = $1 ORDER BY id`, owner)
			if err != nil {
				return 0, err
			}
			var (
				r       row
				revoked *time.Time
				reason  *string
			)
			_, err = pgx.ForEachRow(rows, []any{
				&r.id, &r.name, &r.owner, &r.scopes, &r.created, &revoked, &reason,
			}, func() error {
				n++
				return nil
			})
			return n, err
		},
		Get: func(ctx context.Context, id string) error {
			var r row
			return pool.QueryRow(ctx, "SELECT name, owner, scopes FROM api_keys WHERE id = $1", id).
				Scan(&r.name, &r.owner, &r.scopes)
		},
		RevokeOwner: func(ctx context.Context, owner string) (int, error) {
			done, err := pool.Exec(ctx, `UPDATE api_keys SET revoked_at = now(), revoke_reason = $2
				WHERE owner = $1 AND revoked_at IS NULL`, owner, "measured")
			return int(done.RowsAffected()), err
		},
		Close: func() error {
			pool.Close()
			return server.Stop()
		},
	}
	return t, nil
}

// maxFilled is the number of IDs that Fill returns at most.
const maxFilled = 1 << 16
