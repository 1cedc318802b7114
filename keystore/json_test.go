package keystore_test

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The JSON of a key says what is known of it, and can be decoded again.
func TestJSONOfAKey(t *testing.T) {
	s := open(t, nil)
	full := create(t, s, keystore.Spec{
		Name: "n", Owner: "o", Scopes: []string{"a:*"}, Metadata: map[string]string{"k": "v"},
		ExpiresAt: time.Now().Add(time.Hour), NotBefore: time.Now().Add(-time.Hour),
		AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")},
		RateLimit:       keystore.RateLimit{PerSecond: 1, Burst: 2},
	})
	_, err := s.Rotate(t.Context(), full.Key.ID, time.Hour)
	require.NoError(t, err)
	require.NoError(t, s.Disable(t.Context(), full.Key.ID, "paused"))
	require.NoError(t, s.Revoke(t.Context(), full.Key.ID, "leaked"))
	plain := create(t, s, keystore.Spec{})
	for id, status := range map[string]string{full.Key.ID: "revoked", plain.Key.ID: "active"} {
		key, err := s.Get(t.Context(), id)
		require.NoError(t, err)
		for _, v := range []any{key, *key, []*keystore.Key{key},
			map[string]keystore.Key{"k": *key}} {
			text, err := json.Marshal(v)
			require.NoError(t, err)
			require.Contains(t, string(text), `"ID":"`+id+`"`)
			require.Contains(t, string(text), `"Status":"`+status+`"`)
			require.NotContains(t, string(text), "0001-01-01", "a time that is not set")
			if status == "active" {
				for _, field := range []string{"ExpiresAt", "RevokedAt", "DisabledAt", "RateLimit",
					"Reason", "LastUsedAt", "Live"} {
					require.NotContains(t, string(text), field)
				}
			}
		}
		text, err := json.Marshal(key)
		require.NoError(t, err)
		var again keystore.Key
		decoder := json.NewDecoder(strings.NewReader(string(text)))
		decoder.DisallowUnknownFields()
		require.NoError(t, decoder.Decode(&again))
		require.Equal(t, *key, again)
		require.Equal(t, status, again.Status().String())
	}
	require.Error(t, json.Unmarshal([]byte(`{"ID":1}`), new(keystore.Key)))

	// An admitted key has a limiter, which is not its JSON's concern.
	limited := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1, Burst: 2}})
	key, err := s.Verify(t.Context(), limited.Secret.Reveal())
	require.NoError(t, err)
	text, err := json.Marshal(key)
	require.NoError(t, err)
	var again keystore.Key
	require.NoError(t, json.Unmarshal(text, &again))
	require.NoError(t, again.Allow())

	text, err = json.Marshal(keystore.Spec{Name: "n"})
	require.NoError(t, err)
	require.NotContains(t, string(text), "0001-01-01")
}

func TestJSONOfAStatus(t *testing.T) {
	all := []keystore.Status{0, keystore.StatusActive, keystore.StatusPending,
		keystore.StatusExpired, keystore.StatusDisabled, keystore.StatusRevoked}
	text, err := json.Marshal(all)
	require.NoError(t, err)
	require.Equal(t, `["","active","pending","expired","disabled","revoked"]`, string(text))
	var again []keystore.Status
	require.NoError(t, json.Unmarshal(text, &again))
	require.Equal(t, all, again)
	for _, bad := range []string{`"Active"`, `"gone"`, `"status 9"`} {
		require.ErrorIs(t, json.Unmarshal([]byte(bad), new(keystore.Status)), keystore.ErrInvalid,
			bad)
	}
}
