package keystore_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func pepper(t testing.TB, id string, b byte) hashing.Hasher {
	h, err := hashing.HMACSHA256(id, bytes.Repeat([]byte{b}, 32))
	require.NoError(t, err)
	return h
}

func keyring(t testing.TB, current hashing.Hasher, earlier ...hashing.Hasher) hashing.Hasher {
	h, err := hashing.Keyring(current, earlier...)
	require.NoError(t, err)
	return h
}

// A pepper is replaced: the digests follow as the keys are used, and when Stats says so the old
// pepper can go.
func TestPepperIsReplaced(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	first, second := pepper(t, "2025", 1), pepper(t, "2026", 2)
	reopen := func(h hashing.Hasher) *keystore.Store {
		s, err := keystore.Open(dir, &keystore.Options{Hasher: h})
		require.NoError(t, err)
		return s
	}
	s := reopen(first)
	var tokens []string
	for range 3 {
		tokens = append(tokens, create(t, s, keystore.Spec{}).Secret.Reveal())
	}
	rotated := create(t, s, keystore.Spec{})
	tokens = append(tokens, rotated.Secret.Reveal())
	again, err := s.Rotate(t.Context(), rotated.Key.ID, time.Hour)
	require.NoError(t, err)
	tokens = append(tokens, again.Secret.Reveal())
	require.Equal(t, -1, s.Stats().Outdated, "nothing to count")
	require.Nil(t, s.Stats().OutdatedSchemes)
	require.NoError(t, s.Close())

	s = reopen(keyring(t, second, first))
	outdated := func(n int) {
		t.Helper()
		require.Eventually(t, func() bool { return s.Stats().Outdated == n }, 30*time.Second,
			time.Millisecond, "%d", n)
	}
	outdated(5)
	require.Equal(t, map[string]int{"hmac-sha256:2025": 5}, s.Stats().OutdatedSchemes)
	require.Eventually(t, func() bool {
		// of a key's two secrets, one waits until the other is through
		for _, token := range tokens {
			if err := verify(t, s, token); err != nil {
				t.Error(err)
			}
		}
		return s.Stats().Changes[keystore.ActionRehash] == 5
	}, 30*time.Second, time.Millisecond)
	require.Equal(t, 5, countEvents(t, s, keystore.ActionRehash), "one for each that was replaced")
	require.NoError(t, s.Close())

	s = reopen(keyring(t, second, first))
	outdated(0)
	require.Equal(t, map[string]int{}, s.Stats().OutdatedSchemes)
	require.NoError(t, s.Close())
	s = reopen(second)
	defer func() { require.NoError(t, s.Close()) }()
	for _, token := range tokens {
		require.NoError(t, verify(t, s, token), "without the old pepper")
	}
}

// A key that is revoked while its digest waits to be replaced stays revoked.
func TestReplacedDigestCannotBringAKeyBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := pepper(t, "a", 1)
		b := newFaulty()
		s, err := keystore.New(b, &keystore.Options{Hasher: first})
		require.NoError(t, err)
		issued := create(t, s, keystore.Spec{})
		token := issued.Secret.Reveal()
		second, err := keystore.New(&unclosed{b},
			&keystore.Options{Hasher: keyring(t, hashing.SHA256(), first)})
		require.NoError(t, err)
		synctest.Wait()
		require.NoError(t, verify(t, second, token)) // now it waits for the background
		require.NoError(t, second.Revoke(t.Context(), issued.Key.ID, ""))
		synctest.Wait()
		require.ErrorIs(t, verify(t, second, token), keystore.ErrRevoked)
		key, err := second.Get(t.Context(), issued.Key.ID)
		require.NoError(t, err)
		require.Equal(t, keystore.StatusRevoked, key.Status())
		require.NoError(t, second.Close())
		require.NoError(t, s.Close())
	})
}

// An unclosed backend is closed by somebody else.
type unclosed struct{ *faulty }

func (unclosed) Close() error { return nil }

// Whoever takes another Hasher and forgets the earlier one is told why every key is refused.
func TestForgottenHasherIsLogged(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	first := create(t, s, keystore.Spec{})
	second, err := s.Rotate(t.Context(), first.Key.ID, 0)
	require.NoError(t, err)
	wrong, right := first.Secret.Reveal(), second.Secret.Reveal()
	require.NoError(t, s.Close())

	for _, tt := range []struct {
		hasher hashing.Hasher
		warns  int
	}{
		{pepper(t, "2026", 1), 1},
		{keyring(t, pepper(t, "2026", 1), hashing.SHA256()), 0},
		{hashing.SHA256(), 0},
	} {
		var out strings.Builder
		s, err := keystore.Open(dir, &keystore.Options{Hasher: tt.hasher,
			Logger: slog.New(slog.NewTextHandler(&out, nil))})
		require.NoError(t, err)
		for range 2 {
			require.ErrorIs(t, verify(t, s, wrong), keystore.ErrUnknown)
			if tt.warns > 0 {
				require.ErrorIs(t, verify(t, s, right), keystore.ErrUnknown)
			}
		}
		require.NoError(t, s.Close())
		require.Equal(t, tt.warns, strings.Count(out.String(), "use a hashing.Keyring"),
			out.String())
	}
}
