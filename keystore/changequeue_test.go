package keystore_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// An unlucky backend calls between after each read with a marked context, before the read returns.
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

// touch is an Update of a key, which adds a character to its name.
func touch(ctx context.Context, s *keystore.Store, id string) error {
	_, err := s.Update(ctx, id, func(spec *keystore.Spec) error { spec.Name += "."; return nil })
	return err
}

// Whenever an update has read the key, a new update comes and changes the key. The first update
// loses to one of them, and comes before the others after that.
func TestAChangeIsNotStarved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &unlucky{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		issued, other := create(t, s, keystore.Spec{}), create(t, s, keystore.Spec{})
		var updates []func() error
		b.between = func() {
			done := make(chan error, 1)
			go func() { done <- touch(t.Context(), s, issued.Key.ID) }()
			updates = append(updates, func() error { return <-done })
			synctest.Wait() // it has come first, or waits
			require.NoError(t, touch(t.Context(), s, other.Key.ID), "another key")
		}
		require.NoError(t, touch(context.WithValue(t.Context(), marked{}, true), s, issued.Key.ID))
		require.Len(t, updates, 2)
		for _, update := range updates {
			require.NoError(t, update())
		}
		b.between = func() {}
		require.NoError(t, touch(t.Context(), s, other.Key.ID))
	})
}

// restrictions are the changes that go before ordinary changes.
var restrictions = map[string]func(ctx context.Context, s *keystore.Store, id string) error{
	"Revoke": func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Revoke(ctx, id, "")
	},
	"Disable": func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Disable(ctx, id, "")
	},
	"RevokeAll": func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.RevokeAll(ctx, keystore.Query{Status: keystore.StatusActive}, "", nil)
		return err
	},
}

// A latent backend takes some time for each Apply, and makes the changes at the end of that time.
type latent struct {
	backend.Backend
	takes time.Duration
}

func (b *latent) Apply(ctx context.Context, changes ...backend.Change) error {
	time.Sleep(b.takes)
	return b.Backend.Apply(ctx, changes...)
}

// 300 callers keep updating one key. A restriction takes as long as two commits at most, and one
// more for a RevokeAll, which tries to change many keys in one commit first.
func TestARestrictionGoesBeforeHundredsOfUpdates(t *testing.T) {
	for name, restrict := range restrictions {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const commit = 50 * time.Millisecond
				s, err := keystore.New(&latent{backendtest.NewMemory(), commit}, nil)
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				issued := create(t, s, keystore.Spec{})
				ctx, stop := context.WithCancel(t.Context())
				var updates sync.WaitGroup
				for range 300 {
					updates.Go(func() {
						for ctx.Err() == nil {
							err := touch(ctx, s, issued.Key.ID)
							if errors.Is(err, keystore.ErrKeyRevoked) {
								return
							}
						}
					})
				}
				// The line has formed, and its head has a commit under way.
				time.Sleep(commit + commit/2)
				began := time.Now()
				err = restrict(t.Context(), s, issued.Key.ID)
				took := time.Since(began)
				_, denied := s.Verify(t.Context(), issued.Secret.Reveal())
				stop()
				updates.Wait()
				require.NoError(t, err)
				require.ErrorIs(t, denied, keystore.ErrDenied)
				if name == "RevokeAll" {
					took -= commit
				}
				require.LessOrEqual(t, took, 2*commit)
			})
		})
	}
}

// The head of the line is an Update whose function blocks, and others wait behind the head. No
// restriction waits for the line.
func TestARestrictionDoesNotWaitForAnUpdateThatBlocks(t *testing.T) {
	for name, restrict := range restrictions {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := inMemory(t)
				issued := create(t, s, keystore.Spec{})
				calls, hold := 0, make(chan struct{})
				var updates sync.WaitGroup
				updates.Go(func() {
					_, _ = s.Update(t.Context(), issued.Key.ID, func(spec *keystore.Spec) error {
						spec.Owner = "blocked"
						if calls++; calls == 1 {
							// So that the Update loses, and joins the line.
							return touch(t.Context(), s, issued.Key.ID)
						}
						<-hold
						return nil
					})
				})
				synctest.Wait()
				require.Equal(t, 2, calls)
				for range 3 {
					updates.Go(func() { _ = touch(t.Context(), s, issued.Key.ID) })
				}
				synctest.Wait()
				began := time.Now()
				err := restrict(t.Context(), s, issued.Key.ID)
				took := time.Since(began)
				close(hold)
				updates.Wait()
				require.NoError(t, err)
				require.Zero(t, took)
				require.ErrorIs(t, verify(t, s, issued.Secret.Reveal()), keystore.ErrDenied)
			})
		})
	}
}

// A held backend holds the reads of calls whose context has a channel until the channel is closed.
// Before a read of a marked call returns, it calls between.
type held struct{ unlucky }

type holdKey struct{}

func (b *held) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if hold, ok := ctx.Value(holdKey{}).(chan struct{}); ok {
		<-hold
	}
	return b.unlucky.Get(ctx, key)
}

// Twenty updates have begun before a revocation. Each of them reads the key and goes on as soon as
// the revocation has read the key once more: none of them commits a change then.
func TestUpdatesThatBeganEarlierDoNotOvertakeARevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &held{unlucky{Backend: backendtest.NewMemory()}}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		id := create(t, s, keystore.Spec{}).Key.ID
		var holds []chan struct{}
		results := make(chan error, 20)
		for range cap(results) {
			hold := make(chan struct{})
			holds = append(holds, hold)
			go func() { results <- touch(context.WithValue(t.Context(), holdKey{}, hold), s, id) }()
		}
		synctest.Wait()
		reads := 0
		b.between = func() {
			close(holds[reads])
			reads++
			synctest.Wait() // the update has come first, or waits
		}
		err = s.Revoke(context.WithValue(t.Context(), marked{}, true), id, "")
		for _, hold := range holds[reads:] {
			close(hold)
		}
		updated := 0
		for range cap(results) {
			if err := <-results; err == nil {
				updated++
			}
		}
		require.NoError(t, err)
		require.Equal(t, 1, reads)
		require.Zero(t, updated)
	})
}

// A change whose context ends leaves the line, and the changes after it move up.
func TestALineProceedsInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &unlucky{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		id := create(t, s, keystore.Spec{}).Key.ID
		update := func(ctx context.Context) func() error {
			done := make(chan error, 1)
			go func() { done <- touch(ctx, s, id) }()
			return func() error { return <-done }
		}
		reads, hold := 0, make(chan struct{})
		b.between = func() {
			switch reads++; reads {
			case 1:
				if err := update(t.Context())(); err != nil {
					t.Error(err)
				}
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
