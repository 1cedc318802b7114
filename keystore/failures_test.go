package keystore_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// What is asked of keys that are not there, not keys, or dead, and in too many words: a named
// error, and nothing done. For a cancelled context, a closed store and a failing one see everyCall;
// for a race that is lost, TestConcurrentUpdates.
func TestCallsThatCannotSucceedReturnNamedErrors(t *testing.T) {
	s := open(t, nil)
	dead := create(t, s, keystore.Spec{}).Key.ID
	require.NoError(t, s.Revoke(t.Context(), dead, "first"))
	alive := create(t, s, keystore.Spec{}).Key.ID
	ctx := t.Context()
	long := strings.Repeat("x", 2000)
	calls := map[string]func(id, text string) error{
		"Revoke":  func(id, text string) error { return s.Revoke(ctx, id, text) },
		"Disable": func(id, text string) error { return s.Disable(ctx, id, text) },
		"Enable":  func(id, _ string) error { return s.Enable(ctx, id) },
		"Rotate":  func(id, _ string) error { _, err := s.Rotate(ctx, id, time.Hour); return err },
		"Update": func(id, text string) error {
			_, err := s.Update(ctx, id,
				func(spec *keystore.Spec) error { spec.Name += text; return nil })
			return err
		},
		"Get": func(id, _ string) error { _, err := s.Get(ctx, id); return err },
	}
	absent := create(t, open(t, nil), keystore.Spec{}).Key.ID
	for name, call := range calls {
		require.ErrorIs(t, call(absent, "r"), keystore.ErrNotFound, name)
		require.ErrorIs(t, call("no id", "r"), keystore.ErrInvalid, name)
		require.ErrorIs(t, call("", "r"), keystore.ErrInvalid, name)
		switch name {
		case "Get", "Revoke": // a second revocation changes nothing
			require.NoError(t, call(dead, "second"), name)
		default:
			err := call(dead, "r")
			require.ErrorIs(t, err, keystore.ErrKeyRevoked, name)
			require.NotErrorIs(t, err, keystore.ErrDenied, "%s: the caller is not refused", name)
			require.NotErrorIs(t, err, keystore.ErrRevoked, name)
			require.Equal(t, "key_revoked", keystore.Reason(err))
		}
		switch name {
		case "Revoke", "Disable", "Update":
			require.ErrorIs(t, call(alive, long), keystore.ErrInvalid, name)
			require.ErrorIs(t, call(alive, "\xff"), keystore.ErrInvalid, name)
		}
	}
	_, err := s.RevokeAll(ctx, keystore.Query{}, long, &keystore.RevokeAllOptions{All: true})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	_, err = s.Rotate(ctx, alive, -time.Second)
	require.ErrorIs(t, err, keystore.ErrInvalid)
	_, err = s.Update(ctx, alive, nil)
	require.ErrorIs(t, err, keystore.ErrInvalid)
	_, err = s.Purge(ctx, time.Now().Add(time.Hour))
	require.ErrorIs(t, err, keystore.ErrInvalid, "in the future")
	require.ErrorIs(t, s.Backup(ctx, nil), keystore.ErrInvalid)
	require.ErrorIs(t, s.Restore(ctx, nil), keystore.ErrInvalid)

	key, err := s.Get(ctx, dead)
	require.NoError(t, err)
	require.Equal(t, "first", key.RevokeReason)
	key, err = s.Get(ctx, alive)
	require.NoError(t, err)
	require.EqualValues(t, 1, key.Revision)
	require.Equal(t, keystore.StatusActive, key.Status())
}

// What an error says of a call names the call and the key, and repeats nothing that may be a
// secret.
func TestErrorTexts(t *testing.T) {
	s := inMemory(t)
	ctx := t.Context()
	issued := create(t, s, keystore.Spec{})
	id, token := issued.Key.ID, issued.Secret.Reveal()
	absent := create(t, inMemory(t), keystore.Spec{}).Key.ID
	require.NoError(t, s.Revoke(ctx, id, ""))
	require.EqualError(t, s.Revoke(ctx, absent, ""), "keystore: revoke: there is no key "+absent)
	_, err := s.Get(ctx, absent)
	require.EqualError(t, err, "keystore: get: there is no key "+absent)
	_, err = s.Rotate(ctx, id, 0)
	require.EqualError(t, err, "keystore: rotate: key "+id+" is revoked")
	require.EqualError(t, s.Enable(ctx, id), "keystore: enable: key "+id+" is revoked")
	require.EqualError(t, s.Disable(ctx, id, ""), "keystore: disable: key "+id+" is revoked")

	const rule = " is no key ID: an ID has 26 characters of 0-9 and a-z without i, l, o and u"
	require.EqualError(t, s.Revoke(ctx, "01M87", ""), `keystore: invalid argument: "01M87"`+rule)
	require.EqualError(t, s.Revoke(ctx, token[40:], ""), `keystore: invalid argument: this`+rule)
	for _, err := range s.List(ctx, keystore.Query{Cursor: "x"}) {
		require.EqualError(t, err, `keystore: invalid argument: Query.Cursor: "x"`+rule)
	}
	for _, text := range []string{token, issued.Key.Hint} {
		err := s.Revoke(ctx, text, "")
		require.ErrorContains(t, err, "the 26 characters between its last two underscores")
		require.NotContains(t, err.Error(), id)
	}
	saved := backup(t, s)
	err = s.Restore(ctx, bytes.NewReader(saved[:len(saved)-1]))
	require.ErrorIs(t, err, keystore.ErrCorrupt)
	require.EqualError(t, err, "keystore: restore: the backup is damaged: it is cut off; nothing "+
		"was changed")
}
