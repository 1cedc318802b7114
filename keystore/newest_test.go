package keystore_test

import (
	"context"
	"fmt"
	"log"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// backwards returns a backwards copy.
func backwards[T any](all []T) []T {
	all = slices.Clone(all)
	slices.Reverse(all)
	return all
}

// Each list with Newest is the reverse of the list without, whole or page by page.
func TestListNewest(t *testing.T) {
	s := open(t, nil)
	owners := []string{"", "acme", "ajax"}
	for i := range 600 { // more than a page of the backend
		create(t, s, keystore.Spec{Owner: owners[i%3]})
	}
	ids := func(q keystore.Query) (all []string) {
		for key, err := range s.List(t.Context(), q) {
			require.NoError(t, err)
			all = append(all, key.ID)
		}
		return all
	}
	all := ids(keystore.Query{})
	key, err := s.Get(t.Context(), all[100])
	require.NoError(t, err)
	for _, q := range []keystore.Query{
		{}, {Owner: "acme"}, {Owner: "nobody"}, {CreatedAfter: key.CreatedAt},
		{CreatedBefore: key.CreatedAt}, {Owner: "ajax", CreatedAfter: key.CreatedAt},
	} {
		want := backwards(ids(q))
		q.Newest = true
		require.Equal(t, want, ids(q), "%+v", q)
		n, err := s.Count(t.Context(), q)
		require.NoError(t, err)
		require.Equal(t, len(want), n)

		var paged []string
		for q.Limit = 7; ; q.Cursor = paged[len(paged)-1] {
			page := ids(q)
			paged = append(paged, page...)
			if len(page) < q.Limit {
				break
			}
		}
		require.Equal(t, want, paged, "%+v", q)
	}
	require.Empty(t, ids(keystore.Query{Newest: true, Cursor: all[0]}))
	require.Equal(t, all[:1], ids(keystore.Query{Newest: true, Cursor: all[1]}))

	// The cursor is older than CreatedAfter, or newer than CreatedBefore.
	q := keystore.Query{Newest: true, Cursor: all[99], CreatedAfter: key.CreatedAt}
	require.Empty(t, ids(q))
	require.Equal(t, backwards(all[:100]),
		ids(keystore.Query{Newest: true, Cursor: all[200], CreatedBefore: key.CreatedAt}))
	require.Equal(t, all[101:], ids(keystore.Query{Cursor: all[50], CreatedAfter: key.CreatedAt}))
	require.Equal(t, all[151:], ids(keystore.Query{Cursor: all[150], CreatedAfter: key.CreatedAt}))

	// RevokeAll with Newest and a Limit revokes the newest keys.
	var revoked []string
	n, err := s.RevokeAll(t.Context(), keystore.Query{Owner: "acme", Newest: true, Limit: 150}, "",
		&keystore.RevokeAllOptions{
			Progress: func(k *keystore.Key, _ int) { revoked = append(revoked, k.ID) },
		})
	require.NoError(t, err)
	require.Equal(t, 150, n)
	require.Equal(t, ids(keystore.Query{Owner: "acme", Newest: true, Limit: 150}), revoked)
	require.Len(t, ids(keystore.Query{Owner: "acme", Status: keystore.StatusActive}), 50)
}

func TestEventsNewest(t *testing.T) {
	s := open(t, nil)
	var ids []string
	for range 100 {
		ids = append(ids, create(t, s, keystore.Spec{}).Key.ID)
	}
	for range 3 {
		for _, id := range ids {
			require.NoError(t, s.Disable(keystore.WithActor(t.Context(), "alice"), id, ""))
			require.NoError(t, s.Enable(t.Context(), id))
		}
	}
	all := events(t, s, keystore.EventQuery{})
	for _, q := range []keystore.EventQuery{
		{}, {KeyID: ids[7]}, {Actor: "alice"}, {After: all[300].At}, {Until: all[300].At},
		{KeyID: ids[7], After: all[7].At}, {KeyID: ids[7], Until: all[7].At},
		{KeyID: ids[7], Until: all[6].At}, {KeyID: ids[7], Action: keystore.ActionEnable},
	} {
		want := backwards(events(t, s, q))
		q.Newest = true
		require.Equal(t, want, events(t, s, q), "%+v", q)
		var paged []keystore.Event
		for q.Limit = 9; ; q.Until = paged[len(paged)-1].At.Add(-1) {
			page := events(t, s, q)
			paged = append(paged, page...)
			if len(page) < q.Limit {
				break
			}
		}
		require.Equal(t, want, paged, "%+v", q)
	}
	newest := events(t, s, keystore.EventQuery{Newest: true, Limit: 1, KeyID: ids[7]})
	require.EqualValues(t, 7, newest[0].Revision)
	for _, err := range s.Follow(t.Context(), keystore.EventQuery{Newest: true}) {
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
}

// A backend without ScanDown refuses Newest, and nothing is done.
func TestNewestNeedsADownScanner(t *testing.T) {
	s, err := keystore.New(struct{ backend.Backend }{backendtest.NewMemory()}, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	issued := create(t, s, keystore.Spec{Owner: "acme"})
	for _, q := range []keystore.Query{{Newest: true}, {Newest: true, Owner: "acme"}} {
		for key, err := range s.List(t.Context(), q) {
			require.Nil(t, key)
			require.ErrorIs(t, err, keystore.ErrInvalid)
			require.ErrorContains(t, err, "ScanDown")
		}
		_, err = s.Count(t.Context(), q)
		require.ErrorIs(t, err, keystore.ErrInvalid)
		_, err = s.RevokeAll(t.Context(), q, "", &keystore.RevokeAllOptions{All: q.Owner == ""})
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
	for _, q := range []keystore.EventQuery{{Newest: true}, {Newest: true, KeyID: issued.Key.ID}} {
		seen := 0
		for _, err := range s.Events(t.Context(), q) {
			seen++
			require.ErrorIs(t, err, keystore.ErrInvalid)
		}
		require.Equal(t, 1, seen)
	}
	require.NoError(t, verify(t, s, issued.Secret.Reveal()))
}

// A panic of ScanDown is an error of the list.
func TestNewestOfAPanickyBackend(t *testing.T) {
	b := &panickyBackend{Backend: backendtest.NewMemory()}
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	create(t, s, keystore.Spec{})
	for _, in := range []string{"ScanDown", "between"} {
		b.in.Store(&in)
		var last error
		for _, err := range s.List(t.Context(), keystore.Query{Newest: true}) {
			last = err
		}
		require.ErrorIs(t, last, keystore.ErrUnavailable, in)
	}
	none := ""
	b.in.Store(&none)
	require.Len(t, names(t, s, keystore.Query{Newest: true}), 1)
}

// Keys that expire within a week, the newest first, in pages of two.
func ExampleQuery() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	for _, days := range []time.Duration{1, 2, 3, 30} {
		spec := keystore.Spec{
			Name:      fmt.Sprint(int(days), " days"),
			ExpiresAt: time.Now().Add(days * 24 * time.Hour),
		}
		if _, err := store.Create(ctx, spec); err != nil {
			log.Fatal(err)
		}
	}
	q := keystore.Query{ExpiresBefore: time.Now().Add(7 * 24 * time.Hour), Newest: true}
	n, err := store.Count(ctx, q)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(n, "keys")
	for q.Limit = 2; ; {
		last := q.Cursor
		for key, err := range store.List(ctx, q) {
			if err != nil {
				log.Fatal(err)
			}
			fmt.Println(key.Name)
			q.Cursor = key.ID
		}
		if q.Cursor == last {
			break
		}
		fmt.Println("--")
	}
	// Output:
	// 3 keys
	// 3 days
	// 2 days
	// --
	// 1 days
	// --
}
