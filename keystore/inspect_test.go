package keystore_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

func TestParseID(t *testing.T) {
	s := inMemory(t)
	issued := create(t, s, keystore.Spec{})
	text := issued.Secret.Reveal()
	for _, has := range []string{text, text[:len(text)-1], text[:len(text)-6] + "000000",
		"other_prefix" + text[3:]} {
		id, ok := keystore.ParseID(has)
		require.True(t, ok)
		require.Equal(t, issued.Key.ID, id)
	}
	for _, not := range []string{
		"", "x", issued.Key.ID, issued.Key.Hint, " " + text, text + "\n", text[4:], text[:40],
		"Bearer " + text,
		text[:10] + "U" + text[11:], text + string(bytes.Repeat([]byte{'x'}, 512)),
	} {
		id, ok := keystore.ParseID(not)
		require.False(t, ok)
		require.Empty(t, id)
	}
}

// rotated returns a key, and the token of the secret that a rotation has ended.
func rotated(t *testing.T, s *keystore.Store) (issued *keystore.Issued, old string) {
	first := create(t, s, keystore.Spec{})
	second, err := s.Rotate(t.Context(), first.Key.ID, 0)
	require.NoError(t, err)
	return second, first.Secret.Reveal()
}

// Inspect says of each token what Verify says, and which key it is of only if the token proves the
// secret.
func TestInspectSaysWhatVerifySays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		ctx := t.Context()
		from := keystore.WithClientAddr(ctx, netip.MustParseAddr("192.0.2.1"))
		check := func(what, text, id string, proven bool, want error) {
			t.Helper()
			got, err := s.Inspect(from, text)
			require.NoError(t, err, what)
			require.Equal(t, id, got.KeyID, what)
			if want == nil {
				require.NoError(t, got.Refusal, what)
			} else {
				require.ErrorIs(t, got.Refusal, want, what)
			}
			if proven {
				require.NotNil(t, got.Key, what)
				require.Equal(t, id, got.Key.ID, what)
				require.NoError(t, got.Key.Allow(), "it has no limiter")
			} else {
				require.Nil(t, got.Key, what)
			}
			_, err = s.Verify(from, text)
			require.Equal(t, err, got.Refusal, what)
		}
		hour := time.Now().Add(time.Hour)
		issue := func(spec keystore.Spec) (id, text string) {
			issued := create(t, s, spec)
			return issued.Key.ID, issued.Secret.Reveal()
		}
		id, text := issue(keystore.Spec{})
		check("good", text, id, true, nil)
		check("mistyped", text[:len(text)-1]+"~", "", false, keystore.ErrMalformed)
		check("no token", "x", "", false, keystore.ErrMalformed)
		require.NoError(t, s.Disable(ctx, id, ""))
		check("disabled", text, id, true, keystore.ErrDisabled)
		require.NoError(t, s.Revoke(ctx, id, ""))
		check("revoked", text, id, true, keystore.ErrRevoked)

		other := create(t, inMemory(t), keystore.Spec{})
		check("of another store", other.Secret.Reveal(), other.Key.ID, false, keystore.ErrUnknown)
		second, old := rotated(t, s)
		check("another secret", old, second.Key.ID, false, keystore.ErrUnknown)

		id, text = issue(keystore.Spec{NotBefore: hour})
		check("not yet", text, id, true, keystore.ErrNotYetValid)
		id, text = issue(keystore.Spec{AllowedNetworks: prefixes("198.51.100.0/24")})
		check("elsewhere", text, id, true, keystore.ErrNetworkNotAllowed)
		id, text = issue(keystore.Spec{AllowedNetworks: prefixes("192.0.2.0/24")})
		check("from there", text, id, true, nil)
		got, err := s.Inspect(ctx, text)
		require.NoError(t, err)
		require.ErrorIs(t, got.Refusal, keystore.ErrNetworkNotAllowed, "from nowhere")

		id, text = issue(keystore.Spec{ExpiresAt: hour})
		graceID, grace := issue(keystore.Spec{})
		_, err = s.Rotate(ctx, graceID, time.Hour)
		require.NoError(t, err)
		check("in its grace", grace, graceID, true, nil)
		time.Sleep(time.Hour)
		check("expired", text, id, true, keystore.ErrExpired)
		check("after its grace", grace, graceID, true, keystore.ErrExpired)

		// A wrong checksum of a key that the cache has: Verify finds the digest wrong, and does not
		// look further.
		id, text = issue(keystore.Spec{})
		got, err = s.Inspect(ctx, text[:len(text)-6]+"000000")
		require.NoError(t, err)
		require.Equal(t, &keystore.Inspection{KeyID: id, Refusal: keystore.ErrMalformed}, got)
	})
}

// A rate limit is looked at, and nothing is taken from it.
func TestInspectOfALimitedKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		issued := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 0.1,
			Burst: 2}})
		id, text := issued.Key.ID, issued.Secret.Reveal()
		refusal := func() error {
			for range 9 {
				_, err := s.Inspect(t.Context(), text)
				require.NoError(t, err)
			}
			got, err := s.Inspect(t.Context(), text)
			require.NoError(t, err)
			require.NotNil(t, got.Key)
			return got.Refusal
		}
		require.NoError(t, refusal(), "unused")
		require.NoError(t, verify(t, s, text))
		require.NoError(t, refusal())
		require.NoError(t, verify(t, s, text))
		var want, got *keystore.RateLimitError
		require.ErrorAs(t, verify(t, s, text), &want)
		require.ErrorAs(t, refusal(), &got)
		require.Equal(t, want, got)
		time.Sleep(want.RetryAfter - time.Nanosecond)
		require.ErrorAs(t, refusal(), &got)
		time.Sleep(time.Nanosecond)
		require.NoError(t, refusal())
		require.NoError(t, verify(t, s, text))
		require.ErrorAs(t, refusal(), &got)

		_, err := s.Update(t.Context(), id,
			func(spec *keystore.Spec) error { spec.RateLimit.PerSecond = 1; return nil })
		require.NoError(t, err)
		require.ErrorAs(t, refusal(), &got)
		require.Equal(t, time.Second, got.RetryAfter, "by the limit of now")
		_, err = s.Update(t.Context(), id,
			func(spec *keystore.Spec) error { spec.RateLimit = keystore.RateLimit{}; return nil })
		require.NoError(t, err)
		require.NoError(t, refusal(), "without a limit")
	})
}

// Inspect leaves no trace: no use, no count, no call of the Observer, nothing cached, no new
// digest, no log line.
func TestInspectHasNoEffect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, log := new(witness), new(bytes.Buffer)
		b, first := newFaulty(), pepper(t, "a", 1)
		old, err := keystore.New(&unclosed{b}, &keystore.Options{Hasher: first})
		require.NoError(t, err)
		issued := create(t, old, keystore.Spec{})
		require.NoError(t, old.Close())
		s, err := keystore.New(b, &keystore.Options{
			Hasher: keyring(t, hashing.SHA256(), first), Observer: w,
			Logger: slog.New(slog.NewTextHandler(log, nil)),
		})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		unknown := create(t, inMemory(t), keystore.Spec{})
		synctest.Wait()
		before := s.Stats()
		require.Equal(t, 1, before.Outdated)
		for _, text := range []string{issued.Secret.Reveal(), unknown.Secret.Reveal(), "nonsense"} {
			_, err := s.Inspect(t.Context(), text)
			require.NoError(t, err)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		require.Equal(t, before, s.Stats())
		require.Empty(t, w.take())
		require.Empty(t, log.String())
		require.Zero(t, lastUsed(t, s, issued.Key.ID))
		require.Len(t, events(t, s, keystore.EventQuery{}), 1, "its creation")

		// A use shows in the next Inspect.
		require.NoError(t, verify(t, s, issued.Secret.Reveal()))
		got, err := s.Inspect(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		require.Equal(t, time.Now().Truncate(time.Minute).UTC(), got.Key.LastUsedAt)
	})
}

// What the store cannot tell is an error, and no Inspection that could be taken for an admission.
func TestInspectReturnsErrorsOfTheStore(t *testing.T) {
	b := newFaulty()
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	issued := create(t, s, keystore.Spec{})
	text := issued.Secret.Reveal()
	trouble := func(want error, texts ...string) {
		t.Helper()
		for _, text := range texts {
			got, err := s.Inspect(t.Context(), text)
			require.ErrorIs(t, err, want)
			require.NotErrorIs(t, err, keystore.ErrDenied)
			require.Nil(t, got)
		}
	}
	for _, fault := range []error{errors.New("no route to disk"), keystore.ErrRevoked,
		backend.ErrConflict} {
		b.fail.Store(&fault)
		trouble(keystore.ErrUnavailable, text)
	}
	b.fail.Store(nil)
	got, err := s.Inspect(t.Context(), text)
	require.NoError(t, err)
	require.NoError(t, got.Refusal)
	encoded, err := json.Marshal(got)
	require.NoError(t, err)
	require.NotContains(t, fmt.Sprintf("%+v %#v %s", got, got.Key, encoded), text[len(text)-40:])
	require.NoError(t, s.Close())
	trouble(keystore.ErrClosed, text, "nonsense", "")
}

// A call that waits for storage is bounded, as every other is.
func TestInspectOfAHangingBackend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := withFaults(t, nil)
		issued := create(t, s, keystore.Spec{})
		b.hang.Store(true)
		begin := time.Now()
		_, err := s.Inspect(t.Context(), issued.Secret.Reveal())
		require.ErrorIs(t, err, keystore.ErrUnavailable)
		require.Equal(t, 10*time.Second, time.Since(begin))
		b.hang.Store(false)
	})
}

// Err says why nothing is served any more, and nothing else.
func TestErrSaysWhyTheStoreHasStopped(t *testing.T) {
	b := newFaulty()
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	issued := create(t, s, keystore.Spec{})
	require.NoError(t, s.Err())
	for name, passes := range map[string]error{"a full disk": backend.ErrFull,
		"no route": errors.New("no route to disk")} {
		b.fail.Store(&passes)
		require.ErrorIs(t, s.Disable(t.Context(), issued.Key.ID, ""), keystore.ErrUnavailable)
		require.NoError(t, s.Err(), name)
	}
	failed := fmt.Errorf("%w: %w", backend.ErrFailed, syscall.EIO)
	b.fail.Store(&failed)
	require.Error(t, s.Disable(t.Context(), issued.Key.ID, ""))
	b.fail.Store(nil)
	require.ErrorIs(t, s.Err(), keystore.ErrUnavailable)
	require.ErrorIs(t, s.Err(), syscall.EIO, "it says what failed")
	require.Equal(t, s.Err(), verify(t, s, issued.Secret.Reveal()), "what every call returns")
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Err(), keystore.ErrClosed)
}
