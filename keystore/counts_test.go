package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// counted returns the counts that are not 0.
func counted[K ~string](all map[K]uint64) map[K]uint64 {
	all = maps.Clone(all)
	maps.DeleteFunc(all, func(_ K, n uint64) bool { return n == 0 })
	return all
}

func TestStatsCountCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := withFaults(t, nil)
		require.Empty(t, counted(s.Stats().Refusals))
		var refused uint64
		want := make(map[string]uint64)
		// both calls Verify and Bind, and counts the refusals.
		both := func(ctx context.Context, text string, reason string) {
			t.Helper()
			_, err := s.Verify(ctx, text)
			require.Equal(t, reason, keystore.Reason(err))
			_, err = s.Bind(ctx, text)
			require.Equal(t, reason, keystore.Reason(err))
			want[reason] += 2
			refused += 2
		}
		ctx := t.Context()
		ended, cancel := context.WithCancel(ctx)
		cancel()
		late, cancel := context.WithTimeout(ctx, -1)
		defer cancel()
		plain := create(t, s, keystore.Spec{}).Secret.Reveal()
		limited := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1e-9,
			Burst: 2}})
		home := create(t, s,
			keystore.Spec{AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
		future := create(t, s, keystore.Spec{NotBefore: time.Now().Add(time.Hour)})
		short := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Second)})
		time.Sleep(time.Minute)
		stopped := create(t, s, keystore.Spec{})
		dead := create(t, s, keystore.Spec{})

		for range 3 { // read, and twice cached
			_, err := s.Verify(ctx, plain)
			require.NoError(t, err)
			session, err := s.Bind(ctx, plain)
			require.NoError(t, err)
			session.Close()
		}
		for _, text := range []string{stopped.Secret.Reveal(), dead.Secret.Reveal()} {
			// the refusals below are of cached keys, at first
			require.NoError(t, verify(t, s, text))
		}
		for range 2 {
			require.NoError(t, verify(t, s, limited.Secret.Reveal()))
		}
		admitted := uint64(6 + 2 + 2)
		require.NoError(t, s.Disable(ctx, stopped.Key.ID, ""))
		require.NoError(t, s.Revoke(ctx, dead.Key.ID, ""))

		both(ctx, "nonsense", "malformed")
		both(ctx, create(t, inMemory(t), keystore.Spec{}).Secret.Reveal(), "unknown")
		both(ctx, limited.Secret.Reveal(), "rate_limited")
		both(ctx, home.Secret.Reveal(), "network")
		both(ctx, future.Secret.Reveal(), "not_yet_valid")
		both(ctx, short.Secret.Reveal(), "expired")
		both(ctx, stopped.Secret.Reveal(), "disabled")
		both(ctx, dead.Secret.Reveal(), "revoked")
		both(ended, plain, "canceled")
		both(late, plain, "deadline")
		failed := errors.New("a disk")
		b.fail.Store(&failed)
		both(ctx, future.Secret.Reveal(), "unavailable")
		b.fail.Store(nil)

		st := s.Stats()
		require.Equal(t, want, counted(st.Refusals))
		require.Equal(t, refused, st.Refused)
		require.Equal(t, admitted, st.Admitted)
		require.GreaterOrEqual(t, st.Hits+st.Misses, admitted)
		require.Zero(t, st.Live)

		st.Refusals["malformed"], st.Ended["revoked"] = 99, 99
		st.Changes[keystore.ActionCreate] = 99
		require.Equal(t, want, counted(s.Stats().Refusals), "the maps belong to the caller")
		_, err := s.Inspect(ctx, "nonsense")
		require.NoError(t, err)
		require.Equal(t, want, counted(s.Stats().Refusals))
	})
}

// Each look-up is a hit or a miss, once, in whatever way the key is found.
func TestStatsCountHits(t *testing.T) {
	b := backendtest.NewMemory()
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	issued := create(t, s, keystore.Spec{})
	text := issued.Secret.Reveal()
	hits := func(hits, misses uint64) {
		t.Helper()
		st := s.Stats()
		require.Equal(t, [2]uint64{hits, misses}, [2]uint64{st.Hits, st.Misses})
	}
	hits(0, 0)
	require.NoError(t, verify(t, s, text))
	hits(0, 1)
	require.NoError(t, verify(t, s, text))
	hits(1, 1)
	bind(t, s, text)
	hits(2, 1)
	require.Error(t, verify(t, s, "nonsense"))
	hits(2, 1)
	rotated, err := s.Rotate(t.Context(), issued.Key.ID, 0)
	require.NoError(t, err)
	require.NoError(t, verify(t, s, rotated.Secret.Reveal()))
	hits(2, 2)
	require.ErrorIs(t, verify(t, s, text), keystore.ErrUnknown)
	hits(3, 2)
	key, err := s.Verify(t.Context(), rotated.Secret.Reveal())
	require.NoError(t, err)
	hits(4, 2)
	*key = keystore.Key{} // a caller must not, and the store then reads the key again
	require.NoError(t, verify(t, s, rotated.Secret.Reveal()))
	hits(5, 2)
	require.NoError(t, s.Close())
	require.ErrorIs(t, verify(t, s, rotated.Secret.Reveal()), keystore.ErrClosed)
	hits(5, 2)
	require.EqualValues(t, 1, s.Stats().Refusals["closed"])
}

func TestStatsCountChanges(t *testing.T) {
	s := inMemory(t)
	words := slices.Sorted(maps.Keys(s.Stats().Changes))
	require.Equal(t, []keystore.Action{"create", "credits", "disable", "enable", "import", "purge",
		"rehash", "restore", "revoke", "rotate", "update"}, words, "from the beginning")
	ctx := t.Context()
	other := inMemory(t)
	create(t, other, keystore.Spec{})
	restore(t, s, backup(t, other))
	a, b := create(t, s, keystore.Spec{}).Key.ID, create(t, s, keystore.Spec{}).Key.ID
	for _, change := range []string{"Update", "Update", "Rotate", "Disable", "Disable", "Enable"} {
		require.NoError(t, changesOfOneKey[change](ctx, s, a))
	}
	_, err := s.Create(ctx, keystore.Spec{})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	require.NoError(t, s.Revoke(ctx, b, ""))
	require.Error(t, s.Enable(ctx, b))
	n, err := s.Purge(ctx, time.Now())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Equal(t, map[keystore.Action]uint64{
		"create": 2, "update": 2, "rotate": 1, "disable": 1, "enable": 1, "revoke": 1, "purge": 1,
		"restore": 1,
	}, counted(s.Stats().Changes), "what changed nothing does not count")
	_, err = s.RevokeAll(ctx, keystore.Query{}, "", &keystore.RevokeAllOptions{All: true})
	require.NoError(t, err)
	require.EqualValues(t, 3, s.Stats().Changes[keystore.ActionRevoke])
	perAction := make(map[keystore.Action]uint64)
	for _, e := range events(t, s, keystore.EventQuery{}) {
		perAction[e.Action]++
	}
	require.Equal(t, perAction, counted(s.Stats().Changes))
}

func TestStatsCountEndedSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		ctx := t.Context()
		words := slices.Sorted(maps.Keys(s.Stats().Ended))
		require.Equal(t, []string{"closed", "disabled", "expired", "narrowed", "not_yet_valid",
			"revoked"}, words)
		bound := func(spec keystore.Spec, sessions int) string {
			issued := create(t, s, spec)
			for range sessions {
				_, err := s.Bind(ctx, issued.Secret.Reveal())
				require.NoError(t, err)
			}
			return issued.Key.ID
		}
		update := func(id string, change func(*keystore.Spec)) {
			_, err := s.Update(ctx, id,
				func(spec *keystore.Spec) error { change(spec); return nil })
			require.NoError(t, err)
		}
		require.NoError(t, s.Revoke(ctx, bound(keystore.Spec{}, 1), ""))
		require.NoError(t, s.Disable(ctx, bound(keystore.Spec{}, 2), ""))
		update(bound(keystore.Spec{Scopes: []string{"a"}}, 3),
			func(spec *keystore.Spec) { spec.Scopes = nil })
		bound(keystore.Spec{ExpiresAt: time.Now().Add(time.Minute)}, 4)
		time.Sleep(time.Minute)
		synctest.Wait()
		update(bound(keystore.Spec{}, 5),
			func(spec *keystore.Spec) { spec.NotBefore = time.Now().Add(time.Hour) })
		issued := create(t, s, keystore.Spec{})
		session, err := s.Bind(ctx, issued.Secret.Reveal())
		require.NoError(t, err)
		session.Close()
		left, cancel := context.WithCancel(ctx)
		session, err = s.Bind(left, issued.Secret.Reveal())
		require.NoError(t, err)
		cancel()
		session.Close()
		bound(keystore.Spec{}, 6)
		want := map[string]uint64{"revoked": 1, "disabled": 2, "narrowed": 3, "expired": 4,
			"not_yet_valid": 5}
		require.Equal(t, want, counted(s.Stats().Ended))
		require.NoError(t, s.Close())
		want["closed"] = 6
		require.Equal(t, want, counted(s.Stats().Ended))
	})
}

// Each session that Bind returned ends once in the counts, however its key, its owner and the store
// race; and the counts agree with what an Observer saw.
func TestStatsCountEachEndOnce(t *testing.T) {
	o := new(counter)
	s, err := keystore.New(backendtest.NewMemory(), &keystore.Options{Observer: o})
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 200 {
		issued := create(t, s, keystore.Spec{})
		for range 4 {
			wg.Go(func() {
				for {
					session, err := s.Bind(context.Background(), issued.Secret.Reveal())
					if err != nil {
						return
					}
					<-session.Context().Done()
					session.Close()
				}
			})
		}
		wg.Go(func() { _ = s.Revoke(context.Background(), issued.Key.ID, "") })
	}
	wg.Wait()
	st := s.Stats()
	require.Equal(t, st.Admitted, st.Ended["revoked"])
	require.LessOrEqual(t, o.ended.Load(), st.Ended["revoked"],
		"no end is reported after Close of the session")
	require.Equal(t, o.verified.Load(), st.Admitted)
	require.Equal(t, o.refused.Load(), st.Refused)
	require.Equal(t, o.changed.Load(), st.Changes[keystore.ActionCreate]+
		st.Changes[keystore.ActionRevoke])
	require.NoError(t, s.Close())
}

// A write that fails is counted by whether the storage was full. A conflict is no failure.
func TestStatsCountFailedWrites(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	failed := func() map[string]uint64 { return counted(s.Stats().FailedWrites) }
	for _, tt := range []struct {
		err  error
		want map[string]uint64
	}{
		{fmt.Errorf("write: %w", backend.ErrFull), map[string]uint64{"full": 1}},
		{errors.New("a disk"), map[string]uint64{"full": 1, "failed": 1}},
		{backend.ErrTooLarge, map[string]uint64{"full": 1, "failed": 1}},
	} {
		b.fail.Store(&tt.err)
		_, err := s.Create(t.Context(), keystore.Spec{Name: "n"})
		require.Error(t, err)
		require.Equal(t, tt.want, failed())
	}
	b.fail.Store(nil)
	require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
	st := s.Stats()
	require.EqualValues(t, 4, st.Durations[keystore.ActionCreate].Count, "whatever the result")
	require.EqualValues(t, 1, st.Durations[keystore.ActionRevoke].Count)
	require.Zero(t, st.Durations[keystore.ActionUpdate].Count)
}
