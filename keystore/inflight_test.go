package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A lateBackend makes a write, and holds back the answer.
type lateBackend struct {
	backend.Backend
	hold chan struct{} // nil: the answer comes without delay
}

func (b *lateBackend) Apply(ctx context.Context, changes ...backend.Change) error {
	hold := b.hold
	err := b.Backend.Apply(ctx, changes...)
	if hold != nil {
		<-hold
	}
	return err
}

// A forgetfulBackend makes each write, and says that the write has failed.
type forgetfulBackend struct {
	backend.Backend
	forgets atomic.Bool
}

func (b *forgetfulBackend) Apply(ctx context.Context, changes ...backend.Change) error {
	err := b.Backend.Apply(ctx, changes...)
	if b.forgets.Load() {
		return errors.New("the answer is lost")
	}
	return err
}

// A Revoke is made in storage, and has an error. No leased credit is spent before the record is
// read again.
func TestSpendAfterARevokeWithAnUnknownOutcome(t *testing.T) {
	for name, revoke := range map[string]func(s *keystore.Store, id string) error{
		"Revoke": func(s *keystore.Store, id string) error {
			return s.Revoke(context.Background(), id, "")
		},
		"RevokeAll": func(s *keystore.Store, _ string) error {
			_, err := s.RevokeAll(context.Background(), keystore.Query{Owner: "acme"}, "", nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := &forgetfulBackend{Backend: backendtest.NewMemory()}
			s, err := keystore.New(b, nil)
			require.NoError(t, err)
			defer func() { require.NoError(t, s.Close()) }()
			i := create(t, s, keystore.Spec{Owner: "acme",
				Credits: &keystore.Credits{Remaining: 1000}})
			key, err := s.Verify(t.Context(), i.Secret.Reveal())
			require.NoError(t, err)
			for range 100 {
				require.NoError(t, key.Spend(t.Context(), 1))
			}
			b.forgets.Store(true)
			require.Error(t, revoke(s, i.Key.ID))
			b.forgets.Store(false)
			require.ErrorIs(t, key.Spend(t.Context(), 1), keystore.ErrRevoked)
		})
	}
}

// backupOfRevoked returns a backup of another store, which has the keys of s, and has revoked one.
func backupOfRevoked(t *testing.T, s *keystore.Store, id string) []byte {
	var backup bytes.Buffer
	require.NoError(t, s.Backup(t.Context(), &backup))
	other, err := keystore.New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Close()) }()
	require.NoError(t, other.Restore(t.Context(), &backup))
	require.NoError(t, other.Revoke(t.Context(), id, ""))
	backup.Reset()
	require.NoError(t, other.Backup(t.Context(), &backup))
	return backup.Bytes()
}

// A key is revoked in storage, and the Revoke has not got its answer. Another call that finds the
// key revoked returns before the Revoke does. Then nothing is spent, and no session lives.
func TestAfterARevokeWithoutItsAnswer(t *testing.T) {
	for name, call := range map[string]func(s *keystore.Store, id string, backup []byte) error{
		"Revoke": func(s *keystore.Store, id string, _ []byte) error {
			return s.Revoke(context.Background(), id, "")
		},
		"RevokeAll": func(s *keystore.Store, _ string, _ []byte) error {
			_, err := s.RevokeAll(context.Background(), keystore.Query{Owner: "acme"}, "", nil)
			return err
		},
		"RevokeAll of all": func(s *keystore.Store, _ string, _ []byte) error {
			_, err := s.RevokeAll(context.Background(), keystore.Query{}, "",
				&keystore.RevokeAllOptions{All: true})
			return err
		},
		"Restore": func(s *keystore.Store, _ string, backup []byte) error {
			return s.Restore(context.Background(), bytes.NewReader(backup))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &lateBackend{Backend: backendtest.NewMemory()}
				s, err := keystore.New(b, nil)
				require.NoError(t, err)
				i := create(t, s, keystore.Spec{Owner: "acme",
					Credits: &keystore.Credits{Remaining: 1000}})
				session, err := s.Bind(t.Context(), i.Secret.Reveal())
				require.NoError(t, err)
				key := session.Key()
				for range 100 {
					require.NoError(t, key.Spend(t.Context(), 1))
				}
				backup := backupOfRevoked(t, s, i.Key.ID)
				hold := make(chan struct{})
				b.hold = hold
				revoked := make(chan error, 1)
				go func() { revoked <- s.Revoke(context.Background(), i.Key.ID, "") }()
				synctest.Wait()
				b.hold = nil
				defer func() {
					close(hold)
					require.NoError(t, <-revoked)
					require.NoError(t, s.Close())
				}()
				require.NoError(t, call(s, i.Key.ID, backup))
				require.ErrorIs(t, session.Cause(), keystore.ErrRevoked)
				require.ErrorIs(t, key.Spend(t.Context(), 1), keystore.ErrRevoked)
				_, err = s.Verify(t.Context(), i.Secret.Reveal())
				require.ErrorIs(t, err, keystore.ErrRevoked)
			})
		})
	}
}
