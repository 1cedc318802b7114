package etcdstore

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// No base is a prefix of the base of another prefix.
func TestBasesAreDisjoint(t *testing.T) {
	prefixes := []string{"/", "/a", "/a/", "/a/b", "/ab", "/a\x01", "\xff", "\xff\xff"}
	for _, p := range prefixes {
		for _, q := range prefixes {
			if p != q {
				require.False(t, strings.HasPrefix(baseOf(p), baseOf(q)), "%q and %q", p, q)
			}
		}
	}
}

// middle returns a key between two keys whenever there is one, and finds every key by halving.
func TestMiddle(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 1))
	key := func() string {
		k := make([]byte, random.IntN(6))
		for i := range k {
			k[i] = []byte{0, 1, 0x7f, 0x80, 0xff}[random.IntN(5)]
		}
		return string(k)
	}
	for range 20_000 {
		low, high := key(), key()
		if low >= high {
			continue
		}
		at := middle(low, high)
		if high == low+"\x00" {
			require.Equal(t, low, at, "no key lies between %q and %q", low, high)
			continue
		}
		require.Less(t, low, at, "between %q and %q", low, high)
		require.Less(t, at, high, "between %q and %q", low, high)
	}
	// Halving, as lastPart does it, finds the last keys. Keys that differ only by zeros at the end
	// are never divided: a page of lastPart holds all of them, and here 6 are enough.
	for range 1000 {
		var keys []string
		for range 50 {
			keys = append(keys, key())
		}
		slices.Sort(keys)
		keys = slices.Compact(keys)
		low, high := keys[0], "\xff\xff\xff\xff\xff\xff\xff"
		for steps := 0; ; steps++ {
			require.Less(t, steps, 100, "%q", keys)
			at := middle(low, high)
			n, _ := slices.BinarySearch(keys, at)
			if n < len(keys) && n >= len(keys)-6 {
				break
			}
			if n == len(keys) {
				high = at
			} else {
				low = keys[n]
			}
		}
	}
}

func TestBelow(t *testing.T) {
	require.Equal(t, "k\x10", below("k\x20", "k\x30"))
	require.Equal(t, "k", below("k\x20", "k\x40"))
	require.Equal(t, "k\x1f\x80", below("k\x20", "k\x20\x80"))
	require.Empty(t, below("k", "\xff"), "below every key")
}

func TestVersions(t *testing.T) {
	for _, v := range []string{"3.4.37", "3.5.0", "3.5.17", "2.3.8", "3.5.17-rc.1"} {
		require.True(t, isTooOld(v), v)
	}
	for _, v := range []string{"3.5.18", "3.5.18-rc.0", "3.5.100", "3.6.0", "3.7.3", "4.0.0",
		"unknown", ""} {
		require.False(t, isTooOld(v), v)
	}
}

// The memory of ModRevisions is bounded, keeps what was used last, and drops everything when the
// history changes.
func TestHistoryIsBounded(t *testing.T) {
	var h history
	mods := func(n int) int64 {
		m := make([]int64, 1)
		h.recall([]backend.Change{{Key: fmt.Append(nil, n), Expect: 1}}, m)
		return m[0]
	}
	for n := 1; n <= 10*maxVersions; n++ {
		h.note(0, backend.Entry{Key: fmt.Append(nil, n), Revision: 1}, int64(n))
		require.Equal(t, int64(n), mods(n))
		require.LessOrEqual(t, len(h.newer)+len(h.older), 2*maxVersions)
	}
	require.Zero(t, mods(1))
	require.NotZero(t, mods(9*maxVersions+1), "one of the last entries")
	h.note(0, backend.Entry{Key: []byte("k"), Revision: 3}, 30)
	h.note(0, backend.Entry{Key: []byte("k"), Revision: 2}, 20)
	m := make([]int64, 1)
	h.recall([]backend.Change{{Key: []byte("k"), Expect: 3}}, m)
	require.Equal(t, int64(30), m[0], "a late response does not replace a newer value")
	h.changed(&Backend{}, 0, 7)
	require.Zero(t, mods(10*maxVersions))
	h.note(0, backend.Entry{Key: []byte("k"), Revision: 1}, 1)
	require.Empty(t, h.newer, "a response of the earlier history is not remembered")
}

// The last positions are remembered. A change is recognised by its content.
func TestPositions(t *testing.T) {
	var h history
	h.seed = maphash.MakeSeed()
	event := func(mod int64, value string) *mvccpb.Event {
		return &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: []byte(value),
			ModRevision: mod, CreateRevision: 1, Version: mod}}
	}
	for n := range int64(1000) {
		h.yielded(0, event(n+1, "v"))
		h.yielded(0, event(n+1, "v")) // another feed
	}
	for n := range int64(len(h.positions)) {
		p, ok := h.known(backend.Position(1000 - n))
		require.True(t, ok, n)
		require.Equal(t, "k", p.key)
		require.Equal(t, h.hash(event(1000-n, "v")), p.hash)
		require.NotEqual(t, h.hash(event(1000-n, "w")), p.hash)
	}
	_, ok := h.known(1)
	require.False(t, ok)
	_, ok = new(history).known(0)
	require.False(t, ok)
}

// No error has a credential, and each common error says what to do.
func TestErrors(t *testing.T) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"http://app:hunter2@127.0.0.1:1"}, Logger: zap.NewNop()})
	require.NoError(t, err)
	defer client.Close()
	client.Password, client.Token = "s3cret", "t0ken"
	for _, tt := range []struct {
		err  error
		says string
	}{
		{status.Error(codes.Unavailable,
			"dial s3cret t0ken app:hunter2@ hunter2: connection refused"), "check the endpoints"},
		{rpctypes.ErrGRPCAuthFailed, "Password"},
		{rpctypes.ErrGRPCUserEmpty, "Username"},
		{rpctypes.ErrGRPCPermissionDenied, "readwrite /p/"},
		{rpctypes.ErrGRPCTooManyOps, "--max-txn-ops"},
		{rpctypes.ErrGRPCNoLeader, "majority"},
		{cancelError(rpctypes.ErrGRPCPermissionDenied.Error()), "readwrite /p/"},
		{status.Error(codes.Unimplemented, "unknown service"), "not a client URL"},
		{status.Error(codes.DeadlineExceeded, "context deadline exceeded"), "majority"},
		{context.DeadlineExceeded, "majority"},
	} {
		got := explain(client, "/p/", "etcdstore: read", tt.err)
		require.ErrorContains(t, got, "etcdstore: read: ")
		require.ErrorContains(t, got, tt.says)
		for _, secret := range []string{"s3cret", "t0ken", "hunter2"} {
			require.NotContains(t, got.Error(), secret)
		}
		require.Equal(t, codeOf(tt.err), codeOf(got))
	}
	require.Equal(t, "http://127.0.0.1:1", endpointName("http://app:hunter2@127.0.0.1:1"))
	require.True(t, isTransient(explain(client, "/p/", "feed", rpctypes.ErrGRPCNoLeader)))
	require.False(t, isTransient(explain(client, "/p/", "feed", rpctypes.ErrGRPCPermissionDenied)))
	require.False(t, isTransient(gap(errRestored)))
	late, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	err = (&Backend{client: client, calls: remote.NewCalls()}).wrap(late, "read", status.Error(
		codes.DeadlineExceeded, "latest balancer error: s3cret: connection refused"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.EqualError(t, err, "etcdstore: read: latest balancer error: REDACTED: connection "+
		"refused: check the endpoints of the client's Config")
	require.NoError(t, client.Close())
	closed := (&Backend{client: client, calls: remote.NewCalls()}).wrap(t.Context(), "read", client.Sync(
		context.Background()))
	require.ErrorContains(t, closed, "the etcd client was closed before the store")
	require.False(t, isTransient(closed))
	require.False(t, isTransient(errors.New("another error")))
	require.NotContains(t, fmt.Sprintf("%v %+v %#v", &Backend{client: client, prefix: "/p/"},
		&Backend{client: client}, &Backend{client: client}), "s3cret")
}

func TestQuota(t *testing.T) {
	b := &Backend{}
	write := backend.Change{Key: []byte("k")}
	restrict := backend.Change{Key: []byte("k"), Restricts: true}
	remove := backend.Change{Key: []byte("k"), Expect: 1, Delete: true}
	for _, tt := range []struct {
		size, quota, configured int64
		errors                  []string
		full                    bool
	}{
		{100, 1000, 0, nil, false},
		{899, 1000, 0, nil, false},
		{900, 1000, 0, nil, true},
		{100, 1000, 0, []string{"alarm:NOSPACE "}, true},
		{900, 1000, 2000, nil, false},
		{900, 0, 0, nil, false},
		{2 << 30, 0, 0, nil, true},
		{2 << 30, -1, 0, nil, false},
		{2 << 30, 1000, -1, nil, false},
	} {
		q := quota{configured: tt.configured, kick: make(chan struct{}, 1)}
		q.noteStatus(b, []*pb.StatusResponse{
			{DbSize: 1, DbSizeQuota: 1000}, // another member
			{DbSize: tt.size, DbSizeQuota: tt.quota, Errors: tt.errors},
		})
		for _, changes := range [][]backend.Change{
			{write}, {restrict}, {remove}, {write, restrict}, {write, remove},
		} {
			err := q.allows(b, changes)
			passes := slices.ContainsFunc(changes, func(c backend.Change) bool {
				return c.Restricts
			}) || len(changes) == 1 && changes[0].Delete
			if tt.full && !passes {
				require.ErrorIs(t, err, backend.ErrFull, "%+v", tt)
			} else {
				require.NoError(t, err, "%+v", tt)
			}
		}
		q.noteStatus(b, nil) // no endpoint answers
		require.Equal(t, tt.full, q.full)
	}
}

// What was written since the last status counts too, until the status includes it.
func TestQuotaCountsWrites(t *testing.T) {
	b := &Backend{}
	b.quota.kick = make(chan struct{}, 1)
	status := func(size int64) {
		b.quota.mu.Lock()
		b.quota.before, b.quota.written = b.quota.written, 0 // as watchQuota does
		b.quota.mu.Unlock()
		b.quota.noteStatus(b, []*pb.StatusResponse{{DbSize: size, DbSizeQuota: 100_000}})
	}
	write := func() error { return b.quota.allows(b, []backend.Change{{Key: []byte("k")}}) }
	status(80_000)
	b.quota.wrote(b, 500)
	require.Empty(t, b.quota.kick)
	b.quota.wrote(b, 501)
	require.Len(t, b.quota.kick, 1, "more than a hundredth of the quota")
	b.quota.wrote(b, 8_000)
	require.NoError(t, write())
	b.quota.wrote(b, 1_000)
	require.ErrorIs(t, write(), backend.ErrFull)
	status(80_500)
	require.ErrorIs(t, write(), backend.ErrFull, "the status may not include the writes")
	status(80_500)
	require.NoError(t, write())
}

// Each of the signs of a restored etcd begins another generation, once, and ends what began before.
func TestSignsOfARestore(t *testing.T) {
	b := &Backend{}
	h := &b.history
	h.cluster = 1
	header := func(cluster uint64, revision int64) *pb.ResponseHeader {
		return &pb.ResponseHeader{ClusterId: cluster, Revision: revision}
	}
	early := h.now()
	require.NoError(t, h.observe(b, early, header(1, 10)))
	require.NoError(t, h.observe(b, early, header(1, 9)), "a call that was sent before")
	h.start(0)
	before := h.now()
	require.ErrorIs(t, h.observe(b, before, header(1, 9)), errRestored, "a revision that went back")
	require.Equal(t, uint64(1), h.generation)
	require.ErrorIs(t, h.observe(b, before, header(1, 11)), errRestored,
		"a call that was sent to the earlier history")
	require.Equal(t, uint64(1), h.generation)
	_, ok := h.resume()
	require.False(t, ok, "positions of the earlier history")
	require.ErrorIs(t, h.watched(b, 0, header(1, 9)), backend.ErrGap)
	require.NoError(t, h.watched(b, 1, header(1, 3)), "a member that lags behind")

	h.note(1, backend.Entry{Key: []byte("k"), Revision: 1}, 9)
	require.ErrorIs(t, h.observe(b, h.now(), header(2, 100)), errRestored, "another cluster ID")
	require.Equal(t, uint64(2), h.generation)
	require.Empty(t, h.newer, "ModRevisions of the earlier history")
	require.ErrorIs(t, h.watched(b, 2, header(1, 100)), backend.ErrGap, "another cluster ID")
	require.Equal(t, uint64(3), h.generation)
	h.start(3)
	_, ok = h.resume()
	require.True(t, ok)
	require.ErrorIs(t, h.changed(b, 3, 50), backend.ErrGap)
	_, ok = h.resume()
	require.False(t, ok)
}
