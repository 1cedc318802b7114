package keystore_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Preview of an Update returns the key that Update returns, and the error that Update returns, and
// changes nothing.
func TestPreviewIsTheUpdate(t *testing.T) {
	store, err := keystore.New(backendtest.NewMemory(),
		&keystore.Options{MaxLifetime: 100 * time.Hour})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	ctx := t.Context()
	soon := time.Now().Add(time.Hour)
	issue := func() *keystore.Key {
		issued, err := store.Create(ctx, keystore.Spec{Name: "a", ExpiresAt: soon})
		require.NoError(t, err)
		return issued.Key
	}
	revoked := issue()
	require.NoError(t, store.Revoke(ctx, revoked.ID, ""))
	mine := errors.New("mine")
	for name, tt := range map[string]struct {
		ctx    context.Context
		id     string
		change func(*keystore.Spec) error
	}{
		"a new name":    {ctx, "", func(s *keystore.Spec) error { s.Name = "b"; return nil }},
		"nothing":       {ctx, "", func(*keystore.Spec) error { return nil }},
		"its own error": {ctx, "", func(*keystore.Spec) error { return mine }},
		"no name":       {ctx, "", func(s *keystore.Spec) error { s.Name = ""; return nil }},
		"never": {ctx, "", func(s *keystore.Spec) error {
			s.ExpiresAt = time.Time{}
			return nil
		}},
		"too large": {ctx, "", func(s *keystore.Spec) error {
			s.Metadata["a"] = strings.Repeat("x", 17<<10)
			return nil
		}},
		"a nil change": {ctx, "", nil},
		"a revoked key": {ctx, revoked.ID, func(s *keystore.Spec) error {
			s.Name = "b"
			return nil
		}},
		"no such key": {ctx, "01k9x3v7q2f8hr6m5w0c4tzbnd", func(*keystore.Spec) error {
			return nil
		}},
		"no ID":             {ctx, "x", func(*keystore.Spec) error { return nil }},
		"another revision":  {keystore.IfRevision(ctx, 7), "", func(*keystore.Spec) error { return nil }},
		"the revision":      {keystore.IfRevision(ctx, 1), "", func(*keystore.Spec) error { return nil }},
		"a revision of 0":   {keystore.IfRevision(ctx, 0), "", func(*keystore.Spec) error { return nil }},
		"an actor too long": {keystore.WithActor(ctx, strings.Repeat("a", 300)), "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			key := revoked
			if tt.id == "" {
				key = issue()
				tt.id = key.ID
			}
			before, err := store.Get(ctx, key.ID)
			require.NoError(t, err)
			preview, failed := store.Preview(tt.ctx, tt.id, tt.change)
			after, err := store.Get(ctx, key.ID)
			require.NoError(t, err)
			require.Equal(t, before, after)

			updated, err := store.Update(tt.ctx, tt.id, tt.change)
			if err != nil {
				require.Error(t, failed)
				require.Equal(t, keystore.Reason(err), keystore.Reason(failed))
				require.Nil(t, preview)
				return
			}
			require.NoError(t, failed)
			require.Equal(t, updated, preview)
		})
	}
	t.Run("a closed store", func(t *testing.T) {
		closed := inMemory(t)
		require.NoError(t, closed.Close())
		_, err := closed.Preview(ctx, "", func(*keystore.Spec) error { return nil })
		require.ErrorIs(t, err, keystore.ErrClosed)
	})
}

// Preview of a Create returns the key that Create returns, without an ID, or its error.
func TestPreviewOfANewKey(t *testing.T) {
	store := inMemory(t)
	ctx := t.Context()
	want := keystore.Spec{Name: "a", Owner: "o", Scopes: []string{"s"},
		Metadata: map[string]string{"k": "v"}, RateLimit: keystore.RateLimit{PerSecond: 1, Burst: 2}}
	set := func(s keystore.Spec) func(*keystore.Spec) error {
		return func(spec *keystore.Spec) error {
			require.Zero(t, *spec)
			*spec = s
			return nil
		}
	}
	preview, err := store.Preview(ctx, "", set(want))
	require.NoError(t, err)
	issued, err := store.Create(ctx, want)
	require.NoError(t, err)
	require.Empty(t, preview.ID)
	require.Empty(t, preview.Hint)
	require.Zero(t, preview.Revision)
	require.False(t, preview.CreatedAt.IsZero())
	preview.ID, preview.Hint, preview.Revision = issued.Key.ID, issued.Key.Hint, 1
	preview.CreatedAt = issued.Key.CreatedAt
	require.Equal(t, issued.Key, preview)

	for name, spec := range map[string]keystore.Spec{
		"no name":   {},
		"the past":  {Name: "a", ExpiresAt: time.Now().Add(-time.Hour)},
		"too large": {Name: "a", Metadata: map[string]string{"a": strings.Repeat("x", 17<<10)}},
	} {
		_, err := store.Preview(ctx, "", set(spec))
		require.ErrorIs(t, err, keystore.ErrInvalid, name)
	}
	_, err = store.Preview(keystore.IfRevision(ctx, 1), "", set(want))
	require.ErrorIs(t, err, keystore.ErrInvalid)
	n, err := store.Count(ctx, keystore.Query{})
	require.NoError(t, err)
	require.Equal(t, 1, n, "only Create makes a key")
	require.EqualValues(t, 1, store.Stats().Changes[keystore.ActionCreate])
}
