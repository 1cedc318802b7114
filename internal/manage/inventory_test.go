package manage_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/manage"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

func TestInventory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		i := manage.NewInventory(store, time.Minute)
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
		_, ok := i.Latest()
		require.False(t, ok, "nothing was counted yet")
		want := map[string]int64{"active": 2, "pending": 1, "expired": 1, "disabled": 1, "revoked": 1}
		counts, err := i.Counts(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, counts.ByStatus)
		require.Equal(t, time.Now(), counts.At)

		counts.ByStatus["active"] = -1 // the caller's own copy
		keystoretest.MustCreate(t, store, keystore.Spec{})
		time.Sleep(time.Minute - time.Nanosecond)
		again, err := i.Counts(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, again.ByStatus, "the last count is kept for a minute")
		require.Equal(t, counts.At, again.At)
		time.Sleep(time.Nanosecond)
		counts, err = i.Counts(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 3, counts.ByStatus["active"])

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
		latest, ok := i.Latest()
		require.True(t, ok, "the last count stays")
		require.EqualValues(t, 3, latest.ByStatus["active"])
	})
}

func TestInventoryOfOldKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := keystoretest.New(t, nil)
		i := manage.NewInventory(store, time.Minute)
		keystoretest.MustCreate(t, store, keystore.Spec{}) // never used
		used := keystoretest.MustCreate(t, store, keystore.Spec{})
		live := keystoretest.MustCreate(t, store, keystore.Spec{})
		session, err := store.Bind(t.Context(), live.Secret.Reveal())
		require.NoError(t, err)
		defer session.Close()
		stopped := keystoretest.MustCreate(t, store, keystore.Spec{})
		require.NoError(t, store.Disable(t.Context(), stopped.Key.ID, ""))
		time.Sleep(manage.UnusedFor)
		_, err = store.Verify(t.Context(), used.Secret.Reveal())
		require.NoError(t, err)
		keystoretest.MustCreate(t, store, keystore.Spec{
			ExpiresAt: time.Now().Add(manage.ExpiringWithin - time.Second)})
		keystoretest.MustCreate(t, store, keystore.Spec{
			ExpiresAt: time.Now().Add(manage.ExpiringWithin + time.Second)})
		time.Sleep(time.Millisecond)
		counts, err := i.Counts(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 1, counts.Unused)
		require.EqualValues(t, 1, counts.Expiring)
	})
}
