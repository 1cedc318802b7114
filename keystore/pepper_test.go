package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// pepperText is what stands in the file of a pepper.
const pepperText = "0123456789abcdef0123456789abcdef"

func pepperOf(t testing.TB, id, text string) hashing.Hasher {
	t.Helper()
	h, err := hashing.HMACSHA256(id, []byte(text))
	require.NoError(t, err)
	return h
}

// A secretive hasher is one of an application's own: it has a key, and no more methods than it
// must.
type secretive struct{ hashing.Hasher }

// Another pepper under the same id is an error of Open that says what to do. The directory can be
// opened again.
func TestAnotherPepperIsRefused(t *testing.T) {
	needsDirectory(t)
	right, wrong := pepperOf(t, "2026", pepperText), pepperOf(t, "2026", pepperText+"\n")
	next := pepperOf(t, "2027", pepperText)
	for name, tt := range map[string]struct{ first, wrong, right hashing.Hasher }{
		"alone":        {right, wrong, right},
		"in a keyring": {right, keyring(t, next, wrong), keyring(t, next, right)},
		"in a nested keyring": {right, keyring(t, next, keyring(t, hashing.SHA256(), wrong)),
			keyring(t, next, keyring(t, hashing.SHA256(), right))},
		"current in one": {keyring(t, right, next), keyring(t, wrong, hashing.SHA256()),
			right},
		"of a hasher of one's own": {
			secretive{right}, secretive{wrong}, secretive{right},
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := keystore.Open(dir, &keystore.Options{Hasher: tt.first})
			require.NoError(t, err)
			issued := create(t, s, keystore.Spec{})
			require.NoError(t, s.Disable(t.Context(), issued.Key.ID, ""))
			require.NoError(t, s.CheckIntegrity(t.Context()))
			require.NoError(t, s.Close())
			for range 2 {
				_, err = keystore.Open(dir, &keystore.Options{Hasher: tt.wrong})
				require.ErrorIs(t, err, keystore.ErrInvalid)
				require.ErrorContains(t, err, "hmac-sha256:2026")
				require.ErrorContains(t, err, "line break")
				require.NotContains(t, err.Error(), pepperText)
			}
			s, err = keystore.Open(dir, &keystore.Options{Hasher: tt.right})
			require.NoError(t, err)
			require.NoError(t, s.Enable(t.Context(), issued.Key.ID))
			require.NoError(t, verify(t, s, issued.Secret.Reveal()))
			require.NoError(t, s.Close())
		})
	}
}

// Where no key needs the pepper, another one may take its id.
func TestAPepperThatNoKeyNeedsMayChange(t *testing.T) {
	needsDirectory(t)
	for name, prepare := range map[string]func(*keystore.Store){
		"an empty store": func(*keystore.Store) {},
		"revoked keys": func(s *keystore.Store) {
			require.NoError(t, s.Revoke(t.Context(), create(t, s, keystore.Spec{}).Key.ID, ""))
		},
		"purged keys": func(s *keystore.Store) {
			require.NoError(t, s.Revoke(t.Context(), create(t, s, keystore.Spec{}).Key.ID, ""))
			_, err := s.Purge(t.Context(), time.Now())
			require.NoError(t, err)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s, err := keystore.Open(dir,
				&keystore.Options{Hasher: pepperOf(t, "a", pepperText+"\n")})
			require.NoError(t, err)
			prepare(s)
			require.NoError(t, s.Close())
			s, err = keystore.Open(dir, &keystore.Options{Hasher: pepperOf(t, "a", pepperText)})
			require.NoError(t, err)
			token := create(t, s, keystore.Spec{}).Secret.Reveal()
			require.NoError(t, s.Close())
			_, err = keystore.Open(dir,
				&keystore.Options{Hasher: pepperOf(t, "a", pepperText+"\n")})
			require.ErrorIs(t, err, keystore.ErrInvalid, "the new one has been noted down")
			s, err = keystore.Open(dir, &keystore.Options{Hasher: pepperOf(t, "a", pepperText)})
			require.NoError(t, err)
			require.NoError(t, verify(t, s, token))
			require.NoError(t, s.Close())
		})
	}
}

// checksOf returns the check values in a backend.
func checksOf(t *testing.T, b backend.Backend) (all []backend.Entry) {
	for e, err := range b.Scan(context.Background(), []byte{'h'}, []byte{'i'}) {
		require.NoError(t, err)
		all = append(all, e)
	}
	return all
}

// SHA256 has no pepper that could be another one, and a store with SHA256 is as it was.
func TestSHA256HasNoCheckValue(t *testing.T) {
	b := newFaulty()
	s, err := keystore.New(b, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	create(t, s, keystore.Spec{})
	require.Empty(t, checksOf(t, b))
	require.EqualValues(t, 1, backup(t, s)[len("grpc-api-key backup\n")])
}

// A store that lacks the check value gets one when the use of an older key has proved the pepper;
// not before, and not by a key that a wrong pepper has made.
func TestAMissingCheckValueIsWrittenAfterAProof(t *testing.T) {
	for _, bound := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b := newFaulty()
			open := func(text string) *keystore.Store {
				s, err := keystore.New(&unclosed{b},
					&keystore.Options{Hasher: pepperOf(t, "a", text)})
				require.NoError(t, err)
				return s
			}
			s := open(pepperText)
			issued := create(t, s, keystore.Spec{})
			require.NoError(t, s.Close())
			for _, e := range checksOf(t, b) {
				require.NoError(t, b.Apply(t.Context(),
					backend.Change{Key: e.Key, Expect: e.Revision, Delete: true}))
			}

			time.Sleep(time.Second)
			s = open(pepperText + "\n")
			require.ErrorIs(t, verify(t, s, issued.Secret.Reveal()), keystore.ErrUnknown)
			other := create(t, s, keystore.Spec{})
			require.NoError(t, verify(t, s, other.Secret.Reveal()))
			require.NoError(t, s.Revoke(t.Context(), other.Key.ID, ""))
			time.Sleep(2 * time.Minute)
			require.Empty(t, checksOf(t, b))
			require.NoError(t, s.Close())

			s = open(pepperText)
			time.Sleep(2 * time.Minute)
			require.Empty(t, checksOf(t, b))
			if bound {
				bind(t, s, issued.Secret.Reveal())
			} else {
				require.NoError(t, verify(t, s, issued.Secret.Reveal()))
			}
			time.Sleep(2 * time.Minute)
			require.Len(t, checksOf(t, b), 1)
			require.NoError(t, s.Close())
			_, err := keystore.New(&unclosed{b},
				&keystore.Options{Hasher: pepperOf(t, "a", pepperText+"\n")})
			require.ErrorIs(t, err, keystore.ErrInvalid)
			require.NoError(t, b.Close())
		})
	}
}

// A backup says with which peppers its keys were made. Restore refuses it where the Hasher has
// another one, before anything is changed; and the store knows them from then on.
func TestRestoreRefusesAnotherPepper(t *testing.T) {
	needsDirectory(t)
	right, wrong := pepperOf(t, "a", pepperText), pepperOf(t, "a", pepperText+"\n")
	one := open(t, &keystore.Options{Hasher: right})
	issued := create(t, one, keystore.Spec{})
	saved := backup(t, one)

	other := open(t, &keystore.Options{Hasher: keyring(t, hashing.SHA256(), wrong)})
	err := other.Restore(t.Context(), bytes.NewReader(saved))
	require.ErrorIs(t, err, keystore.ErrInvalid)
	require.ErrorContains(t, err, "the backup")
	require.ErrorContains(t, err, "hmac-sha256:a")
	require.Empty(t, all(t, other))

	dir := t.TempDir()
	third, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	restore(t, third, saved)
	restore(t, third, saved)
	require.NoError(t, third.Close())
	_, err = keystore.Open(dir, &keystore.Options{Hasher: wrong})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	third, err = keystore.Open(dir, &keystore.Options{Hasher: right})
	require.NoError(t, err)
	require.NoError(t, verify(t, third, issued.Secret.Reveal()))
	require.NoError(t, third.Close())

	// The store has a check value of another pepper, which no key needs.
	fourth, err := keystore.Open(t.TempDir(), &keystore.Options{Hasher: wrong})
	require.NoError(t, err)
	stale := backup(t, fourth)
	require.NoError(t, fourth.Close())
	dir = t.TempDir()
	fourth, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	restore(t, fourth, stale)
	restore(t, fourth, saved)
	restore(t, fourth, stale)
	require.NoError(t, fourth.Close())
	fourth, err = keystore.Open(dir, &keystore.Options{Hasher: right})
	require.NoError(t, err)
	require.NoError(t, verify(t, fourth, issued.Secret.Reveal()))
	restore(t, fourth, stale)
	require.NoError(t, fourth.Close())
	_, err = keystore.Open(dir, &keystore.Options{Hasher: wrong})
	require.ErrorIs(t, err, keystore.ErrInvalid)

	require.NoError(t, one.Revoke(t.Context(), issued.Key.ID, ""))
	restore(t, other, backup(t, one)) // no key needs the pepper
	require.ErrorIs(t, verify(t, other, issued.Secret.Reveal()), keystore.ErrDenied)
}

// A full disk, or another process that comes first, does not keep a store from being opened.
func TestACheckValueThatCannotBeWritten(t *testing.T) {
	b := newFaulty()
	fail := func(err error) { b.failApply.Store(&err) }
	fail(backend.ErrFull)
	var out strings.Builder
	s, err := keystore.New(&unclosed{b}, &keystore.Options{Hasher: pepperOf(t, "a", pepperText),
		Logger: slog.New(slog.NewTextHandler(&out, nil))})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.Contains(t, out.String(), "check value")
	fail(errors.New("boom"))
	_, err = keystore.New(&unclosed{b}, &keystore.Options{Hasher: pepperOf(t, "a", pepperText)})
	require.ErrorIs(t, err, keystore.ErrUnavailable)

	// The check value of another pepper is there, which no key needs. While it cannot be replaced,
	// the store does not open: keys that were made now would be refused later.
	b.failApply.Store(nil)
	s, err = keystore.New(&unclosed{b}, &keystore.Options{Hasher: pepperOf(t, "b", pepperText)})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	fail(backend.ErrFull)
	_, err = keystore.New(&unclosed{b},
		&keystore.Options{Hasher: pepperOf(t, "b", pepperText+"\n")})
	require.ErrorIs(t, err, syscall.ENOSPC)
	b.failApply.Store(nil)
	s, err = keystore.New(&unclosed{b},
		&keystore.Options{Hasher: keyring(t, hashing.SHA256(), pepperOf(t, "b", pepperText+"\n"))})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.Empty(t, checksOf(t, b), "of an earlier hasher: it is forgotten")

	b.Backend = &first{Backend: b.Backend, change: backend.Change{Key: []byte("hhmac-sha256:a"),
		Value: pepperOf(t, "a", pepperText).Digest("x").Sum}}
	s, err = keystore.New(&unclosed{b}, &keystore.Options{Hasher: pepperOf(t, "a", pepperText)})
	require.NoError(t, err, "no key needs what the other process wrote")
	require.NoError(t, s.Close())
	require.EqualValues(t, 2, checksOf(t, b)[0].Revision)
	require.NoError(t, b.Close())
}

// A first backend makes a change of its own before the first Apply.
type first struct {
	backend.Backend
	change backend.Change
	done   bool
}

func (f *first) Apply(ctx context.Context, c ...backend.Change) error {
	if !f.done {
		f.done = true
		if err := f.Backend.Apply(ctx, f.change); err != nil {
			return err
		}
	}
	return f.Backend.Apply(ctx, c...)
}
