package keystore_test

import (
	"encoding/json"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The store decides by data of its own, whatever a caller has written to the key that it was given.
func TestCallersCannotChangeDecisions(t *testing.T) {
	lift := func(k *keystore.Key) {
		k.ExpiresAt, k.NotBefore, k.PreviousUntil = time.Time{}, time.Time{}, time.Time{}
		k.RevokedAt, k.DisabledAt = time.Time{}, time.Time{}
		k.RateLimit, k.Revision = keystore.RateLimit{}, 1<<60
		for i := range k.AllowedNetworks() {
			k.AllowedNetworks()[i] = netip.MustParsePrefix("0.0.0.0/0")
		}
	}
	for name, attack := range map[string]func(*keystore.Key){
		"fields": lift,
		"all":    func(k *keystore.Key) { *k = keystore.Key{} },
		"a NewKey": func(k *keystore.Key) {
			*k = *keystore.NewKey(keystore.Spec{Scopes: []string{"*"}})
		},
		"JSON": func(k *keystore.Key) {
			require.NoError(t, json.Unmarshal([]byte(`{"AllowedNetworks":null}`), k))
			lift(k)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := inMemory(t)
				start := time.Now()
				issued := create(t, s, keystore.Spec{
					Scopes:          []string{"a", "b"},
					NotBefore:       start.Add(time.Minute),
					ExpiresAt:       start.Add(time.Hour),
					AllowedNetworks: prefixes("192.0.2.0/24"),
					RateLimit:       keystore.RateLimit{PerSecond: 1, Burst: 3},
				})
				id := issued.Key.ID
				attack(issued.Key)
				token := issued.Secret.Reveal()
				at := func(addr string) error {
					ctx := keystore.WithClientAddr(t.Context(), netip.MustParseAddr(addr))
					key, err := s.Verify(ctx, token)
					if err == nil {
						require.True(t, key.HasScope("a"))
						require.False(t, key.HasScope("c"))
						require.Equal(t, []string{"a", "b"}, key.Scopes())
						attack(key)
					}
					bound, key, release, bindErr := parts(s.Bind(ctx, token))
					if bindErr == nil {
						require.False(t, key.HasScope("c"))
						require.NoError(t, bound.Err())
						attack(key)
						release()
					}
					return err
				}
				require.Error(t, at("192.0.2.1"), "before NotBefore")
				time.Sleep(time.Minute)
				require.NoError(t, at("192.0.2.1"))
				require.ErrorIs(t, at("198.51.100.1"), keystore.ErrNetworkNotAllowed)
				require.NoError(t, at("192.0.2.1"))
				var limited *keystore.RateLimitError
				require.ErrorAs(t, at("192.0.2.1"), &limited)

				// An update is compared with what the key was, not with what a caller has made of
				// it.
				time.Sleep(time.Minute)
				ctx := keystore.WithClientAddr(t.Context(), netip.MustParseAddr("192.0.2.1"))
				bound, key, release, err := parts(s.Bind(ctx, token))
				require.NoError(t, err)
				defer release()
				attack(key)
				updated, err := s.Update(ctx, id, func(spec *keystore.Spec) error {
					spec.Scopes = append(spec.Scopes, "c")
					return nil
				})
				require.NoError(t, err)
				attack(updated)
				require.NoError(t, bound.Err(), "the key may do more")
				time.Sleep(time.Until(start.Add(time.Hour)))
				synctest.Wait()
				require.Error(t, bound.Err())
				require.ErrorIs(t, at("192.0.2.1"), keystore.ErrExpired)
			})
		})
	}
}

func TestNewKey(t *testing.T) {
	spec := keystore.Spec{
		Name: "n", Owner: "o", Scopes: []string{"a"}, Metadata: map[string]string{"m": "v"},
		AllowedNetworks: prefixes("192.0.2.0/24"),
		RateLimit:       keystore.RateLimit{PerSecond: 1, Burst: 1},
		ExpiresAt:       time.Now().Add(time.Hour), NotBefore: time.Now().Add(-time.Hour),
	}
	key := keystore.NewKey(spec)
	spec.Scopes[0], spec.Metadata["m"], spec.AllowedNetworks[0] = "b", "w", netip.Prefix{}
	require.Equal(t, "n", key.Name)
	require.Equal(t, "o", key.Owner)
	require.Equal(t, []string{"a"}, key.Scopes())
	require.Equal(t, map[string]string{"m": "v"}, key.Metadata())
	require.Equal(t, prefixes("192.0.2.0/24"), key.AllowedNetworks())
	require.Equal(t, spec.RateLimit, key.RateLimit)
	require.Equal(t, keystore.StatusActive, key.Status())
	for range 3 {
		require.NoError(t, key.Allow(), "no store counts its uses")
	}

	for _, empty := range []*keystore.Key{{}, keystore.NewKey(keystore.Spec{Scopes: []string{}})} {
		require.Nil(t, empty.Scopes())
		require.Nil(t, empty.Metadata())
		require.Nil(t, empty.AllowedNetworks())
		require.False(t, empty.HasScope("a"))
		require.NoError(t, empty.Allow())
	}
}
