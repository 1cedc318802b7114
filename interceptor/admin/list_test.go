package admin_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// listKeys reads all pages of a list. each is called for each page.
func listKeys(
	t testing.TB, c clients, r *adminpb.ListKeysRequest, each func(*adminpb.ListKeysResponse),
) {
	t.Helper()
	for {
		page, err := c.ListKeys(t.Context(), r)
		require.NoError(t, err)
		require.Empty(t, page.Damage)
		each(page)
		if page.NextPageToken == "" {
			return
		}
		r.PageToken = page.NextPageToken
	}
}

func TestPagesOfKeys(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	const all = 120
	var names []string
	for i := range all {
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Owner: fmt.Sprint(i % 2)})
		names = append(names, "keys/"+issued.Key.ID)
	}
	for _, newest := range []bool{false, true} {
		for size, pages := range map[int32]int{0: 3, 1: 120, 7: 18, 60: 2, 120: 1, 121: 1, 2000: 1} {
			r := &adminpb.ListKeysRequest{PageSize: size, NewestFirst: newest}
			var got []string
			n := 0
			listKeys(t, c, r, func(page *adminpb.ListKeysResponse) {
				n++
				for _, k := range page.Keys {
					got = append(got, k.Name)
				}
			})
			require.Equal(t, pages, n, "pages of %d keys", size)
			require.Len(t, got, all)
			for i := range got {
				at := i
				if newest {
					at = all - 1 - i
				}
				require.Equal(t, names[at], got[i])
			}
		}
	}
	owned := 0
	listKeys(t, c, &adminpb.ListKeysRequest{Filter: &adminpb.Filter{Owner: "1"}, PageSize: 9},
		func(page *adminpb.ListKeysResponse) { owned += len(page.Keys) })
	require.Equal(t, all/2, owned)

	first, err := c.ListKeys(t.Context(), &adminpb.ListKeysRequest{PageSize: 5})
	require.NoError(t, err)
	for name, r := range map[string]*adminpb.ListKeysRequest{
		"another filter": {PageToken: first.NextPageToken, Filter: &adminpb.Filter{Owner: "1"}},
		"another order":  {PageToken: first.NextPageToken, NewestFirst: true},
		"cut":            {PageToken: first.NextPageToken[:20]},
		"no base64":      {PageToken: "§"},
		"nonsense":       {PageToken: "AAAA"},
	} {
		_, err := c.ListKeys(t.Context(), r)
		require.Error(t, err, name)
		requireStatus(t, err, codes.InvalidArgument, "PAGE_TOKEN_INVALID")
	}
	second, err := c.ListKeys(t.Context(),
		&adminpb.ListKeysRequest{PageToken: first.NextPageToken, PageSize: 50})
	require.NoError(t, err, "the size of the page may change")
	require.Equal(t, names[5], second.Keys[0].Name)
	for _, r := range []*adminpb.ListKeysRequest{
		{PageSize: -1}, {Filter: &adminpb.Filter{State: 99}},
		{Filter: &adminpb.Filter{UnusedSince: &timestamppb.Timestamp{Nanos: -1}}},
		{Filter: &adminpb.Filter{CreateTimeBefore: &timestamppb.Timestamp{Nanos: -1}}},
		{Filter: &adminpb.Filter{ExpireTimeBefore: &timestamppb.Timestamp{Nanos: -1}}},
	} {
		_, err := c.ListKeys(t.Context(), r)
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	}
}

// Each field of a filter selects what it says.
func TestFilters(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	soon := time.Now().Add(time.Hour)
	a := keystoretest.MustCreate(t, store, keystore.Spec{Name: "billing", Owner: "acme",
		Scopes: []string{"orders:*"}, ExpiresAt: soon}).Key
	b := keystoretest.MustCreate(t, store, keystore.Spec{Name: "ci", Owner: "corp"}).Key
	require.NoError(t, store.Disable(t.Context(), b.ID, ""))
	for name, tt := range map[string]struct {
		filter *adminpb.Filter
		want   []*keystore.Key
	}{
		"nothing":  {nil, []*keystore.Key{a, b}},
		"owner":    {&adminpb.Filter{Owner: "acme"}, []*keystore.Key{a}},
		"active":   {&adminpb.Filter{State: adminpb.State_STATE_ACTIVE}, []*keystore.Key{a}},
		"disabled": {&adminpb.Filter{State: adminpb.State_STATE_DISABLED}, []*keystore.Key{b}},
		"revoked":  {&adminpb.Filter{State: adminpb.State_STATE_REVOKED}, nil},
		"scope":    {&adminpb.Filter{Scope: "orders:read"}, []*keystore.Key{a}},
		"text":     {&adminpb.Filter{Text: "BILL"}, []*keystore.Key{a}},
		"an ID":    {&adminpb.Filter{Text: b.ID}, []*keystore.Key{b}},
		"created before": {&adminpb.Filter{CreateTimeBefore: timestamppb.New(b.CreatedAt)},
			[]*keystore.Key{a}},
		"expires": {&adminpb.Filter{ExpireTimeBefore: timestamppb.New(soon.Add(1))},
			[]*keystore.Key{a}},
		"several": {&adminpb.Filter{Owner: "corp", Text: "billing"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := c.ListKeys(t.Context(), &adminpb.ListKeysRequest{Filter: tt.filter})
			require.NoError(t, err)
			require.Len(t, got.Keys, len(tt.want))
			for i := range tt.want {
				require.Equal(t, "keys/"+tt.want[i].ID, got.Keys[i].Name)
			}
		})
	}
}

// A page of large keys stays below the size that gRPC clients accept.
func TestPagesOfLargeKeys(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	const all = 600
	for range all {
		keystoretest.MustCreate(t, store, keystore.Spec{
			Metadata: map[string]string{"a": strings.Repeat("x", 15<<10)}})
	}
	n, pages := 0, 0
	listKeys(t, c, &adminpb.ListKeysRequest{PageSize: 1000}, func(p *adminpb.ListKeysResponse) {
		n += len(p.Keys)
		pages++
	})
	require.Equal(t, all, n)
	require.Greater(t, pages, 2)
}

// listEvents reads all pages of events.
func listEvents(t testing.TB, c clients, r *adminpb.ListEventsRequest) (all []*adminpb.Event) {
	t.Helper()
	for {
		page, err := c.ListEvents(t.Context(), r)
		require.NoError(t, err)
		all = append(all, page.Events...)
		if page.NextPageToken == "" {
			return all
		}
		r.PageToken = page.NextPageToken
	}
}

func TestPagesOfEvents(t *testing.T) {
	store := keystoretest.New(t, nil)
	c := newRig(t, store).local(t)
	ctx := keystore.WithActor(t.Context(), "me")
	issued, err := store.Create(ctx, keystore.Spec{Name: "a"})
	require.NoError(t, err)
	other := keystoretest.MustCreate(t, store, keystore.Spec{})
	for i := range 100 {
		_, err := store.Update(ctx, issued.Key.ID, func(s *keystore.Spec) error {
			s.Owner = fmt.Sprint(i)
			return nil
		})
		require.NoError(t, err)
	}
	all := listEvents(t, c, &adminpb.ListEventsRequest{PageSize: 1000})
	require.Len(t, all, 102)
	for i := 1; i < len(all); i++ {
		require.True(t, all[i-1].Time.AsTime().Before(all[i].Time.AsTime()))
	}
	for _, size := range []int32{0, 1, 17} {
		got := listEvents(t, c, &adminpb.ListEventsRequest{PageSize: size})
		require.Len(t, got, len(all))
		down := listEvents(t, c, &adminpb.ListEventsRequest{PageSize: size, NewestFirst: true})
		require.Len(t, down, len(all))
		for i := range all {
			require.Equal(t, all[i].Cursor, got[i].Cursor)
			require.Equal(t, all[i].Cursor, down[len(all)-1-i].Cursor)
		}
	}
	require.Len(t, listEvents(t, c, &adminpb.ListEventsRequest{Key: "keys/" + other.Key.ID}), 1)
	require.Len(t, listEvents(t, c, &adminpb.ListEventsRequest{Actor: "me"}), 101)
	require.Len(t, listEvents(t, c, &adminpb.ListEventsRequest{Action: "create"}), 2)
	// The start is included, the end is not.
	window := listEvents(t, c, &adminpb.ListEventsRequest{
		StartTime: all[10].Time, EndTime: all[20].Time, PageSize: 3})
	require.Len(t, window, 10)
	require.Equal(t, all[10].Cursor, window[0].Cursor)
	require.Equal(t, all[19].Cursor, window[9].Cursor)
	down := listEvents(t, c, &adminpb.ListEventsRequest{
		StartTime: all[10].Time, EndTime: all[20].Time, PageSize: 3, NewestFirst: true})
	require.Len(t, down, 10)
	require.Equal(t, all[19].Cursor, down[0].Cursor)

	first, err := c.ListEvents(t.Context(), &adminpb.ListEventsRequest{PageSize: 3})
	require.NoError(t, err)
	_, err = c.ListEvents(t.Context(),
		&adminpb.ListEventsRequest{PageToken: first.NextPageToken, Actor: "me"})
	requireStatus(t, err, codes.InvalidArgument, "PAGE_TOKEN_INVALID")
	for _, r := range []*adminpb.ListEventsRequest{
		{Key: "x"}, {Key: "keys/x"}, {PageSize: -1},
		{StartTime: &timestamppb.Timestamp{Nanos: -1}}, {EndTime: &timestamppb.Timestamp{Nanos: -1}},
	} {
		_, err := c.ListEvents(t.Context(), r)
		requireStatus(t, err, codes.InvalidArgument, "INVALID_ARGUMENT")
	}
}

// A damaged key does not hide the other keys, and the list says so. A damaged event does not hide
// the other events, in a list and in a watch.
func TestDamageIsNamed(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	c := newRig(t, store).local(t)
	var keys []*keystore.Key
	for range 3 {
		keys = append(keys, keystoretest.MustCreate(t, store, keystore.Spec{}).Key)
	}
	gate.damage(t, keys[1])
	page, err := c.ListKeys(t.Context(), &adminpb.ListKeysRequest{})
	require.NoError(t, err)
	require.Len(t, page.Keys, 2)
	require.Len(t, page.Damage, 1)
	require.Contains(t, page.Damage[0], keys[1].ID)
	_, err = c.GetKey(t.Context(), &adminpb.GetKeyRequest{Name: "keys/" + keys[1].ID})
	requireStatus(t, err, codes.DataLoss, "STORE_CORRUPT")
	_, err = c.CheckIntegrity(t.Context(), &adminpb.CheckIntegrityRequest{})
	requireStatus(t, err, codes.DataLoss, "STORE_CORRUPT")

	gate.damageEvent(t, 1)
	events, err := c.ListEvents(t.Context(), &adminpb.ListEventsRequest{})
	require.NoError(t, err)
	require.Len(t, events.Events, 2)
	require.Len(t, events.Damage, 1)
	watch, err := c.WatchEvents(t.Context(), &adminpb.WatchEventsRequest{After: "0"})
	require.NoError(t, err)
	got, damage := 0, 0
	for got < 2 || damage < 1 {
		m, err := watch.Recv()
		require.NoError(t, err)
		got += len(m.Events)
		damage += len(m.Damage)
	}
	require.Equal(t, 2, got)
}

// The sentences about damage that a page leaves out take no space from the keys. So a page has
// keys, also after much damage, and the next page continues after the last of them.
func TestAKeyAfterMuchDamage(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	for n := range 2 << 20 / backend.MaxKeySize / backend.MaxChanges {
		var changes []backend.Change
		for m := range backend.MaxChanges {
			key := make([]byte, backend.MaxKeySize)
			key[0], key[2], key[3] = 'k', byte(n), byte(m)
			changes = append(changes, backend.Change{Key: key, Value: []byte("damaged")})
		}
		require.NoError(t, gate.Backend.Apply(t.Context(), changes...))
	}
	for range 3 {
		keystoretest.MustCreate(t, store, keystore.Spec{})
	}
	c := newRig(t, store).local(t)
	r := &adminpb.ListKeysRequest{PageSize: 2}
	page, err := c.ListKeys(t.Context(), r)
	require.NoError(t, err)
	require.Len(t, page.Keys, 2)
	require.Len(t, page.Damage, 100)
	r.PageToken = page.NextPageToken
	page, err = c.ListKeys(t.Context(), r)
	require.NoError(t, err)
	require.Len(t, page.Keys, 1)
	require.Empty(t, page.Damage)
	require.Empty(t, page.NextPageToken)
}

func TestStats(t *testing.T) {
	store := keystoretest.New(t, nil)
	r := newRig(t, store)
	c := r.local(t)
	before := time.Now()
	issued := keystoretest.MustCreate(t, store, keystore.Spec{})
	_, err := store.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	_, err = store.Verify(t.Context(), "nonsense")
	require.Error(t, err)
	session, err := store.Bind(context.Background(), issued.Secret.Reveal())
	require.NoError(t, err)
	defer session.Close()
	st, err := c.GetStats(t.Context(), &adminpb.GetStatsRequest{})
	require.NoError(t, err)
	require.EqualValues(t, 2, st.Admitted)
	require.EqualValues(t, 1, st.Refused)
	require.EqualValues(t, 1, st.Refusals["malformed"])
	require.EqualValues(t, 1, st.Changes["create"])
	require.EqualValues(t, 1, st.LiveStreams)
	require.EqualValues(t, 1, st.CachedKeys)
	require.EqualValues(t, 2, st.Hits+st.Misses)
	require.EqualValues(t, 1, st.Processes)
	require.True(t, st.Fresh)
	require.Equal(t, map[string]int64{
		"active": 1, "pending": 0, "expired": 0, "disabled": 0, "revoked": 0}, st.Keys)
	require.Nil(t, st.OutdatedDigests)
	require.Zero(t, st.Leases)
	require.Zero(t, st.Exhausted)
	require.False(t, st.CountedTime.AsTime().Before(before))
	require.True(t, st.StartTime.AsTime().Before(before))
	require.Contains(t, st.Ended, "revoked")

	metered := keystoretest.MustCreate(t, store,
		keystore.Spec{Credits: &keystore.Credits{Remaining: 1}})
	for range 2 {
		_, err = store.Verify(t.Context(), metered.Secret.Reveal())
	}
	require.ErrorAs(t, err, new(*keystore.CreditsError))
	st, err = c.GetStats(t.Context(), &adminpb.GetStatsRequest{})
	require.NoError(t, err)
	require.EqualValues(t, 1, st.Leases)
	require.EqualValues(t, 1, st.Exhausted)
}
