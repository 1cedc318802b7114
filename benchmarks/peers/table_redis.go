package peers

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// startRedisTable starts a table in Redis that syncs its log before it answers. Each change is one
// HSET. With an index, each owner has a set of the IDs of the owner's keys.
func startRedisTable(
	ctx context.Context, dir string, connections int, indexed bool,
) (*Table, error) {
	server, err := newRedisServer(ctx, dir,
		"--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0")
	if err != nil {
		return nil, err
	}
	client := server.client(&redis.Options{
		PoolSize: connections, ReadTimeout: time.Minute, WriteTimeout: time.Minute,
	})
	key := func(id string) string { return "apikey:" + id }
	set := func(owner string) string { return "owner:" + owner }
	create := func(ctx context.Context, c redis.Cmdable, r row) error {
		err := c.HSet(ctx, key(r.id), "digest", r.digest[:], "name", r.name, "owner", r.owner,
			"scopes", strings.Join(r.scopes, " "), "created_at", r.created.UnixNano()).Err()
		if err == nil && indexed {
			err = c.SAdd(ctx, set(r.owner), r.id).Err()
		}
		return err
	}
	revoke := func(ctx context.Context, c redis.Cmdable, id string) error {
		return c.HSet(ctx, key(id), "revoked_at", time.Now().UnixNano(), "reason", "measured").Err()
	}
	// together sends several commands in one transaction.
	together := func(ctx context.Context, f func(redis.Pipeliner) error) error {
		_, err := client.TxPipelined(ctx, f)
		return err
	}
	return &Table{
		How: fmt.Sprintf("go-redis with %d connections over loopback; appendfsync always; "+
			"one HSET for each change", connections),
		Create: func(ctx context.Context, owner string) (string, error) {
			r := newRow(owner)
			if !indexed {
				return r.id, create(ctx, client, r)
			}
			return r.id, together(ctx, func(p redis.Pipeliner) error { return create(ctx, p, r) })
		},
		Revoke: func(ctx context.Context, id string) error { return revoke(ctx, client, id) },
		CPU:    func() (time.Duration, error) { return processorTime(server.pid) },
		Fill: func(ctx context.Context, n int, owner func(i int) string) (ids []string, err error) {
			for i := 0; i < n; {
				pipe := client.Pipeline()
				for range min(10_000, n-i) {
					r := newRow(owner(i))
					if err := create(ctx, pipe, r); err != nil {
						return nil, err
					}
					if len(ids) < maxFilled {
						ids = append(ids, r.id)
					}
					i++
				}
				if _, err := pipe.Exec(ctx); err != nil {
					return nil, err
				}
			}
			return ids, nil
		},
		List: func(ctx context.Context, owner string) (int, error) {
			ids, err := client.SMembers(ctx, set(owner)).Result()
			if err != nil {
				return 0, err
			}
			pipe := client.Pipeline()
			for _, id := range ids {
				pipe.HGetAll(ctx, key(id))
			}
			_, err = pipe.Exec(ctx)
			return len(ids), err
		},
		Get: func(ctx context.Context, id string) error {
			fields, err := client.HGetAll(ctx, key(id)).Result()
			if err == nil && len(fields) == 0 {
				err = redis.Nil
			}
			return err
		},
		RevokeOwner: func(ctx context.Context, owner string) (int, error) {
			ids, err := client.SMembers(ctx, set(owner)).Result()
			if err != nil {
				return 0, err
			}
			return len(ids), together(ctx, func(p redis.Pipeliner) error {
				for _, id := range ids {
					if err := revoke(ctx, p, id); err != nil {
						return err
					}
				}
				return nil
			})
		},
		Close: func() error { return errors.Join(client.Close(), server.stop()) },
	}, nil
}
