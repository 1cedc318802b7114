package keystore_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/bits"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open returns a store in a directory of its own, closed at the end of the test. On a 32-bit
// system, where no directory can be opened, the store is in memory.
func open(t testing.TB, opts *keystore.Options) *keystore.Store {
	t.Helper()
	s, err := keystore.Open(t.TempDir(), opts)
	if bits.UintSize < 64 {
		require.ErrorIs(t, err, errors.ErrUnsupported)
		s, err = keystore.New(backendtest.NewMemory(), opts)
	}
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

// needsDirectory skips a test that needs a store in a directory, on a 32-bit system.
func needsDirectory(t *testing.T) {
	t.Helper()
	if bits.UintSize < 64 {
		t.Skip("SKIPPED: a 32-bit system has no store in a directory")
	}
}

// inMemory returns a store that does no I/O, for bubbles of synctest.
func inMemory(t testing.TB) *keystore.Store {
	t.Helper()
	s, err := keystore.New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	return s
}

func create(t testing.TB, s *keystore.Store, spec keystore.Spec) *keystore.Issued {
	t.Helper()
	if spec.Name == "" {
		spec.Name = "test"
	}
	issued, err := s.Create(t.Context(), spec)
	require.NoError(t, err)
	return issued
}

// parts returns what a session consists of, for tests that need it apart; nil after an error.
func parts(
	s *keystore.Session, err error,
) (context.Context, *keystore.Key, context.CancelFunc, error) {
	if err != nil {
		return nil, nil, nil, err
	}
	return s.Context(), s.Key(), s.Close, nil
}

func TestLifeOfAKey(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	ctx := t.Context()

	expires := time.Now().Add(time.Hour).UTC()
	issued, err := s.Create(ctx, keystore.Spec{
		Name: "ci", Owner: "team-a", Scopes: []string{"orders:read"},
		Metadata: map[string]string{"env": "prod"}, ExpiresAt: expires,
	})
	require.NoError(t, err)
	token := issued.Secret.Reveal()
	require.True(t, strings.HasPrefix(token, "oil_"+issued.Key.ID+"_"))

	for range 2 { // a miss, then a hit
		key, err := s.Verify(ctx, token)
		require.NoError(t, err)
		require.Equal(t, issued.Key, key)
	}
	key := issued.Key
	require.Equal(t, "ci", key.Name)
	require.Equal(t, "team-a", key.Owner)
	require.Equal(t, map[string]string{"env": "prod"}, key.Metadata())
	require.True(t, key.HasScope("orders:read"))
	require.False(t, key.HasScope("orders"))
	require.True(t, expires.Equal(key.ExpiresAt))
	require.WithinDuration(t, time.Now(), key.CreatedAt, time.Minute)
	require.EqualValues(t, 1, key.Revision)
	require.Equal(t, keystore.StatusActive, key.Status())
	require.Equal(t, "oil_"+key.ID+"_…", key.Hint)

	require.NoError(t, s.Revoke(ctx, key.ID, "leaked"))
	_, err = s.Verify(ctx, token)
	require.ErrorIs(t, err, keystore.ErrRevoked)
	require.ErrorIs(t, err, keystore.ErrDenied)
	require.NoError(t, s.Revoke(ctx, key.ID, "again"))

	require.NoError(t, s.Close())
	s, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Verify(ctx, token)
	require.ErrorIs(t, err, keystore.ErrRevoked)
	got, err := s.Get(ctx, key.ID)
	require.NoError(t, err)
	require.Equal(t, keystore.StatusRevoked, got.Status())
	require.Equal(t, "leaked", got.RevokeReason, "the first reason stays")
	require.EqualValues(t, 2, got.Revision)
	require.WithinDuration(t, time.Now(), got.RevokedAt, time.Minute)
}

// What the caller keeps is not what the store keeps.
func TestSpecIsCopied(t *testing.T) {
	s := open(t, nil)
	scopes, metadata := []string{"a"}, map[string]string{"k": "v"}
	issued := create(t, s, keystore.Spec{Scopes: scopes, Metadata: metadata})
	scopes[0], metadata["k"] = "admin", "changed"
	require.Equal(t, []string{"a"}, issued.Key.Scopes())
	require.Equal(t, map[string]string{"k": "v"}, issued.Key.Metadata())
}

func TestDeniedTokens(t *testing.T) {
	s := open(t, nil)
	token := create(t, s, keystore.Spec{}).Secret.Reveal()
	other := create(t, open(t, nil), keystore.Spec{}).Secret.Reveal()
	verify := func(text string) error {
		_, err := s.Verify(t.Context(), text)
		return err
	}

	t.Run("of another store", func(t *testing.T) {
		require.ErrorIs(t, verify(other), keystore.ErrUnknown)
	})
	t.Run("malformed", func(t *testing.T) {
		for _, text := range []string{
			"", " ", "Bearer", token + " ", " " + token, token + "\n", token + "x", "x" + token +
				"x", strings.ToUpper(token),
			strings.Repeat("a", 513), "oil_" + strings.Repeat("a", 600), "höl" + token[3:], token +
				"é", token + "\x00", "\xff\xfe",
			strings.Replace(token, "oil_", "_", 1), strings.Replace(token, "oil_", "", 1),
		} {
			require.ErrorIs(t, verify(text), keystore.ErrMalformed)
		}
	})
	// Cold, where the checksum says so, and cached, where the digest does.
	for _, cached := range []bool{false, true} {
		if cached {
			require.NoError(t, verify(token))
		}
		t.Run(fmt.Sprintf("one character changed, cached %v", cached), func(t *testing.T) {
			for i := range token {
				for _, c := range []byte{'0', 'a', 'Z', '_', ' ', 0, 0xff} {
					if token[i] == c {
						continue
					}
					changed := []byte(token)
					changed[i] = c
					require.ErrorIs(t, verify(string(changed)), keystore.ErrDenied, "position %d",
						i)
				}
			}
		})
		t.Run(fmt.Sprintf("cut off, cached %v", cached), func(t *testing.T) {
			for i := range token {
				require.ErrorIs(t, verify(token[:i]), keystore.ErrDenied)
				if i > 0 {
					require.ErrorIs(t, verify(token[i:]), keystore.ErrDenied)
				}
			}
		})
	}
	require.NoError(t, verify(token), "and the key itself goes on working")
}

func TestErrorsDoNotHoldTheToken(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{})
	token := issued.Secret.Reveal()
	secret := token[strings.LastIndexByte(token, '_')+1:]
	for _, err := range []error{
		s.Revoke(t.Context(), token, ""),
		s.Revoke(t.Context(), secret, ""),
		func() error { _, err := s.Get(t.Context(), token); return err }(),
		func() error { _, err := s.Verify(t.Context(), token+"x"); return err }(),
		func() error { _, err := s.Verify(t.Context(), token[:len(token)-1]); return err }(),
	} {
		require.Error(t, err)
		require.False(t, strings.Contains(err.Error(), secret[:8]), "the error quotes the secret")
	}
}

func TestSecretRedactsItself(t *testing.T) {
	issued := create(t, open(t, nil), keystore.Spec{})
	token := issued.Secret.Reveal()
	secret := token[strings.LastIndexByte(token, '_')+1:]
	hidden := struct {
		inner struct{ issued keystore.Issued }
	}{}
	hidden.inner.issued = *issued

	var out strings.Builder
	for _, v := range []any{issued.Secret, &issued.Secret, issued, *issued, hidden, &hidden,
		[]keystore.Secret{issued.Secret}, map[string]any{"k": issued}} {
		for _, verb := range "vsqxXdobcUeEfFgGtTp" {
			for _, flag := range []string{"", "+", "#", "-", " ", "0"} {
				fmt.Fprintf(&out, "%"+flag+string(verb)+"\n", v)
			}
		}
		b, err := json.Marshal(v)
		require.NoError(t, err)
		out.Write(b)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("m", "v", v)
		slog.New(slog.NewTextHandler(&out, nil)).Info("m", "v", v)
		fmt.Fprintln(&out, fmt.Errorf("wrapped: %v", v))
	}
	text, err := issued.Secret.MarshalText()
	require.NoError(t, err)
	out.Write(text)
	require.False(t, strings.Contains(out.String(), secret[:8]), "the secret was printed")
	require.False(t, strings.Contains(out.String(), fmt.Sprintf("%x", secret[:8])),
		"the secret was printed in hex")
	require.Contains(t, out.String(), issued.Key.Hint)

	var zero keystore.Secret
	require.Empty(t, zero.Reveal())
	require.Empty(t, zero.String())
}

func TestCreateRefuses(t *testing.T) {
	s := open(t, nil)
	long := strings.Repeat("x", 10<<10)
	for name, spec := range map[string]keystore.Spec{
		"an empty name":              {},
		"a blank name":               {Name: " \t"},
		"a name of 10 kB":            {Name: long},
		"a name of several lines":    {Name: "a\nb"},
		"a name that is not UTF-8":   {Name: "\xff"},
		"an owner of 10 kB":          {Name: "n", Owner: long},
		"10,000 scopes":              {Name: "n", Scopes: slices.Repeat([]string{"s"}, 10000)},
		"an empty scope":             {Name: "n", Scopes: []string{""}},
		"a scope with a space":       {Name: "n", Scopes: []string{"a b"}},
		"a star behind no separator": {Name: "n", Scopes: []string{"orders*"}},
		"a star inside":              {Name: "n", Scopes: []string{"orders:*:read"}},
		"a long scope":               {Name: "n", Scopes: []string{long}},
		"metadata beyond the limit": {Name: "n",
			Metadata: map[string]string{"k": strings.Repeat("x", 20<<10)}},
		"metadata that is not UTF-8": {Name: "n", Metadata: map[string]string{"k": "\xff"}},
		"an expiry in the past":      {Name: "n", ExpiresAt: time.Now().Add(-time.Second)},
		"an expiry beyond all limits": {Name: "n", ExpiresAt: time.Date(9999, 1, 1, 0, 0, 0, 0,
			time.UTC)},
	} {
		t.Run(name, func(t *testing.T) {
			issued, err := s.Create(t.Context(), spec)
			require.ErrorIs(t, err, keystore.ErrInvalid)
			require.NotErrorIs(t, err, keystore.ErrDenied)
			require.Nil(t, issued)
			require.Less(t, len(err.Error()), 250, "the error does not repeat what is too long")
		})
	}
	for range s.List(t.Context(), keystore.Query{}) {
		require.Fail(t, "something was written")
	}
	create(t, s, keystore.Spec{Name: strings.Repeat("x", 256), Scopes: slices.Repeat([]string{"s"},
		256)})
}

func TestOptionsThatCannotBeUsed(t *testing.T) {
	for name, opts := range map[string]*keystore.Options{
		"prefix":        {Prefix: "_x"},
		"short secret":  {SecretLength: 21},
		"negative":      {SecretLength: -1},
		"weak secret":   {SecretLength: 22, SecretCharset: "0123456789"},
		"small charset": {SecretCharset: "abc"},
		"long token":    {SecretLength: 1000},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir() + "/new"
			_, err := keystore.Open(dir, opts)
			require.ErrorIs(t, err, keystore.ErrInvalid)
			require.NoDirExists(t, dir, "nothing was made")
		})
	}
	_, err := keystore.New(nil, nil)
	require.ErrorIs(t, err, keystore.ErrInvalid)
}

// Keys that were issued under other options stay valid.
func TestKeysStayValidUnderOtherOptions(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	var tokens []string
	for _, opts := range []*keystore.Options{
		nil,
		{Prefix: "my_api", SecretLength: 32},
		{SecretCharset: keystore.Hex},
		{SecretCharset: keystore.ASCII50, CacheSize: -1},
		{SecretCharset: "0123456789", SecretLength: 40, CacheSize: 1},
	} {
		s, err := keystore.Open(dir, opts)
		require.NoError(t, err)
		tokens = append(tokens, create(t, s, keystore.Spec{}).Secret.Reveal())
		for range 2 {
			for _, token := range tokens {
				_, err := s.Verify(t.Context(), token)
				require.NoError(t, err)
			}
		}
		require.NoError(t, s.Close())
	}
	require.True(t, strings.HasPrefix(tokens[1], "my_api_"))
}

// saltless is a hasher of a user's own, standing for any.
type reversed struct{}

func (reversed) Digest(token string) hashing.Digest {
	return hashing.Digest{Scheme: "reversed", Sum: hashing.SHA256().Digest("reversed" + token).Sum}
}

func (r reversed) Match(d hashing.Digest, token string) hashing.Result {
	if d.Scheme != "reversed" {
		return hashing.Mismatch
	}
	return hashing.SHA256().Match(hashing.Digest{Scheme: "sha256", Sum: d.Sum}, "reversed"+token)
}

func TestHashers(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	peppered, err := hashing.HMACSHA256("2026", []byte("0123456789abcdef0123456789abcdef"))
	require.NoError(t, err)
	s, err := keystore.Open(dir, &keystore.Options{Hasher: peppered})
	require.NoError(t, err)
	token := create(t, s, keystore.Spec{}).Secret.Reveal()
	require.NoError(t, s.Close())

	s, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	_, err = s.Verify(t.Context(), token)
	require.ErrorIs(t, err, keystore.ErrUnknown, "without its pepper a key is unknown")
	require.NoError(t, s.Close())

	ring, err := hashing.Keyring(reversed{}, peppered)
	require.NoError(t, err)
	s, err = keystore.Open(dir, &keystore.Options{Hasher: ring})
	require.NoError(t, err)
	defer s.Close()
	newer := create(t, s, keystore.Spec{}).Secret.Reveal()
	for _, token := range []string{token, newer, token, newer} {
		_, err = s.Verify(t.Context(), token)
		require.NoError(t, err)
	}
}

func TestExpiryIsCheckedOnEveryHit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		token := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Minute)}).Secret.Reveal()
		time.Sleep(time.Minute - time.Nanosecond)
		key, err := s.Verify(t.Context(), token)
		require.NoError(t, err)
		require.Equal(t, keystore.StatusActive, key.Status())
		time.Sleep(time.Nanosecond)
		require.EqualValues(t, 1, s.Stats().Cached)
		_, err = s.Verify(t.Context(), token)
		require.ErrorIs(t, err, keystore.ErrExpired)
		require.Equal(t, keystore.StatusExpired, key.Status())
		_, err = s.Bind(t.Context(), token)
		require.ErrorIs(t, err, keystore.ErrExpired)
		require.Zero(t, s.Stats().Live)
	})
}

func TestBindEndsWithTheKey(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{})
	var bounds []context.Context
	for range 3 { // a miss, then hits
		bound, key, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		require.NoError(t, err)
		defer release()
		require.Equal(t, issued.Key, key)
		require.NoError(t, bound.Err())
		bounds = append(bounds, bound)
	}
	other, _, release, err := parts(s.Bind(t.Context(),
		create(t, s, keystore.Spec{}).Secret.Reveal()))
	require.NoError(t, err)
	require.Equal(t, 4, s.Stats().Live)

	require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
	for _, bound := range bounds {
		require.ErrorIs(t, context.Cause(bound), keystore.ErrRevoked)
	}
	require.NoError(t, other.Err(), "that of another key goes on")
	require.Equal(t, 1, s.Stats().Live)
	release()
	require.Equal(t, context.Canceled, context.Cause(other))
	release()
	require.Zero(t, s.Stats().Live)

	_, err = s.Bind(t.Context(), issued.Secret.Reveal())
	require.ErrorIs(t, err, keystore.ErrRevoked)
	for range 2 {
		_, err = s.Bind(t.Context(), issued.Secret.Reveal()+"x")
		require.ErrorIs(t, err, keystore.ErrDenied)
	}
	require.Zero(t, s.Stats().Live, "what was denied is not kept")
}

func TestBindEndsAtExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		token := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)}).Secret.Reveal()
		bound, _, release, err := parts(s.Bind(t.Context(), token))
		require.NoError(t, err)
		defer release()
		time.Sleep(time.Hour - time.Nanosecond)
		synctest.Wait()
		require.NoError(t, bound.Err())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.ErrorIs(t, context.Cause(bound), keystore.ErrExpired)
	})
}

func TestBindEndsWithItsParent(t *testing.T) {
	s := open(t, nil)
	token := create(t, s, keystore.Spec{}).Secret.Reveal()
	parent, cancel := context.WithCancel(t.Context())
	bound, _, release, err := parts(s.Bind(parent, token))
	require.NoError(t, err)
	cancel()
	require.ErrorIs(t, context.Cause(bound), context.Canceled)
	release()
	require.Zero(t, s.Stats().Live)
}

func TestList(t *testing.T) {
	s := open(t, nil)
	const n = 600 // more than a page of the backend's
	var ids []string
	for i := range n {
		spec := keystore.Spec{Name: fmt.Sprint(i), Owner: []string{"even", "odd"}[i%2]}
		ids = append(ids, create(t, s, spec).Key.ID)
	}
	for i := 0; i < n; i += 3 {
		require.NoError(t, s.Revoke(t.Context(), ids[i], ""))
	}
	list := func(q keystore.Query) (got []string) {
		for key, err := range s.List(t.Context(), q) {
			require.NoError(t, err)
			got = append(got, key.ID)
		}
		return got
	}
	pick := func(want func(i int) bool) (picked []string) {
		for i, id := range ids {
			if want(i) {
				picked = append(picked, id)
			}
		}
		return picked
	}
	require.Equal(t, ids, list(keystore.Query{}), "in the order of creation")
	require.Equal(t, pick(func(i int) bool { return i%2 == 1 }), list(keystore.Query{Owner: "odd"}))
	require.Equal(t, pick(func(i int) bool { return i%3 == 0 }),
		list(keystore.Query{Status: keystore.StatusRevoked}))
	require.Equal(t, pick(func(i int) bool { return i%3 != 0 && i%2 == 0 }),
		list(keystore.Query{Status: keystore.StatusActive, Owner: "even"}))
	require.Empty(t, list(keystore.Query{Owner: "nobody"}))
	require.Empty(t, list(keystore.Query{Cursor: ids[n-1]}))

	var paged []string
	for q := (keystore.Query{Limit: 7}); ; q.Cursor = paged[len(paged)-1] {
		page := list(q)
		paged = append(paged, page...)
		if len(page) < q.Limit {
			break
		}
	}
	require.Equal(t, ids, paged)

	seen := 0
	for key, err := range s.List(t.Context(), keystore.Query{}) {
		require.NoError(t, err)
		_, err = s.Get(t.Context(), key.ID) // the body may use the store
		require.NoError(t, err)
		if seen++; seen == 3 {
			break
		}
	}
	for _, err := range s.List(t.Context(), keystore.Query{Cursor: "nonsense"}) {
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
}

func TestUnknownAndUnusableIDs(t *testing.T) {
	s := open(t, nil)
	elsewhere := create(t, open(t, nil), keystore.Spec{})
	_, err := s.Get(t.Context(), elsewhere.Key.ID)
	require.ErrorIs(t, err, keystore.ErrNotFound)
	require.ErrorIs(t, s.Revoke(t.Context(), elsewhere.Key.ID, ""), keystore.ErrNotFound)
	for _, id := range []string{"", "x", strings.ToUpper(elsewhere.Key.ID),
		elsewhere.Secret.Reveal(), elsewhere.Key.Hint, strings.Repeat("x", 10000)} {
		_, err := s.Get(t.Context(), id)
		require.ErrorIs(t, err, keystore.ErrInvalid)
		require.ErrorIs(t, s.Revoke(t.Context(), id, ""), keystore.ErrInvalid)
	}
	issued := create(t, s, keystore.Spec{})
	require.ErrorIs(t, s.Revoke(t.Context(), issued.Key.ID, strings.Repeat("x", 1025)),
		keystore.ErrInvalid)
	require.ErrorIs(t, s.Revoke(t.Context(), issued.Key.ID, "\xff"), keystore.ErrInvalid)
	_, err = s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
}

func TestCancelledContext(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{})
	_, err := s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(keystore.ErrRevoked) // a cause that must not pass for an answer
	for name, err := range everyCall(ctx, s, issued) {
		require.ErrorIs(t, err, context.Canceled, name)
		require.NotErrorIs(t, err, keystore.ErrDenied, name)
		require.NotErrorIs(t, err, keystore.ErrUnavailable, name)
	}
	_, err = s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err, "nothing was changed")
}

// backupOfOne is a backup of a store with one key.
var backupOfOne = sync.OnceValue(func() string {
	s, err := keystore.New(backendtest.NewMemory(), nil)
	if err != nil {
		panic(err)
	}
	defer s.Close()
	if _, err := s.Create(context.Background(), keystore.Spec{Name: "elsewhere"}); err != nil {
		panic(err)
	}
	var b strings.Builder
	if err := s.Backup(context.Background(), &b); err != nil {
		panic(err)
	}
	return b.String()
})

// everyCall calls every method that takes a context.
func everyCall(ctx context.Context, s *keystore.Store, issued *keystore.Issued) map[string]error {
	errs := make(map[string]error)
	_, errs["Verify"] = s.Verify(ctx, issued.Secret.Reveal())
	_, errs["Bind"] = s.Bind(ctx, issued.Secret.Reveal())
	_, errs["Create"] = s.Create(ctx, keystore.Spec{Name: "n"})
	_, errs["Get"] = s.Get(ctx, issued.Key.ID)
	_, errs["Inspect"] = s.Inspect(ctx, issued.Secret.Reveal())
	errs["Revoke"] = s.Revoke(ctx, issued.Key.ID, "")
	for _, err := range s.List(ctx, keystore.Query{}) {
		errs["List"] = errors.Join(errs["List"], err)
	}
	_, errs["Count"] = s.Count(ctx, keystore.Query{})
	for _, err := range s.Events(ctx, keystore.EventQuery{}) {
		errs["Events"] = errors.Join(errs["Events"], err)
	}
	_, errs["Rotate"] = s.Rotate(ctx, issued.Key.ID, time.Hour)
	_, errs["Update"] = s.Update(ctx, issued.Key.ID,
		func(spec *keystore.Spec) error { spec.Name = "m"; return nil })
	errs["Disable"] = s.Disable(ctx, issued.Key.ID, "")
	errs["Enable"] = s.Enable(ctx, issued.Key.ID)
	_, errs["RevokeAll"] = s.RevokeAll(ctx, keystore.Query{}, "",
		&keystore.RevokeAllOptions{All: true})
	_, errs["Purge"] = s.Purge(ctx, time.Now().Add(-time.Hour))
	errs["Backup"] = s.Backup(ctx, io.Discard)
	errs["Restore"] = s.Restore(ctx, strings.NewReader(backupOfOne()))
	return errs
}

func TestAfterClose(t *testing.T) {
	needsDirectory(t)
	s, err := keystore.Open(t.TempDir(), nil)
	require.NoError(t, err)
	issued := create(t, s, keystore.Spec{})
	bound, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
	require.NoError(t, err)
	defer release()

	require.NoError(t, s.Close())
	require.ErrorIs(t, context.Cause(bound), keystore.ErrClosed, "nobody could revoke it any more")
	require.NoError(t, s.Close())
	for name, err := range everyCall(t.Context(), s, issued) {
		require.ErrorIs(t, err, keystore.ErrClosed, name)
		require.NotErrorIs(t, err, keystore.ErrDenied, name)
	}
	s.Stats()
}

func TestCloseDuringCalls(t *testing.T) {
	needsDirectory(t)
	for range 20 {
		s, err := keystore.Open(t.TempDir(), nil)
		require.NoError(t, err)
		var wg sync.WaitGroup
		started := make(chan struct{}, 8)
		for range 8 {
			issued := create(t, s, keystore.Spec{})
			wg.Go(func() {
				started <- struct{}{}
				for {
					for name, err := range everyCall(context.Background(), s, issued) {
						if errors.Is(err, keystore.ErrClosed) {
							return
						}
						denied := errors.Is(err, keystore.ErrRevoked) ||
							errors.Is(err, keystore.ErrKeyRevoked)
						if err != nil && !denied {
							t.Errorf("%s: %v", name, err)
							return
						}
					}
				}
			})
		}
		for range 8 {
			<-started
		}
		require.NoError(t, s.Close())
		wg.Wait()
		require.Zero(t, s.Stats().Live)
	}
}

func TestLoggerGetsChangesAndNoSecrets(t *testing.T) {
	var out syncBuilder
	s := open(t, &keystore.Options{Logger: slog.New(slog.NewTextHandler(&out,
		&slog.HandlerOptions{Level: slog.LevelDebug}))})
	issued := create(t, s, keystore.Spec{Name: "ci"})
	token := issued.Secret.Reveal()
	_, _ = s.Verify(t.Context(), token)
	_, _ = s.Verify(t.Context(), token+"x")
	require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
	text := out.String()
	require.Contains(t, text, "action=create")
	require.Contains(t, text, "status=revoked")
	require.Contains(t, text, issued.Key.ID)
	require.False(t, strings.Contains(text, token[strings.LastIndexByte(token, '_')+1:][:8]),
		"the secret was logged")
}

type syncBuilder struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *syncBuilder) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuilder) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
