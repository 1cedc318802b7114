package keystore_test

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// hiddenCharacters do not show, or change how others show.
var hiddenCharacters = []rune{
	'\n', '\r', '\t', 0, 0x1b, 0x7f, 0x80, 0x85, 0x9b, 0xad, 0x61c, 0x200b, 0x200c, 0x200d, 0x200e,
	0x200f, 0x2028, 0x2029,
	0x202a, 0x202b, 0x202c, 0x202d, 0x202e, 0x2060, 0x2066, 0x2067, 0x2068, 0x2069, 0xfeff, 0xe0041,
}

// What describes a key does not hide anything.
func TestHiddenCharactersAreRefused(t *testing.T) {
	s := inMemory(t)
	issued := create(t, s, keystore.Spec{})
	for _, r := range hiddenCharacters {
		text := "a" + string(r) + "b"
		for field, spec := range map[string]keystore.Spec{
			"Spec.Name":     {Name: text},
			"Spec.Owner":    {Name: "n", Owner: text},
			"Spec.Scopes":   {Name: "n", Scopes: []string{text}},
			"Spec.Metadata": {Name: "n", Metadata: map[string]string{text: "v"}},
		} {
			_, err := s.Create(t.Context(), spec)
			require.ErrorIs(t, err, keystore.ErrInvalid, "%s %U", field, r)
			require.ErrorContains(t, err, field)
			require.NotContains(t, err.Error(), string(r))
			_, err = s.Update(t.Context(), issued.Key.ID,
				func(change *keystore.Spec) error { *change = spec; return nil })
			require.ErrorIs(t, err, keystore.ErrInvalid, "%s %U", field, r)
		}
		_, err := s.Create(t.Context(),
			keystore.Spec{Name: "n", Metadata: map[string]string{"k": text}})
		if strings.ContainsRune("\n\r\t", r) {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, keystore.ErrInvalid, "%U", r)
		}
	}
	for _, text := range []string{"Zoë 山田 太郎", "עברית", "naïve – “quoted”", "🔑", "a\u00a0b",
		"a\u3000b"} {
		create(t, s, keystore.Spec{Name: text, Owner: text,
			Metadata: map[string]string{text: text}})
	}
}

// A change does not fail for the look of its reason or its actor: these are stored, and logged,
// escaped.
func TestHiddenCharactersOfAChangeAreEscaped(t *testing.T) {
	var out strings.Builder
	s, err := keystore.New(backendtest.NewMemory(),
		&keystore.Options{Logger: slog.New(slog.NewJSONHandler(&out, nil))})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	reason, actor := "one\ntwo", "al\u202eice"
	for _, r := range hiddenCharacters {
		reason += string(r)
	}
	ctx := keystore.WithActor(t.Context(), actor)
	check := func(text string) {
		t.Helper()
		require.NotEmpty(t, text)
		for _, r := range hiddenCharacters {
			require.NotContains(t, text, string(r), "%U", r)
		}
	}
	for name, revoke := range map[string]func(id string) error{
		"Revoke": func(id string) error { return s.Revoke(ctx, id, reason) },
		"RevokeAll": func(id string) error {
			_, err := s.RevokeAll(ctx, keystore.Query{Owner: id}, reason, nil)
			return err
		},
	} {
		out.Reset()
		issued := create(t, s, keystore.Spec{})
		id := issued.Key.ID
		_, err := s.Update(ctx, id, func(spec *keystore.Spec) error { spec.Owner = id; return nil })
		require.NoError(t, err)
		require.NoError(t, s.Disable(ctx, id, reason))
		require.NoError(t, revoke(id), name)
		key, err := s.Get(ctx, id)
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(key.RevokeReason, `one\ntwo`), key.RevokeReason)
		require.Contains(t, key.RevokeReason, `\x1b`)
		require.Contains(t, key.RevokeReason, `\u202e`)
		check(key.RevokeReason)
		check(key.DisableReason)
		all := events(t, s, keystore.EventQuery{KeyID: id})
		last := all[len(all)-1]
		require.Equal(t, key.RevokeReason, last.Reason)
		require.Equal(t, `al\u202eice`, last.Actor)
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		var line struct{ Action, Reason, Actor, Status string }
		require.NoError(t, json.Unmarshal([]byte(lines[len(lines)-1]), &line))
		require.Equal(t, "revoke", line.Action)
		require.Equal(t, key.RevokeReason, line.Reason, "the line of a revocation has its reason")
		require.Equal(t, last.Actor, line.Actor)
		require.Equal(t, "revoked", line.Status)
	}
}

// A text is as long after the escaping as it may be before, and no escape is cut in half.
func TestEscapedTextsAreCut(t *testing.T) {
	s := inMemory(t)
	for _, r := range []string{"\n", "\u202e", "\U000e0041", "\x1bx", "xy\u0085"} {
		for n := 1000; n <= 1024; n++ {
			reason := strings.Repeat(r, n)[:n]
			for !utf8.ValidString(reason) {
				reason = reason[:len(reason)-1]
			}
			id := create(t, s, keystore.Spec{}).Key.ID
			require.NoError(t, s.Revoke(t.Context(), id, reason))
			key, err := s.Get(t.Context(), id)
			require.NoError(t, err)
			require.LessOrEqual(t, len(key.RevokeReason), 1024)
			require.True(t, utf8.ValidString(key.RevokeReason))
			whole := strings.TrimSuffix(key.RevokeReason, "…")
			require.Less(t, len(whole), 1024)
			require.Contains(t, reason, unescaped(t, whole))
		}
	}
	id := create(t, s, keystore.Spec{}).Key.ID
	require.ErrorIs(t, s.Revoke(t.Context(), id, strings.Repeat("\n", 1025)), keystore.ErrInvalid)
	require.ErrorIs(t, s.Revoke(t.Context(), id, "\n\xff"), keystore.ErrInvalid)
	ctx := keystore.WithActor(t.Context(), strings.Repeat("\n", 256))
	require.NoError(t, s.Revoke(ctx, id, ""))
}

func unescaped(t *testing.T, text string) (plain string) {
	t.Helper()
	_, err := fmt.Sscanf(`"`+text+`"`, "%q", &plain)
	require.NoError(t, err)
	return plain
}
