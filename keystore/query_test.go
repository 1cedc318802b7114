package keystore_test

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// names returns the names of the keys that a query selects, and checks that Count agrees.
func names(t testing.TB, s *keystore.Store, q keystore.Query) []string {
	t.Helper()
	all := []string{}
	for key, err := range s.List(t.Context(), q) {
		require.NoError(t, err)
		all = append(all, key.Name)
	}
	n, err := s.Count(t.Context(), q)
	require.NoError(t, err)
	require.Equal(t, len(all), n)
	return all
}

func TestQueryFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		start := time.Now()
		at := func(h int) time.Time { return start.Add(time.Duration(h) * time.Hour) }
		ids := make(map[string]string)
		for i, spec := range []keystore.Spec{
			{Name: "never", Owner: "ACME"},
			{Name: "Soon", Owner: "ajax", ExpiresAt: at(10)},
			{Name: "later", ExpiresAt: at(20), Scopes: []string{"read"}},
			{Name: "ÉCOLE", Owner: "acme-2"},
		} {
			ids[spec.Name] = create(t, s, spec).Key.ID
			time.Sleep(time.Until(at(i + 1)))
		}
		for _, tt := range []struct {
			q    keystore.Query
			want string
		}{
			{keystore.Query{}, "never Soon later ÉCOLE"},
			{keystore.Query{ExpiresBefore: at(10)}, ""},
			{keystore.Query{ExpiresBefore: at(10).Add(1)}, "Soon"},
			{keystore.Query{ExpiresBefore: at(1000)}, "Soon later"},
			{keystore.Query{CreatedAfter: start.Add(-1)}, "never Soon later ÉCOLE"},
			{keystore.Query{CreatedAfter: start}, "Soon later ÉCOLE"},
			{keystore.Query{CreatedAfter: at(1).Add(-1)}, "Soon later ÉCOLE"},
			{keystore.Query{CreatedAfter: at(1), CreatedBefore: at(3)}, "later"},
			{keystore.Query{CreatedAfter: at(3)}, ""},
			{keystore.Query{CreatedAfter: time.Unix(-1, 0)}, "never Soon later ÉCOLE"},
			{keystore.Query{CreatedAfter: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC)}, ""},
			{keystore.Query{CreatedAfter: start, Limit: 2}, "Soon later"},
			{keystore.Query{CreatedAfter: at(1), Cursor: ids["never"]}, "later ÉCOLE"},
			{keystore.Query{CreatedAfter: start.Add(-1), Cursor: ids["Soon"]}, "later ÉCOLE"},
			{keystore.Query{Text: "acme"}, "never ÉCOLE"},
			{keystore.Query{Text: "SOON"}, "Soon"},
			{keystore.Query{Text: "école"}, "ÉCOLE"},
			{keystore.Query{Text: ids["later"]}, "later"},
			{keystore.Query{Text: strings.ToUpper(ids["later"][10:])}, "later"},
			{keystore.Query{Text: ids["later"][20:]}, "later"},
			{keystore.Query{Text: ids["later"][:5]}, ""}, // the IDs of the same time begin so
			{keystore.Query{Text: "e", Owner: "ACME"}, "never"},
			{keystore.Query{Text: "e", Limit: 1, Cursor: ids["never"]}, "later"},
			{keystore.Query{Text: "nobody"}, ""},
			{keystore.Query{Text: "\xff"}, ""},
		} {
			require.Equal(t, strings.Fields(tt.want), names(t, s, tt.q), "%+v", tt.q)
		}

		_, err := s.Verify(t.Context(), create(t, s, keystore.Spec{Name: "used"}).Secret.Reveal())
		require.NoError(t, err)
		time.Sleep(time.Hour)
		q := keystore.Query{UnusedSince: at(4).Add(time.Second)}
		require.Equal(t, []string{"never", "Soon", "later", "ÉCOLE"}, names(t, s, q))
	})
}

// Each field of a Query either selects some keys, or is one of those that do not.
func TestEachFieldOfAQuerySelects(t *testing.T) {
	s := inMemory(t)
	create(t, s, keystore.Spec{})
	values := map[reflect.Kind]any{reflect.String: "x", reflect.Uint8: uint8(1),
		reflect.Struct: time.Now()}
	fields := reflect.TypeFor[keystore.Query]()
	for i := range fields.NumField() {
		field := fields.Field(i)
		var q keystore.Query
		switch value := reflect.ValueOf(&q).Elem().Field(i); field.Name {
		case "Limit":
			q.Limit = 1
		case "Newest":
			q.Newest = true
		case "Cursor":
			q.Cursor = create(t, s, keystore.Spec{}).Key.ID
		default:
			value.Set(reflect.ValueOf(values[field.Type.Kind()]).Convert(field.Type))
			_, err := s.RevokeAll(t.Context(), q, "", &keystore.RevokeAllOptions{All: true,
				DryRun: true})
			require.ErrorIs(t, err, keystore.ErrInvalid, "%s selects some keys only", field.Name)
			continue
		}
		_, err := s.RevokeAll(t.Context(), q, "", &keystore.RevokeAllOptions{DryRun: true})
		require.ErrorIs(t, err, keystore.ErrInvalid, "%s selects every key", field.Name)
	}
	// A time that is zero in another zone selects every key too.
	zero := time.Time{}.In(time.FixedZone("", 3600))
	_, err := s.RevokeAll(t.Context(), keystore.Query{CreatedAfter: zero, ExpiresBefore: zero}, "",
		nil)
	require.ErrorIs(t, err, keystore.ErrInvalid)
}

func TestCount(t *testing.T) {
	b := backendtest.NewMemory()
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	fill(t, s, 20,
		func(i int) keystore.Spec { return keystore.Spec{Owner: []string{"acme", ""}[i%2]} })
	for want, q := range map[int]keystore.Query{
		20: {}, 10: {Owner: "acme"}, 7: {Limit: 7}, 0: {Status: keystore.StatusRevoked},
	} {
		n, err := s.Count(t.Context(), q)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	_, err = s.Count(t.Context(), keystore.Query{Cursor: "nonsense"})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = s.Count(ctx, keystore.Query{})
	require.ErrorIs(t, err, context.Canceled)

	for e, err := range b.Scan(t.Context(), []byte("k"), []byte("l")) {
		require.NoError(t, err)
		damaged := backend.Change{Key: e.Key, Value: []byte("nonsense"), Expect: e.Revision}
		require.NoError(t, b.Apply(t.Context(), damaged))
		break
	}
	n, err := s.Count(t.Context(), keystore.Query{})
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.Equal(t, 19, n)
	require.NoError(t, s.Close())
	_, err = s.Count(t.Context(), keystore.Query{})
	require.ErrorIs(t, err, keystore.ErrClosed)
}

func TestEventsByActorAndAction(t *testing.T) {
	s := inMemory(t)
	ctx := t.Context()
	by := func(actor string) context.Context { return keystore.WithActor(ctx, actor) }
	a := create(t, s, keystore.Spec{}).Key.ID
	b := create(t, s, keystore.Spec{}).Key.ID
	require.NoError(t, s.Disable(by("alice"), a, ""))
	require.NoError(t, s.Disable(by("bob"), b, ""))
	require.NoError(t, s.Enable(by("alice"), b))
	require.NoError(t, s.Revoke(by("two\nlines"), b, ""))
	revisions := func(q keystore.EventQuery) (got []uint64) {
		for _, e := range events(t, s, q) {
			got = append(got, e.Revision)
		}
		return got
	}
	require.Len(t, events(t, s, keystore.EventQuery{}), 6)
	require.Equal(t, []uint64{2, 3}, revisions(keystore.EventQuery{Actor: "alice"}))
	require.Equal(t, []uint64{2, 2}, revisions(keystore.EventQuery{Action: keystore.ActionDisable}))
	require.Equal(t, []uint64{3},
		revisions(keystore.EventQuery{Actor: "alice", Action: keystore.ActionEnable}))
	require.Equal(t, []uint64{3}, revisions(keystore.EventQuery{Actor: "alice", KeyID: b}))
	require.Equal(t, []uint64{2}, revisions(keystore.EventQuery{Actor: "alice", Limit: 1}))
	require.Equal(t, []uint64{4}, revisions(keystore.EventQuery{Actor: "two\nlines"}),
		"an actor is stored escaped")
	require.Equal(t, []uint64{4}, revisions(keystore.EventQuery{Actor: `two\nlines`}))
	require.Empty(t, revisions(keystore.EventQuery{Action: "revoked"}))
	require.Empty(t, revisions(keystore.EventQuery{Actor: "ali"}))
}
