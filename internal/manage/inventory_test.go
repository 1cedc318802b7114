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
		i := manage.NewInventory(store)
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
		want := map[string]int64{"active": 2, "pending": 1, "expired": 1, "disabled": 1, "revoked": 1}
		keys, at, err := i.Keys(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, keys)
		require.Equal(t, time.Now(), at)

		keys["active"] = -1 // the caller's own copy
		keystoretest.MustCreate(t, store, keystore.Spec{})
		time.Sleep(time.Minute - time.Nanosecond)
		keys, again, err := i.Keys(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, keys, "the last count is kept for a minute")
		require.Equal(t, at, again)
		time.Sleep(time.Nanosecond)
		keys, _, err = i.Keys(t.Context())
		require.NoError(t, err)
		require.EqualValues(t, 3, keys["active"])

		gone, cancel := context.WithCancel(t.Context())
		cancel()
		time.Sleep(time.Minute)
		_, _, err = i.Keys(gone)
		require.ErrorIs(t, err, context.Canceled)
		_, _, err = i.Keys(t.Context())
		require.NoError(t, err, "a caller who went does not keep the turn")
	})
}
