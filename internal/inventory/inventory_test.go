package inventory_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/inventory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

const day = 24 * time.Hour

func TestCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		i := inventory.New(store, time.Minute)
		now := time.Now()
		for _, spec := range []keystore.Spec{
			{}, {}, {NotBefore: now.Add(time.Hour)}, {ExpiresAt: now.Add(time.Second)},
		} {
			keystoretest.MustCreate(t, store, spec)
		}
		revoked := keystoretest.MustCreate(t, store, keystore.Spec{}).Key.ID
		require.NoError(t, store.Revoke(t.Context(), revoked, ""))
		disabled := keystoretest.MustCreate(t, store, keystore.Spec{}).Key.ID
		require.NoError(t, store.Disable(t.Context(), disabled, ""))
		time.Sleep(2 * time.Second)
		require.Nil(t, i.Latest(), "nothing was counted yet")
		first, err := i.Counts(t.Context())
		require.NoError(t, err)
		require.Equal(t, map[string]int64{"active": 2, "pending": 1, "expired": 1, "disabled": 1,
			"revoked": 1}, first.ByStatus)
		require.Equal(t, time.Now(), first.At)

		keystoretest.MustCreate(t, store, keystore.Spec{})
		time.Sleep(time.Minute - time.Nanosecond)
		again, err := i.Counts(t.Context())
		require.NoError(t, err)
		require.Same(t, first, again, "the last count is kept for a minute")
		time.Sleep(time.Nanosecond)
		second, err := i.Counts(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 3, second.ByStatus["active"])

		gone, cancel := context.WithCancel(t.Context())
		cancel()
		time.Sleep(time.Minute)
		_, err = i.Counts(gone)
		require.ErrorIs(t, err, context.Canceled)
		_, err = i.Counts(t.Context())
		require.NoError(t, err, "a caller who went does not stop the others")
		require.NoError(t, store.Close())
		time.Sleep(time.Minute)
		_, err = i.Counts(t.Context())
		require.ErrorIs(t, err, keystore.ErrClosed)
		require.EqualValues(t, 3, i.Latest().ByStatus["active"], "the last count stays")
	})
}

func TestRefresh(t *testing.T) {
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

		const least = 10 * time.Minute
		i := inventory.New(store, least)
		require.Nil(t, i.Refresh(), "the first count runs in the background")
		synctest.Wait()
		first := i.Refresh()
		require.Equal(t, map[string]int64{"active": 13, "pending": 1, "disabled": 1, "revoked": 1,
			"expired": 0}, first.ByStatus)
		require.Equal(t, map[string]int64{"24h": 2, "7d": 5, "30d": 9}, first.Expiring)
		require.Equal(t, map[string]int64{"30d": 2, "90d": 2}, first.Unused)
		require.Equal(t, now, first.At)

		time.Sleep(2 * time.Hour)
		require.Same(t, first, i.Refresh(), "the next count has begun, and is not complete")
		synctest.Wait()
		second := i.Refresh()
		require.EqualValues(t, 2+1, second.ByStatus["expired"])
		time.Sleep(least - 1)
		i.Refresh()
		synctest.Wait()
		require.Same(t, second, i.Refresh(), "one count in a time")

		require.NoError(t, store.Close())
		time.Sleep(time.Nanosecond)
		i.Refresh()
		synctest.Wait()
		require.Same(t, second, i.Refresh(), "a count that fails changes nothing")
	})
}
