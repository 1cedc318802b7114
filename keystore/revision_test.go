package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// changesOfOneKey has the calls that honour IfRevision. Each call changes an active key, except
// Enable, which needs a disabled key.
var changesOfOneKey = map[string]func(ctx context.Context, s *keystore.Store, id string) error{
	"Update": func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Update(ctx, id,
			func(spec *keystore.Spec) error { spec.Name += "x"; return nil })
		return err
	},
	"Rotate": func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Rotate(ctx, id, time.Hour)
		return err
	},
	"Revoke": func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Revoke(ctx, id, "r")
	},
	"Disable": func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Disable(ctx, id, "r")
	},
	"Enable": func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Enable(ctx, id)
	},
}

func TestIfRevision(t *testing.T) {
	for name, change := range changesOfOneKey {
		t.Run(name, func(t *testing.T) {
			s := inMemory(t)
			ctx := t.Context()
			issued := create(t, s, keystore.Spec{})
			id := issued.Key.ID
			live := bind(t, s, issued.Secret.Reveal())
			if name == "Enable" {
				require.NoError(t, s.Disable(ctx, id, ""))
			}
			_, err := s.Update(ctx, id,
				func(spec *keystore.Spec) error { spec.Owner = "o"; return nil })
			require.NoError(t, err)
			before, err := s.Get(ctx, id)
			require.NoError(t, err)
			seen := len(events(t, s, keystore.EventQuery{}))

			for _, wrong := range []uint64{1, before.Revision - 1, before.Revision + 1, 1 << 63} {
				err := change(keystore.IfRevision(ctx, wrong), s, id)
				require.ErrorIs(t, err, keystore.ErrConflict)
				require.NotErrorIs(t, err, keystore.ErrDenied)
				require.Equal(t, "conflict", keystore.Reason(err))
				require.ErrorContains(t, err,
					fmt.Sprintf("key %s has changed: its revision is %d, and not %d",
						id, before.Revision, wrong))
			}
			require.ErrorIs(t, change(keystore.IfRevision(ctx, 0), s, id), keystore.ErrInvalid)
			absent := create(t, inMemory(t), keystore.Spec{}).Key.ID
			require.ErrorIs(t, change(keystore.IfRevision(ctx, 1), s, absent), keystore.ErrNotFound)
			after, err := s.Get(ctx, id)
			require.NoError(t, err)
			after.LastUsedAt = before.LastUsedAt // the session uses the key all the time
			require.Equal(t, before, after, "nothing was done")
			require.Len(t, events(t, s, keystore.EventQuery{}), seen)
			if name != "Enable" {
				require.NoError(t, live.Err(), "the session continues")
			}

			require.NoError(t, change(keystore.IfRevision(ctx, before.Revision), s, id))
			after, err = s.Get(ctx, id)
			require.NoError(t, err)
			require.Equal(t, before.Revision+1, after.Revision)
			if name == "Revoke" || name == "Disable" {
				require.Error(t, live.Err())
			}
		})
	}
}

// A change under IfRevision that would change nothing is a conflict too, if the revision is wrong.
func TestIfRevisionOfARevokedKey(t *testing.T) {
	s := inMemory(t)
	ctx := t.Context()
	id := create(t, s, keystore.Spec{}).Key.ID
	require.NoError(t, s.Revoke(ctx, id, "first"))
	for name, change := range changesOfOneKey {
		require.ErrorIs(t, change(keystore.IfRevision(ctx, 1), s, id), keystore.ErrConflict, name)
		err := change(keystore.IfRevision(ctx, 2), s, id)
		if name == "Revoke" {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, keystore.ErrKeyRevoked, name)
		}
	}
}

func TestIfRevisionNeedsOneKey(t *testing.T) {
	s := inMemory(t)
	id := create(t, s, keystore.Spec{}).Key.ID
	saved := backup(t, s)
	for _, n := range []uint64{0, 1} {
		ctx := keystore.IfRevision(t.Context(), n)
		_, err := s.Create(ctx, keystore.Spec{Name: "n"})
		require.ErrorIs(t, err, keystore.ErrInvalid)
		_, err = s.RevokeAll(ctx, keystore.Query{Owner: "o"}, "", nil)
		require.ErrorIs(t, err, keystore.ErrInvalid)
		_, err = s.Purge(ctx, time.Now().Add(-time.Hour))
		require.ErrorIs(t, err, keystore.ErrInvalid)
		require.ErrorIs(t, s.Restore(ctx, bytes.NewReader(saved)), keystore.ErrInvalid)
		_, err = s.Get(ctx, id)
		require.NoError(t, err, "a read ignores the revision")
	}
	require.Len(t, events(t, s, keystore.EventQuery{}), 1)
}

// Another change is committed between the read and the write of a change under IfRevision.
func TestIfRevisionIsComparedInsideTheWrite(t *testing.T) {
	s := inMemory(t)
	id := create(t, s, keystore.Spec{}).Key.ID
	called := 0
	_, err := s.Update(keystore.IfRevision(t.Context(), 1), id, func(spec *keystore.Spec) error {
		called++
		spec.Name = "loser"
		_, err := s.Update(t.Context(), id,
			func(spec *keystore.Spec) error { spec.Name = "winner"; return nil })
		return err
	})
	require.ErrorIs(t, err, keystore.ErrConflict)
	require.Equal(t, 1, called, "the key that the caller knows is gone")
	key, err := s.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, "winner", key.Name)
	require.EqualValues(t, 2, key.Revision)
}

// Of several changes with the same revision, exactly one is made.
func TestIfRevisionRaces(t *testing.T) {
	s := open(t, nil)
	id := create(t, s, keystore.Spec{}).Key.ID
	verbs := []string{"Update", "Rotate", "Disable", "Enable"}
	for revision := uint64(1); revision < 30; {
		var won atomic.Int64
		var wg sync.WaitGroup
		for n := range 8 {
			wg.Go(func() {
				err := changesOfOneKey[verbs[n%len(verbs)]](keystore.IfRevision(t.Context(),
					revision), s, id)
				switch {
				case err == nil:
					won.Add(1)
				case !errors.Is(err, keystore.ErrConflict):
					t.Errorf("%v", err)
				}
			})
		}
		wg.Wait()
		key, err := s.Get(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, revision+1, key.Revision)
		// An Enable of an active key, or a Disable of a disabled one, succeeds and changes nothing.
		require.GreaterOrEqual(t, won.Load(), int64(1))
		revision = key.Revision
	}
}

// Two people edit the same key. The second one has not seen what the first one did.
func ExampleIfRevision() {
	store, done := exampleStore()
	defer done()
	ctx := context.Background()
	issued, err := store.Create(ctx, keystore.Spec{Name: "ci", Scopes: []string{"read"}})
	if err != nil {
		log.Fatal(err)
	}
	seen := issued.Key // on the screens of both people
	for _, scope := range []string{"write", "admin"} {
		ctx := keystore.IfRevision(ctx, seen.Revision)
		_, err := store.Update(ctx, seen.ID, func(spec *keystore.Spec) error {
			spec.Scopes = append(spec.Scopes, scope)
			return nil
		})
		fmt.Println(scope, errors.Is(err, keystore.ErrConflict))
	}
	// Output:
	// write false
	// admin true
}
