package sharedlab

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// A loop over a Feed leaves no goroutine, however the loop ends, and Close leaves none.
func TestNoGoroutineIsLeft(t *testing.T) { // not parallel: it counts goroutines
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	remotetest.UseEachMethod(t, open(t, client, "/warm-up/"))
	b, err := etcdstore.Open(context.Background(), client, newPrefix(), nil)
	require.NoError(t, err)
	require.NoError(t, b.Apply(context.Background(), backend.Change{Key: []byte("k")}))
	before := goleak.IgnoreCurrent()
	none := func(what string) {
		t.Helper()
		require.Eventually(t, func() bool { return goleak.Find(before) == nil }, patience,
			time.Millisecond, "%s: %v", what, goleak.Find(before))
	}
	remotetest.EndLoops(t, b, none)
	none("Close")
}

// Another program writes below the prefix. The damage is reported, and ends no feed.
func TestDamagedEntry(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	prefix := newPrefix()
	b := open(t, client, prefix)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	step := 0
	for batch, err := range b.Feed(ctx, []byte("k"), nil, 0) {
		require.NoError(t, err)
		put := func(key, value string) {
			_, err := client.Put(ctx, prefix+"\x00"+key, value)
			require.NoError(t, err)
		}
		if step++; step > 1 {
			require.Len(t, batch.Changes, 1)
		}
		switch step {
		case 1:
			require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("k"), Value: []byte("v")}))
		case 2:
			put("k", "short")
		case 3:
			e := batch.Changes[0]
			require.Equal(t, "k", string(e.Key))
			require.Nil(t, e.Value)
			require.NotZero(t, e.Revision)
			_, err := b.Get(ctx, []byte("k"))
			require.ErrorIs(t, err, backend.ErrCorrupt)
			for _, expect := range []uint64{0, 1, 2} {
				require.Error(t, b.Apply(ctx, backend.Change{Key: []byte("k"), Expect: expect}))
			}
			for _, err := range b.Scan(ctx, nil, nil) {
				require.ErrorIs(t, err, backend.ErrCorrupt)
			}
			put("k", string(binary.BigEndian.AppendUint64(nil, 0)))
		case 4:
			require.Nil(t, batch.Changes[0].Value)
			require.NotZero(t, batch.Changes[0].Revision)
			damaged := batch.Changes[0].Revision
			require.NoError(t, b.Apply(ctx,
				backend.Change{Key: []byte("k"), Expect: damaged, Delete: true}))
		case 5:
			require.Equal(t, []backend.Entry{{Key: []byte("k")}}, batch.Changes)
			require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("k")}))
			return
		}
	}
}

// etcd compacts what a reader has not read.
func TestCompaction(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	b := open(t, client, newPrefix())
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for n := range 6 {
		var changes []backend.Change
		for m := range 100 {
			changes = append(changes, backend.Change{Key: fmt.Appendf(nil, "k%d%02d", n, m)})
		}
		require.NoError(t, b.Apply(ctx, changes...))
	}
	compact := func() {
		r, err := client.Put(ctx, "/other", "")
		require.NoError(t, err)
		_, err = client.Compact(ctx, r.Header.Revision)
		require.NoError(t, err)
	}

	n := 0
	var last error
	for _, err := range b.Snapshot(ctx, nil, nil) {
		if last = err; n == 0 {
			compact()
		}
		n++
	}
	require.ErrorContains(t, last, "--auto-compaction-retention")
	require.ErrorContains(t, last, "has compacted revision")

	// A feed that was cut off for the time of a compaction, with and without a restart of etcd.
	for _, restart := range []bool{false, true} {
		var after backend.Position
		for batch, err := range b.Feed(ctx, nil, nil, 0) {
			require.NoError(t, err)
			after = batch.Position
			break
		}
		require.NoError(t, b.Apply(ctx, backend.Change{Key: fmt.Append(nil, "during ", restart)}))
		compact()
		if restart {
			l.Members[0].Kill()
			require.NoError(t, l.Members[0].Start())
		}
		last = nil
		for _, err := range b.Feed(ctx, nil, nil, after) {
			require.NoError(t, last)
			last = err
		}
		require.ErrorIs(t, last, backend.ErrGap)
		require.ErrorContains(t, last, "--auto-compaction-retention")
	}
}

// A feed of another prefix keeps its position over a compaction, if it has missed nothing that is
// compacted.
func TestCompactionOfWhatWasRead(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	b := open(t, client, newPrefix())
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var after backend.Position
	revision := uint64(0)
	write := func() {
		require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("k"), Expect: revision}))
		revision++
	}
	for batch, err := range b.Feed(ctx, nil, nil, 0) {
		require.NoError(t, err)
		if after = batch.Position; len(batch.Changes) > 0 {
			break
		}
		write()
	}
	_, err := client.Compact(ctx, int64(after))
	require.NoError(t, err)
	write()
	for batch, err := range b.Feed(ctx, nil, nil, after) {
		require.NoError(t, err)
		require.Equal(t, revision, batch.Changes[0].Revision)
		break
	}
}

// The last change that a feed has read is a deletion, and etcd is compacted at this deletion. The
// feed continues, and does not take etcd for a restored one: etcd keeps the deletion, since version
// 3.5.18 also over a restart.
func TestCompactionOfADeletion(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client := l.Client(t)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var log bytes.Buffer
	b, err := etcdstore.Open(ctx, client, newPrefix(), &etcdstore.Options{
		Logger: slog.New(slog.NewTextHandler(&log, nil))})
	require.NoError(t, err)
	key := []byte("k")
	require.NoError(t, b.Apply(ctx, backend.Change{Key: key}))
	var after backend.Position
	for batch, err := range b.Feed(ctx, nil, nil, 0) {
		require.NoError(t, err)
		if after = batch.Position; len(batch.Changes) > 0 {
			break
		}
		require.NoError(t, b.Apply(ctx, backend.Change{Key: key, Expect: 1, Delete: true}))
	}
	_, err = client.Compact(ctx, int64(after), clientv3.WithCompactPhysical())
	require.NoError(t, err)
	l.Members[0].Kill()
	require.NoError(t, l.Members[0].Start())
	require.NoError(t, b.Apply(ctx, backend.Change{Key: key}))
	for batch, err := range b.Feed(ctx, nil, nil, after) {
		require.NoError(t, err)
		require.Equal(t, []backend.Entry{{Key: key, Value: []byte{}, Revision: 1}}, batch.Changes)
		break
	}
	require.NoError(t, b.Close())
	require.NotContains(t, log.String(), "restored")
}

// An etcd that was restored has another history, whether or not the cluster ID is another one.
func TestRestore(t *testing.T) {
	t.Parallel()
	for _, token := range []string{"lab", "another"} {
		t.Run(token, func(t *testing.T) {
			t.Parallel()
			testRestore(t, token)
		})
	}
}

func testRestore(t *testing.T, token string) {
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	client, other := l.Client(t), l.Client(t)
	prefix := newPrefix()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	b, second, behind := open(t, client, prefix), open(t, other, prefix), open(t, other, prefix)
	change := func(key, value string, expect uint64) backend.Change {
		return backend.Change{Key: []byte(key), Value: []byte(value), Expect: expect}
	}
	require.NoError(t, b.Apply(ctx, change("k", "active", 0)))
	file := l.Snapshot(t)

	// A running feed, and a feed that has stopped after the change that the restore will lose.
	running := make(chan error, 1)
	read := make(chan backend.Position, 10)
	go func() {
		var last error
		for batch, err := range b.Feed(ctx, nil, nil, 0) {
			if last = err; err == nil {
				read <- batch.Position
			}
		}
		running <- last
	}()
	<-read
	var stopped, start backend.Position
	for batch, err := range behind.Feed(ctx, nil, nil, 0) {
		require.NoError(t, err)
		if len(batch.Changes) > 0 {
			stopped = batch.Position
			break
		}
		start = batch.Position
		require.NoError(t, second.Apply(ctx, change("k", "revoked", 1)))
	}
	<-read
	require.NoError(t, b.Apply(ctx, change("lost", "", 0)))
	l.Restore(t, file, token)

	// The new history goes past the positions of the old one, in the same keys, before the old
	// readers come back.
	fresh := open(t, l.Client(t), prefix)
	e, err := fresh.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, "active", string(e.Value))
	for n := range uint64(5) {
		require.NoError(t, fresh.Apply(ctx, change("k", fmt.Sprint("new ", n), n+1)))
	}
	require.ErrorIs(t, <-running, backend.ErrGap)
	for range 2 {
		last := error(nil)
		for batch, err := range behind.Feed(ctx, nil, nil, stopped) {
			require.Empty(t, batch)
			last = err
		}
		require.ErrorIs(t, last, backend.ErrGap)
	}
	for _, err := range behind.Feed(ctx, nil, nil, start) {
		require.ErrorIs(t, err, backend.ErrGap, "this Backend has noticed")
	}
	e, err = b.Get(ctx, []byte("k"))
	require.NoError(t, err)
	require.Equal(t, "new 4", string(e.Value))
	require.ErrorIs(t, b.Apply(ctx, change("k", "", 2)), backend.ErrConflict)
	require.NoError(t, b.Apply(ctx, change("k", "", 6)))

	for _, f := range []*etcdstore.Backend{b, behind} {
		begun := false
		for batch, err := range f.Feed(ctx, nil, nil, 0) {
			require.NoError(t, err)
			if begun {
				break
			}
			begun = true
			require.Empty(t, batch.Changes)
			e, err := f.Get(ctx, []byte("k"))
			require.NoError(t, err)
			require.NoError(t, f.Apply(ctx, change("k", "later", e.Revision)))
		}
	}
}

// A feed that is far behind gets its changes in responses that etcd has divided in the middle of an
// Apply. Each Apply is still one Batch.
func TestFragments(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	b := open(t, l.Client(t), newPrefix())
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const applies, each = 40, 7
	next := 0
	for batch, err := range b.Feed(ctx, nil, nil, 0) {
		require.NoError(t, err)
		if next++; next == 1 { // the body writes everything before the feed begins to read
			for n := range uint64(applies) {
				var changes []backend.Change
				for m := range each {
					changes = append(changes, backend.Change{Key: fmt.Append(nil, m), Expect: n,
						Value: make([]byte, 18<<10)})
				}
				require.NoError(t, b.Apply(ctx, changes...))
			}
			continue
		}
		require.Len(t, batch.Changes, each)
		for _, e := range batch.Changes {
			require.Equal(t, uint64(next-1), e.Revision)
			require.Len(t, e.Value, 18<<10)
		}
		if next == applies+1 {
			break
		}
	}
}
