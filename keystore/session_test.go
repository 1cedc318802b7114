package keystore_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

func TestSession(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{RateLimit: keystore.RateLimit{PerSecond: 1e-9, Burst: 4}})
	bind := func() *keystore.Session {
		session, err := s.Bind(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		t.Cleanup(session.Close)
		return session
	}
	ended, closed := bind(), bind()
	called := make(chan string, 2)
	ended.OnEnd(func() { called <- "ended" })
	for range 2 {
		closed.OnEnd(func() { called <- "closed" })
	}

	require.NoError(t, closed.Cause())
	closed.Close()
	closed.Close()
	require.ErrorIs(t, closed.Cause(), context.Canceled)
	require.ErrorIs(t, closed.Context().Err(), context.Canceled)
	require.False(t, closed.OnEnd(func() { called <- "closed before" })())

	// A caller that replaces the key does not lift the limit of another session.
	third := bind()
	*third.Key() = keystore.Key{}
	require.NoError(t, ended.Allow(), "the fourth use")
	require.Error(t, ended.Allow())

	require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
	require.ErrorIs(t, ended.Cause(), keystore.ErrRevoked)
	require.ErrorIs(t, context.Cause(ended.Context()), keystore.ErrRevoked)
	require.ErrorIs(t, ended.Allow(), keystore.ErrRevoked)
	require.ErrorIs(t, ended.Spend(t.Context(), 1), keystore.ErrRevoked)
	require.Equal(t, "ended", <-called)
	ended.Close()
	require.ErrorIs(t, ended.Cause(), keystore.ErrRevoked, "the first cause stays")
	require.Empty(t, called, "Close calls nothing")
	require.Zero(t, s.Stats().Live)
}

func TestNewSession(t *testing.T) {
	key := keystore.NewKey(keystore.Spec{Owner: "a"})
	parent, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	session := keystore.NewSession(parent, key)
	require.Same(t, key, session.Key())
	require.NoError(t, session.Context().Err())
	require.NoError(t, session.Cause())
	require.NoError(t, session.Allow())
	called := make(chan struct{})
	stop := session.OnEnd(func() { close(called) })
	require.True(t, session.OnEnd(func() { t.Error("it was stopped") })())
	cancel(keystore.ErrRevoked)
	require.ErrorIs(t, session.Cause(), keystore.ErrRevoked)
	require.ErrorIs(t, context.Cause(session.Context()), keystore.ErrRevoked)
	<-called
	require.False(t, stop())
	session.Close()
	require.ErrorIs(t, session.Cause(), keystore.ErrRevoked, "the first cause stays")

	session = keystore.NewSession(t.Context(), nil)
	require.Nil(t, session.Key())
	require.NoError(t, session.Allow())
	session.Close()
	require.ErrorIs(t, session.Cause(), context.Canceled)

	// A context of another type ends before the contexts that are derived from it.
	late := &lateContext{Context: t.Context()}
	session = keystore.NewSession(late, key)
	late.err = keystore.ErrDisabled
	require.NoError(t, session.Context().Err())
	require.ErrorIs(t, session.Cause(), keystore.ErrDisabled)
	session.Close()

	new(keystore.Session).Close()
	require.Nil(t, new(keystore.Session).Context())
}

// A lateContext has ended when err is set. Contexts that are derived from it do not see that.
type lateContext struct {
	context.Context
	err error
}

func (c *lateContext) Err() error { return c.err }

func (*lateContext) Done() <-chan struct{} { return nil }

func (*lateContext) Deadline() (time.Time, bool) { return time.Time{}, false }

func (*lateContext) Value(any) any { return nil }
