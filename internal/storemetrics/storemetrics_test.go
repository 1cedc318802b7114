package storemetrics

import (
	"regexp"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// The names have the forms of both systems, and no name occurs twice.
func TestNames(t *testing.T) {
	seen := make(map[string]bool)
	for _, m := range Metrics {
		for _, name := range []string{m.Prometheus, m.OTel} {
			require.False(t, seen[name], name)
			seen[name] = true
		}
		require.Regexp(t, regexp.MustCompile(`^apikeys(_[a-z]+)+$`), m.Prometheus)
		require.Regexp(t, regexp.MustCompile(`^apikey(\.[a-z]+(_[a-z]+)*)+$`), m.OTel)
		require.Equal(t, m.Label == "", m.Attribute == "", m.Prometheus)
		require.NotEmpty(t, m.Unit, m.Prometheus)
		require.Equal(t, m.Kind == Counter,
			regexp.MustCompile(`_total$`).MatchString(m.Prometheus), m.Prometheus)
	}
}

func TestInventory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		store := keystoretest.New(t, nil)
		create := func(n int, spec keystore.Spec) (last *keystore.Issued) {
			for range n {
				last = keystoretest.MustCreate(t, store, spec)
			}
			return last
		}
		create(2, keystore.Spec{}) // unused for 100 days
		open := create(1, keystore.Spec{})
		time.Sleep(60 * day)
		used := create(1, keystore.Spec{})
		time.Sleep(40 * day)
		now := time.Now()
		_, err := store.Verify(ctx, used.Secret.Reveal())
		require.NoError(t, err)
		session, err := store.Bind(ctx, open.Secret.Reveal())
		require.NoError(t, err)
		defer session.Close()
		create(1, keystore.Spec{NotBefore: now.Add(time.Hour), ExpiresAt: now.Add(2 * time.Hour)})
		create(2, keystore.Spec{ExpiresAt: now.Add(time.Hour)})
		create(3, keystore.Spec{ExpiresAt: now.Add(3 * day)})
		create(4, keystore.Spec{ExpiresAt: now.Add(20 * day)})
		require.NoError(t, store.Disable(ctx, create(1, keystore.Spec{}).Key.ID, ""))
		require.NoError(t, store.Revoke(ctx, create(1, keystore.Spec{}).Key.ID, ""))

		i, err := NewInventory(store, MinInventory)
		require.NoError(t, err)
		require.Nil(t, i.Latest(), "the first count runs in the background")
		synctest.Wait()
		first := i.Latest()
		require.Equal(t, map[string]int{"active": 13, "pending": 1, "disabled": 1, "revoked": 1,
			"expired": 0}, first.Keys)
		require.Equal(t, map[string]int{"24h": 2, "7d": 5, "30d": 9}, first.Expiring)
		require.Equal(t, map[string]int{"30d": 2, "90d": 2}, first.Unused)
		require.Equal(t, now, first.At)

		time.Sleep(2 * time.Hour)
		require.Same(t, first, i.Latest(), "the next count has begun, and is not complete")
		synctest.Wait()
		require.Equal(t, 2+1, i.Latest().Keys["expired"])
		second := i.Latest()
		time.Sleep(MinInventory - 1)
		i.Latest()
		synctest.Wait()
		require.Same(t, second, i.Latest(), "one count in a time")

		require.NoError(t, store.Close())
		time.Sleep(time.Nanosecond)
		i.Latest()
		synctest.Wait()
		require.Same(t, second, i.Latest(), "a count that fails changes nothing")
	})
}

func TestNewInventory(t *testing.T) {
	_, err := NewInventory(keystoretest.New(t, nil), MinInventory-1)
	require.ErrorContains(t, err, "at least 10m0s")
}

// Each metric has a value of a new store, except those that need an inventory, several processes,
// or an earlier hasher.
func TestTake(t *testing.T) {
	store := keystoretest.New(t, nil)
	var without []string
	for _, m := range Metrics {
		n := 0
		m.Read(Take(store, nil), func(word string, v Value) {
			n++
			require.Equal(t, m.Label != "", word != "", m.Prometheus)
		})
		if n == 0 {
			without = append(without, m.Prometheus)
		}
	}
	require.Equal(t, []string{"apikeys_outdated_digests", "apikeys_freshness_seconds",
		"apikeys_feed_lag_seconds", "apikeys_barrier_duration_seconds", "apikeys_lost_touch_total",
		"apikeys_processes_removed_total", "apikeys_keys", "apikeys_expiring_keys",
		"apikeys_unused_keys", "apikeys_inventory_timestamp_seconds"}, without)
}
