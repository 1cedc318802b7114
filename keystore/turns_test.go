package keystore_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// An unlucky backend calls between after each read of the one whose context is marked, and before that one gets it.
type unlucky struct {
	backend.Backend
	between func()
}

type marked struct{}

func (b *unlucky) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := b.Backend.Get(ctx, key)
	if ctx.Value(marked{}) != nil {
		b.between()
	}
	return e, err
}

// Whenever a revocation has read the key, somebody new comes and changes it. The revocation loses to the first, and is
// before the others from then on.
func TestAChangeIsNotOvertakenForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &unlucky{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued, other := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
		update := func(id string) error {
			_, err := s.Update(t.Context(), id, func(spec *keystore.Spec) error { spec.Name += "."; return nil })
			return err
		}
		var updates []func() error
		b.between = func() {
			done := make(chan error, 1)
			go func() { done <- update(issued.Key.ID) }()
			updates = append(updates, func() error { return <-done })
			synctest.Wait() // it has come first, or waits
			require.NoError(t, update(other.Key.ID), "other keys are changed as ever")
		}
		require.NoError(t, s.Revoke(context.WithValue(t.Context(), marked{}, true), issued.Key.ID, ""))
		require.Len(t, updates, 2)
		require.NoError(t, updates[0]())
		require.ErrorIs(t, updates[1](), keystore.ErrRevoked, "it came after the revocation")
		b.between = func() {}
		require.NoError(t, update(other.Key.ID))
	})
}

// Whoever does not want to wait in line any longer leaves it, and those behind move up.
func TestALineMovesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &unlucky{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		id := create(t, s, keystore.Spec{}).Key.ID
		update := func(ctx context.Context) func() error {
			done := make(chan error, 1)
			go func() {
				_, err := s.Update(ctx, id, func(spec *keystore.Spec) error { spec.Name += "."; return nil })
				done <- err
			}()
			return func() error { return <-done }
		}
		reads, hold := 0, make(chan struct{})
		b.between = func() {
			switch reads++; reads {
			case 1:
				require.NoError(t, update(t.Context())())
			case 2: // at the head of the line
				<-hold
			}
		}
		head := update(context.WithValue(t.Context(), marked{}, true))
		synctest.Wait()
		require.Equal(t, 2, reads)
		impatient, leave := context.WithCancelCause(t.Context())
		second, third := update(impatient), update(t.Context())
		synctest.Wait()
		leave(errors.New("somebody's reason"))
		require.ErrorIs(t, second(), context.Canceled)
		synctest.Wait()
		close(hold)
		require.NoError(t, head())
		require.NoError(t, third())
		key, err := s.Get(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, "test...", key.Name)
	})
}
