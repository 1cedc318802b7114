package admin_test

import (
	"bytes"
	"context"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// batchRevoke returns the keys that BatchRevokeKeys sends, and the error.
func batchRevoke(
	t testing.TB, c clients, r *adminpb.BatchRevokeKeysRequest,
) (all []*adminpb.Key, err error) {
	t.Helper()
	stream, err := c.BatchRevokeKeys(t.Context(), r)
	require.NoError(t, err)
	for {
		m, err := stream.Recv()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		require.NotEmpty(t, m.Keys)
		require.LessOrEqual(t, len(m.Keys), 64)
		all = append(all, m.Keys...)
		require.EqualValues(t, len(all), m.Done)
		require.Equal(t, r.GetExpected(), m.Total)
	}
}

func expect(n int64) *int64 { return &n }

func countRevoked(t testing.TB, store *keystore.Store) int {
	t.Helper()
	n, err := store.Count(t.Context(), keystore.Query{Status: keystore.StatusRevoked})
	require.NoError(t, err)
	return n
}

func TestBatchRevoke(t *testing.T) {
	for engine, open := range stores {
		t.Run(engine, func(t *testing.T) {
			store := open(t)
			c := newRig(t, store).local(t)
			var acme []string
			for i := range 20 {
				spec := keystore.Spec{Owner: []string{"acme", "corp"}[i%2]}
				issued := keystoretest.MustCreate(t, store, spec)
				if i%2 == 0 {
					acme = append(acme, "keys/"+issued.Key.ID)
				}
			}
			filter := &adminpb.Filter{Owner: "acme"}
			check := func(r *adminpb.BatchRevokeKeysRequest) {
				t.Helper()
				got, err := batchRevoke(t, c, r)
				require.NoError(t, err)
				require.Len(t, got, len(acme))
				for i, key := range got {
					require.Equal(t, acme[i], key.Name)
					require.Equal(t, "acme", key.Owner)
				}
			}
			check(&adminpb.BatchRevokeKeysRequest{Filter: filter, ValidateOnly: true})
			require.Zero(t, countRevoked(t, store))
			for _, dry := range []bool{true, false} {
				_, err := batchRevoke(t, c, &adminpb.BatchRevokeKeysRequest{
					Filter: filter, Expected: expect(9), ValidateOnly: dry})
				require.Equal(t, map[string]string{"expected": "9", "found": "10"},
					requireStatus(t, err, codes.FailedPrecondition, "SELECTION_CHANGED"))
				require.Zero(t, countRevoked(t, store), "nothing was revoked")
			}
			_, err := batchRevoke(t, c, &adminpb.BatchRevokeKeysRequest{
				Filter: filter, Expected: expect(0)})
			requireStatus(t, err, codes.FailedPrecondition, "SELECTION_CHANGED")
			check(&adminpb.BatchRevokeKeysRequest{
				Filter: filter, Expected: expect(10), Reason: "left"})
			require.Equal(t, 10, countRevoked(t, store))
			key, err := store.Get(t.Context(), strings.TrimPrefix(acme[0], "keys/"))
			require.NoError(t, err)
			require.Equal(t, "left", key.RevokeReason)
			for _, expected := range []*int64{nil, expect(0), expect(5)} {
				again, err := batchRevoke(t, c,
					&adminpb.BatchRevokeKeysRequest{Filter: filter, Expected: expected})
				require.NoError(t, err, "to revoke again is no error")
				require.Empty(t, again)
			}
			all, err := batchRevoke(t, c, &adminpb.BatchRevokeKeysRequest{All: true})
			require.NoError(t, err)
			require.Len(t, all, 10)
			events := listEvents(t, c, &adminpb.ListEventsRequest{Action: "revoke"})
			require.Len(t, events, 20)
			require.Equal(t, principalHere(t), events[0].Actor)
		})
	}
}

func TestBatchRevokeRefusesNothingInParticular(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	keystoretest.MustCreate(t, store, keystore.Spec{})
	for _, dry := range []bool{true, false} {
		for _, filter := range []*adminpb.Filter{nil, {}} {
			_, err := batchRevoke(t, c,
				&adminpb.BatchRevokeKeysRequest{Filter: filter, ValidateOnly: dry})
			requireStatus(t, err, codes.InvalidArgument, "SELECTION_EMPTY")
		}
		for _, r := range []*adminpb.BatchRevokeKeysRequest{
			{Filter: &adminpb.Filter{Owner: "a"}, All: true},
			{All: true, Expected: expect(-1)},
			{All: true, Reason: strings.Repeat("x", 1025)},
			{Filter: &adminpb.Filter{State: 99}},
		} {
			r.ValidateOnly = dry
			_, err := batchRevoke(t, c, r)
			requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
		}
	}
	require.Zero(t, countRevoked(t, store))
}

// Keys are added between the count and the revocation: not more keys are revoked than the client
// expects, and the client gets to know of the others.
func TestBatchRevokeOfAGrowingSelection(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	c := newRig(t, store).local(t)
	for range 3 {
		keystoretest.MustCreate(t, store, keystore.Spec{Owner: "acme"})
	}
	// The first write of the revocation comes after the count.
	var first sync.Once
	gate.onWrites(func(apply func() error) error {
		first.Do(func() {
			gate.onWrites(nil)
			_, err := store.Create(context.Background(), keystore.Spec{Name: "a", Owner: "acme"})
			assert.NoError(t, err)
		})
		return apply()
	})
	got, err := batchRevoke(t, c, &adminpb.BatchRevokeKeysRequest{
		Filter: &adminpb.Filter{Owner: "acme"}, Expected: expect(3)})
	require.Len(t, got, 3)
	require.Equal(t, map[string]string{"expected": "3", "found": "4"},
		requireStatus(t, err, codes.FailedPrecondition, "SELECTION_CHANGED"))
	require.Equal(t, 3, countRevoked(t, store))
}

// An administrator who revokes all keys revokes the own key too, and the stream ends in the middle.
// The other keys are revoked nevertheless.
func TestBatchRevokeOfTheOwnKey(t *testing.T) {
	store := keystoretest.New(t, nil)
	r := newRig(t, store)
	c, _ := r.holder(t, "keys:admin") // the first key
	const others = 2000
	for range others {
		keystoretest.MustCreate(t, store, keystore.Spec{})
	}
	stream, err := c.BatchRevokeKeys(t.Context(), &adminpb.BatchRevokeKeysRequest{All: true})
	require.NoError(t, err)
	for err == nil {
		_, err = stream.Recv()
	}
	requireStatus(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	awaitRevoked(t, store, others+1)
}

func awaitRevoked(t testing.TB, store *keystore.Store, n int) {
	t.Helper()
	revoke := keystore.EventQuery{Action: keystore.ActionRevoke, Limit: n}
	for _, err := range store.Follow(t.Context(), revoke) {
		require.NoError(t, err)
	}
	require.Equal(t, n, countRevoked(t, store))
}

// A client that goes stops the revocation, and so does the revocation of its key by someone else.
// A repeat revokes the rest.
func TestBatchRevokeStops(t *testing.T) {
	for name, end := range map[string]func(*keystore.Store, *keystore.Key, context.CancelFunc){
		"the client goes": func(_ *keystore.Store, _ *keystore.Key, cancel context.CancelFunc) {
			cancel()
		},
		"its key is revoked": func(s *keystore.Store, k *keystore.Key, _ context.CancelFunc) {
			if err := s.Revoke(context.Background(), k.ID, "by someone else"); err != nil {
				panic(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			store := keystoretest.New(t, nil)
			r := newRig(t, store)
			auth, err := interceptor.New(store, admin.Rules()...)
			require.NoError(t, err)
			returned := make(chan struct{}, 1)
			r.tls, r.roots = serveTLS(t, r.srv, auth, append(auth.ServerOptions(),
				grpc.ChainStreamInterceptor(func(
					srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
				) error {
					defer func() { returned <- struct{}{} }()
					return next(srv, ss)
				}))...)
			c, key := r.holder(t, "keys:admin")
			const all = 8000 // more than the server revokes while the client does not read
			createMany(t, store, all, keystore.Spec{Owner: "acme"})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			filter := &adminpb.Filter{Owner: "acme"}
			stream, err := c.BatchRevokeKeys(ctx, &adminpb.BatchRevokeKeysRequest{Filter: filter})
			require.NoError(t, err)
			_, err = stream.Recv()
			require.NoError(t, err)
			end(store, key, cancel)
			<-returned
			owned := func() int {
				n, err := store.Count(t.Context(),
					keystore.Query{Owner: "acme", Status: keystore.StatusRevoked})
				require.NoError(t, err)
				return n
			}
			before := owned()
			require.Less(t, before, all)
			for err == nil {
				_, err = stream.Recv()
			}
			require.Contains(t, []codes.Code{codes.Canceled, codes.Unauthenticated},
				status.Code(err))
			got, err := batchRevoke(t, r.local(t), &adminpb.BatchRevokeKeysRequest{Filter: filter})
			require.NoError(t, err)
			// A write that was under way at the end may have revoked more keys.
			require.LessOrEqual(t, len(got), all-before)
			require.Equal(t, all, owned())
		})
	}
}

// A process dies by kill -9 in the middle of a revocation. The same call to the next process
// revokes the rest.
func TestKillInTheMiddleOfABatchRevoke(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	store := keystoretest.Open(t, dir, nil)
	const all = 3000
	createMany(t, store, all, keystore.Spec{Owner: "acme"})
	require.NoError(t, store.Close())
	request := &adminpb.BatchRevokeKeysRequest{
		Filter: &adminpb.Filter{Owner: "acme"}, Reason: "left", Expected: expect(all)}

	sockets := socketDir(t)
	child := startServer(t, dir, sockets)
	c := dial(t, "unix:"+child.socket, localCreds)
	stream, err := c.BatchRevokeKeys(t.Context(), request)
	require.NoError(t, err)
	acknowledged := make(map[string]bool)
	for err == nil {
		var m *adminpb.BatchRevokeKeysResponse
		if m, err = stream.Recv(); err == nil {
			for _, key := range m.Keys {
				acknowledged[key.Name] = true
			}
		}
		if len(acknowledged) >= 100 {
			require.NoError(t, child.cmd.Process.Kill())
		}
	}
	require.Equal(t, codes.Unavailable, status.Code(err))
	child.wait(t)

	child = startServer(t, dir, sockets) // the socket of the killed process is replaced
	c = dial(t, "unix:"+child.socket, localCreds)
	rest, err := batchRevoke(t, c, request)
	require.NoError(t, err)
	require.NotEmpty(t, rest)
	for _, key := range rest {
		require.False(t, acknowledged[key.Name], "an acknowledged revocation was lost")
	}
	child.stop(t)
	t.Logf("%d revocations were acknowledged before the kill, and %d were left",
		len(acknowledged), len(rest))
	store = keystoretest.Open(t, dir, nil)
	require.Equal(t, all, countRevoked(t, store))
	events := 0
	for _, err := range store.Events(t.Context(),
		keystore.EventQuery{Action: keystore.ActionRevoke}) {
		require.NoError(t, err)
		events++
	}
	require.Equal(t, all, events, "no key was revoked twice")
}

// A holdingGate is a gate that holds the write that changes a key until release is closed, and
// sends how many keys the write changes.
type holdingGate struct {
	*gate
	key     atomic.Pointer[[]byte] // the storage key of the key
	held    chan int
	release chan struct{}
}

func (g *holdingGate) Apply(ctx context.Context, changes ...backend.Change) error {
	key, keys, hold := g.key.Load(), 0, false
	for _, c := range changes {
		if key != nil && len(c.Key) == len(*key) && c.Key[0] == (*key)[0] {
			keys++
			hold = hold || bytes.Equal(c.Key, *key)
		}
	}
	if hold {
		g.held <- keys
		<-g.release
	}
	return g.gate.Apply(ctx, changes...)
}

// While the last write of a revocation is under way, the client gets all keys of the other writes.
func TestBatchRevokeHoldsNoKeyBack(t *testing.T) {
	gate := &holdingGate{gate: newGate(), held: make(chan int), release: make(chan struct{})}
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	c := newRig(t, store).local(t)
	const all = 200 // more than one write can revoke
	var last *keystore.Key
	for range all {
		last = keystoretest.MustCreate(t, store, keystore.Spec{}).Key
	}
	key := storageKey(t, last)
	gate.key.Store(&key)
	stream, err := c.BatchRevokeKeys(t.Context(), &adminpb.BatchRevokeKeysRequest{All: true})
	require.NoError(t, err)
	done := 0
	receive := func(want int) {
		t.Helper()
		for done < want {
			m, err := stream.Recv()
			require.NoError(t, err)
			done += len(m.Keys)
			require.EqualValues(t, done, m.Done)
		}
		require.Equal(t, want, done)
	}
	held := <-gate.held
	require.Less(t, held, all)
	receive(all - held)
	close(gate.release)
	receive(all)
	_, err = stream.Recv()
	require.ErrorIs(t, err, io.EOF)
}

// A client that does not read delays the revocation after some 1,400 keys, so that the server keeps
// no more keys in memory. Then the client reads, and the revocation continues.
func TestBatchRevokeWaitsForASlowClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		const all = 8000
		createMany(t, store, all, keystore.Spec{Owner: "acme"})
		operator := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: []string{"keys:admin"}})
		reads := make(chan struct{})
		c := inBubble(t, store, operator.Key, func(ss grpc.ServerStream) grpc.ServerStream {
			return &blockedStream{ss, reads}
		})
		stream, err := c.BatchRevokeKeys(t.Context(), &adminpb.BatchRevokeKeysRequest{
			Filter: &adminpb.Filter{Owner: "acme"}})
		require.NoError(t, err)
		synctest.Wait()
		revoked := countRevoked(t, store)
		t.Logf("%d keys are revoked while the client does not read", revoked)
		require.Greater(t, revoked, 1000)
		require.Less(t, revoked, 2000)
		close(reads)
		done := 0
		for {
			m, err := stream.Recv()
			if err == io.EOF {
				break
			}
			require.NoError(t, err)
			done += len(m.Keys)
		}
		require.Equal(t, all, done)
		require.Equal(t, all, countRevoked(t, store))
	})
}

// A blockedStream sends nothing until reads is closed.
type blockedStream struct {
	grpc.ServerStream
	reads chan struct{}
}

func (s *blockedStream) SendMsg(m any) error {
	<-s.reads
	return s.ServerStream.SendMsg(m)
}
