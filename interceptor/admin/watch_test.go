package admin_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// While writers change keys, the client loses its connection again and again, and continues with
// its last cursor. Together, the streams have each event once, in order.
func TestWatchAcrossReconnects(t *testing.T) {
	store := keystoretest.New(t, nil)
	r := newRig(t, store)
	const writers, changes = 4, 200
	done := make(chan error, writers)
	for range writers {
		id := keystoretest.MustCreate(t, store, keystore.Spec{}).Key.ID
		go func() {
			for i := range changes {
				_, err := store.Update(context.Background(), id, func(s *keystore.Spec) error {
					s.Owner = fmt.Sprint(i)
					return nil
				})
				if err != nil {
					done <- err
					return
				}
			}
			done <- nil
		}()
	}
	const all = writers * (changes + 1)
	var got []string
	cursor, streams := "0", 0
	for len(got) < all {
		streams++
		c := r.local(t)
		watch, err := c.WatchEvents(t.Context(), &adminpb.WatchEventsRequest{After: cursor})
		require.NoError(t, err)
		first, err := watch.Recv()
		require.NoError(t, err)
		require.Empty(t, first.Events)
		require.Equal(t, cursor, first.Cursor)
		for n := 0; n < 30 && len(got) < all; {
			m, err := watch.Recv()
			require.NoError(t, err)
			for _, e := range m.Events {
				got = append(got, e.Cursor)
			}
			cursor = m.Cursor
			require.Equal(t, got[len(got)-1], cursor)
			n += len(m.Events)
		}
		c.conn.Close() // events that are on their way are lost
	}
	for range writers {
		require.NoError(t, <-done)
	}
	require.Greater(t, streams, 5)
	want := listEvents(t, r.local(t), &adminpb.ListEventsRequest{PageSize: 1000})
	require.Len(t, got, len(want))
	for i := range want {
		require.Equal(t, want[i].Cursor, got[i])
	}
}

func TestWatch(t *testing.T) {
	store := keystoretest.New(t, nil)
	r := newRig(t, store)
	c := r.local(t)
	a := keystoretest.MustCreate(t, store, keystore.Spec{}).Key
	b := keystoretest.MustCreate(t, store, keystore.Spec{}).Key
	open := func(c clients, w *adminpb.WatchEventsRequest) (
		grpc.ServerStreamingClient[adminpb.WatchEventsResponse], string) {
		t.Helper()
		watch, err := c.WatchEvents(t.Context(), w)
		require.NoError(t, err)
		first, err := watch.Recv()
		require.NoError(t, err)
		require.Empty(t, first.Events)
		return watch, first.Cursor
	}
	next := func(watch grpc.ServerStreamingClient[adminpb.WatchEventsResponse]) *adminpb.Event {
		t.Helper()
		m, err := watch.Recv()
		require.NoError(t, err)
		require.Len(t, m.Events, 1)
		return m.Events[0]
	}
	// Without a cursor: from now on.
	watch, cursor := open(c, &adminpb.WatchEventsRequest{})
	require.NotEqual(t, "0", cursor)
	ofB, _ := open(c, &adminpb.WatchEventsRequest{Key: "keys/" + b.ID})
	require.NoError(t, store.Disable(t.Context(), a.ID, "one"))
	require.Equal(t, "disable", next(watch).Action)
	require.NoError(t, store.Disable(t.Context(), b.ID, "two"))
	require.Equal(t, "two", next(watch).Reason)
	require.Equal(t, "two", next(ofB).Reason, "the event of the other key is left out")
	// The first cursor leads to both events.
	again, _ := open(c, &adminpb.WatchEventsRequest{After: cursor})
	m, err := again.Recv()
	require.NoError(t, err)
	require.Equal(t, "one", m.Events[0].Reason)

	for _, w := range []*adminpb.WatchEventsRequest{{After: "x"}, {After: "-1"}, {Key: "x"}} {
		bad, err := c.WatchEvents(t.Context(), w)
		require.NoError(t, err)
		_, err = bad.Recv()
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	}

	// The stream ends with the caller's own key, and with the store.
	reader, key := r.holder(t, "keys:read")
	mine, _ := open(reader, &adminpb.WatchEventsRequest{})
	require.NoError(t, store.Revoke(t.Context(), key.ID, ""))
	for err = nil; err == nil; {
		_, err = mine.Recv()
	}
	requireStatus(t, err, codes.Unauthenticated, "API_KEY_REVOKED")
	require.NoError(t, store.Close())
	for err = nil; err == nil; {
		_, err = watch.Recv()
	}
	requireStatus(t, err, codes.Unavailable, "STORE_CLOSED")
}

// In a store without events, a watch begins at the beginning.
func TestWatchOfAnEmptyStore(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	watch, err := c.WatchEvents(t.Context(), &adminpb.WatchEventsRequest{})
	require.NoError(t, err)
	first, err := watch.Recv()
	require.NoError(t, err)
	require.Equal(t, "0", first.Cursor)
	keystoretest.MustCreate(t, store, keystore.Spec{})
	m, err := watch.Recv()
	require.NoError(t, err)
	require.Len(t, m.Events, 1)
}

// inBubble returns clients for the streams of the services, as the holder of a key. The connection
// is in memory, so that the fake time of package synctest applies. If wrap is not nil, the services
// get the stream that wrap returns.
func inBubble(
	t *testing.T, store *keystore.Store, holder *keystore.Key,
	wrap func(grpc.ServerStream) grpc.ServerStream,
) clients {
	t.Helper()
	srv, err := admin.New(store)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	listener := bufconn.Listen(1 << 16)
	server := grpc.NewServer(grpc.ChainStreamInterceptor(func(
		srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler,
	) error {
		if wrap != nil {
			ss = wrap(ss)
		}
		return next(srv, &contextStream{ss, interceptor.NewContext(ss.Context(), holder)})
	}))
	srv.Register(server)
	go server.Serve(listener)
	t.Cleanup(server.Stop)
	return dial(t, "passthrough:bufconn", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(dialer(listener)))
}

// While nothing happens, the stream sends an empty response every 30 seconds.
func TestWatchBeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: []string{"keys:read"}})
		c := inBubble(t, store, issued.Key, nil)
		watch, err := c.WatchEvents(t.Context(), &adminpb.WatchEventsRequest{})
		require.NoError(t, err)
		first, err := watch.Recv()
		require.NoError(t, err)
		for range 3 {
			begin := time.Now()
			m, err := watch.Recv()
			require.NoError(t, err)
			require.Equal(t, 30*time.Second, time.Since(begin))
			require.Empty(t, m.Events)
			require.Equal(t, first.Cursor, m.Cursor)
		}
		time.Sleep(20 * time.Second)
		keystoretest.MustCreate(t, store, keystore.Spec{})
		m, err := watch.Recv()
		require.NoError(t, err)
		require.Len(t, m.Events, 1)
		begin := time.Now()
		_, err = watch.Recv()
		require.NoError(t, err)
		require.Equal(t, 30*time.Second, time.Since(begin), "since the last response")
	})
}

// A client that does not read delays no change, and misses nothing.
func TestSlowWatcherLosesNothing(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	watch, err := c.WatchEvents(t.Context(), &adminpb.WatchEventsRequest{})
	require.NoError(t, err)
	_, err = watch.Recv()
	require.NoError(t, err)
	const all = 3000 // more than the windows and buffers hold
	for range all {
		keystoretest.MustCreate(t, store, keystore.Spec{})
	}
	seen := make(map[string]bool)
	for len(seen) < all {
		m, err := watch.Recv()
		require.NoError(t, err)
		for _, e := range m.Events {
			require.False(t, seen[e.Key])
			seen[e.Key] = true
		}
	}
}
