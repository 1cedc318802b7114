package sharedlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// fill writes large entries until the database has 90 % of the quota. The Backend also counts what
// it has written lately, so a write may be refused, and pass later.
func fill(
	t *testing.T, ctx context.Context, client *clientv3.Client, b *etcdstore.Backend, quota int64,
) (written int, err error) {
	for {
		err := b.Apply(ctx, backend.Change{Key: fmt.Appendf(nil, "fill%05d", written),
			Value: make([]byte, backend.MaxValueSize)})
		if err == nil {
			written++
			require.Less(t, written, 10_000, "the database is never full")
			continue
		}
		require.ErrorIs(t, err, backend.ErrFull)
		r, statusErr := client.Status(ctx, client.Endpoints()[0])
		require.NoError(t, statusErr)
		if r.DbSize*10 >= quota*9 {
			return written, err
		}
		time.Sleep(20 * time.Millisecond) // the Backend asks for the status once a second
	}
}

// alarms returns the number of alarms of etcd.
func alarms(t *testing.T, client *clientv3.Client) int {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := client.AlarmList(ctx)
	require.NoError(t, err)
	return len(r.Alarms)
}

// Near the quota, what restricts keys still passes, and etcd is never full.
func TestQuota(t *testing.T) {
	t.Parallel()
	const quota = 16 << 20
	l := StartEtcd(t, EtcdConfig{NoSync: true, QuotaBytes: quota})
	client := l.Client(t)
	b := open(t, client, newPrefix())
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	written, err := fill(t, ctx, client, b, quota)
	require.ErrorIs(t, err, backend.ErrFull)
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.ErrorContains(t, err, "defrag")
	require.ErrorContains(t, err, "quota of 16 MiB")
	require.Zero(t, alarms(t, client), "etcd is not full")
	_, err = b.Get(ctx, fmt.Appendf(nil, "fill%05d", written))
	require.ErrorIs(t, err, backend.ErrNotFound, "the refused change was not made")

	require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("revoked"), Restricts: true},
		backend.Change{Key: []byte("event")}))
	for n := range written {
		require.NoError(t, b.Apply(ctx, backend.Change{Key: fmt.Appendf(nil, "fill%05d", n),
			Expect: 1, Delete: true}))
	}
	require.ErrorIs(t, b.Apply(ctx, backend.Change{Key: []byte("k")}), backend.ErrFull)

	// A store that opens now refuses too.
	require.ErrorIs(t, open(t, client, newPrefix()).Apply(ctx, backend.Change{Key: []byte("k")}),
		backend.ErrFull)

	r, err := client.Get(ctx, "/")
	require.NoError(t, err)
	_, err = client.Compact(ctx, r.Header.Revision, clientv3.WithCompactPhysical())
	require.NoError(t, err)
	_, err = client.Defragment(ctx, l.Endpoints()[0])
	require.NoError(t, err)
	for {
		err := b.Apply(ctx, backend.Change{Key: []byte("k")})
		if err == nil {
			break
		}
		require.ErrorIs(t, err, backend.ErrFull)
		time.Sleep(20 * time.Millisecond) // the Backend asks for the status once a second
	}
}

// etcd answers "no space" also to a write that etcd has made. ErrFull still means that nothing was
// changed.
func TestFullDatabase(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true, QuotaBytes: 8 << 20})
	client := l.Client(t)
	prefix := newPrefix()
	b := open(t, client, prefix)
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("k"), Value: []byte("v")}))

	// Restricts goes past the rule of 90 %. Many writers reach the quota at the same time.
	value := bytes.Repeat([]byte{'x'}, backend.MaxValueSize)
	const writers = 16
	var mu sync.Mutex
	outcomes := make(map[string]error)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := 0; ; n++ {
				key := fmt.Sprint("w", w, "-", n)
				err := b.Apply(ctx, backend.Change{Key: []byte(key), Value: value, Restricts: true})
				mu.Lock()
				outcomes[key] = err
				mu.Unlock()
				if errors.Is(err, backend.ErrFull) || ctx.Err() != nil {
					return // after an unknown outcome, the next write is refused
				}
			}
		})
	}
	wg.Wait()
	full := 0
	for key, err := range outcomes {
		_, get := b.Get(ctx, []byte(key))
		switch {
		case err == nil:
			require.NoError(t, get, key)
		case errors.Is(err, backend.ErrFull):
			require.ErrorIs(t, get, backend.ErrNotFound, "%s: ErrFull, and the entry exists", key)
			full++
		default:
			require.NotErrorIs(t, err, backend.ErrConflict)
			require.ErrorContains(t, err, "is full")
		}
	}
	require.Positive(t, full)
	require.Positive(t, alarms(t, client))

	// A full etcd still serves the store that is there.
	again := open(t, client, prefix)
	e, err := again.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, "v", string(e.Value))
	require.ErrorIs(t, again.Apply(ctx, backend.Change{Key: []byte("k"), Expect: 1,
		Restricts: true}), backend.ErrFull)
	require.NoError(t, again.Apply(ctx, backend.Change{Key: []byte("k"), Expect: 1, Delete: true}))
	_, err = etcdstore.Open(ctx, client, newPrefix(), nil)
	require.ErrorIs(t, err, backend.ErrFull)
}
