package pgstore_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// newStore opens a key store on a server, as a process does.
func newStore(
	t testing.TB, url, schema string, freshness time.Duration, o *pgstore.Options,
) *keystore.Store {
	t.Helper()
	s, err := keystore.New(open(t, newPool(t, url), schema, o), &keystore.Options{
		Freshness: freshness, Timeout: 2 * freshness,
	})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// freshness is D of the stores. It is long, so that no gate closes on a busy machine.
const freshness = 10 * time.Second

// requireRevoked requires that no store admits a key, and that each store says so once its gate is
// open.
func requireRevoked(ctx context.Context, t *testing.T, stores []*keystore.Store, token string) {
	t.Helper()
	for i, s := range stores {
		var err error
		require.Eventually(t, func() bool {
			_, err = s.Verify(ctx, token)
			return err == nil || errors.Is(err, keystore.ErrRevoked)
		}, patience, time.Millisecond, "store %d", i)
		require.Error(t, err, "store %d admits a revoked key", i)
	}
}

// newReplicas opens three key stores on a primary with a synchronous standby.
func newReplicas(t testing.TB, url string) (stores []*keystore.Store) {
	schema := newSchema()
	for range 3 {
		stores = append(stores, newStore(t, url, schema, freshness, nil))
	}
	return stores
}

// A revocation in one store is in force in all stores once Revoke has returned: no call is
// admitted, and every session has ended.
func TestReplicas(t *testing.T) {
	t.Parallel()
	primary, _ := startPair(t)
	stores := newReplicas(t, primary.URL())
	remotetest.RevokeInTurn(within(t, 3*patience), t, stores, keystore.ErrUnavailable)
}

// The synchronous standby is promoted, and the old primary is alive: a revocation on the new
// primary is in force in a process that still reaches the old primary, because this process refuses
// every call. For the same reason, the process denies no key once Enable has returned.
func TestReplicasOfADeposedPrimary(t *testing.T) {
	t.Parallel()
	old, standby := startPair(t)
	const freshness = 3 * time.Second
	left := newStore(t, old.URL(), "apikeys", freshness, nil)
	moved := newStore(t, both(standby, old), "apikeys", freshness, nil)
	ctx := within(t, 3*patience)
	issued, err := left.Create(ctx, keystore.Spec{Name: "leaked"})
	require.NoError(t, err)
	token := issued.Secret.Reveal()
	var session *keystore.Session
	require.Eventually(t, func() bool {
		session, err = left.Bind(ctx, token)
		return err == nil
	}, patience, time.Millisecond)
	defer session.Close()
	off, err := left.Create(ctx, keystore.Spec{Name: "off"})
	require.NoError(t, err)
	require.NoError(t, left.Disable(ctx, off.Key.ID, "test"))

	// A caller uses both keys all the time in the process that is left.
	var returned, enabled atomic.Bool
	var admitted, after, refused, denied, deniedAfter atomic.Int64
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			late := returned.Load()
			limited, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			_, err := left.Verify(limited, token)
			cancel()
			switch {
			case err == nil && late:
				after.Add(1)
			case err == nil:
				admitted.Add(1)
			default:
				refused.Add(1)
			}
			late = enabled.Load()
			limited, cancel = context.WithTimeout(ctx, 200*time.Millisecond)
			_, err = left.Verify(limited, off.Secret.Reveal())
			cancel()
			switch {
			case errors.Is(err, keystore.ErrDenied) && late:
				deniedAfter.Add(1)
			case errors.Is(err, keystore.ErrDenied):
				denied.Add(1)
			}
			select {
			case <-stop:
				return
			default:
				time.Sleep(time.Millisecond)
			}
		}
	}()
	require.Eventually(t, func() bool { return admitted.Load() > 0 && denied.Load() > 0 }, patience,
		time.Millisecond)
	standby.Promote(t)
	standby.Standby(t, "b2")
	standby.Replicate(t, "b2")
	change := func(make func(context.Context) error, made *atomic.Bool) func() {
		return func() {
			for ctx.Err() == nil && !made.Load() {
				limited, cancel := context.WithTimeout(ctx, 5*freshness)
				made.Store(make(limited) == nil)
				cancel()
			}
		}
	}
	var changes sync.WaitGroup
	changes.Go(change(func(ctx context.Context) error {
		return moved.Enable(ctx, off.Key.ID)
	}, &enabled))
	changes.Go(change(func(ctx context.Context) error {
		return moved.Revoke(ctx, issued.Key.ID, "test")
	}, &returned))
	changes.Wait()
	require.True(t, enabled.Load() && returned.Load())
	require.Error(t, session.Cause(), "the session of the process that is left")
	requireRevoked(ctx, t, []*keystore.Store{moved}, token)
	seen := refused.Load()
	require.Eventually(t, func() bool { return refused.Load() > seen+100 }, patience,
		time.Millisecond)
	close(stop)
	<-done
	require.Zero(t, after.Load(), "calls were admitted after Revoke had returned")
	require.Zero(t, deniedAfter.Load(), "calls were denied after Enable had returned")
	require.Eventually(t, func() bool {
		_, err := moved.Verify(ctx, off.Secret.Reveal())
		return err == nil
	}, patience, time.Millisecond, "on a busy machine, the gate may be closed for a moment")
	limited, cancel := context.WithTimeout(ctx, 2*freshness)
	defer cancel()
	_, err = left.Verify(limited, token)
	require.ErrorIs(t, err, keystore.ErrUnavailable)
	require.NotErrorIs(t, err, keystore.ErrDenied)
	require.False(t, left.Stats().Fresh)
	old.Crash() // otherwise Close waits for the old primary
}

// Without synchronous replication, a promotion may lose a revocation. The processes notice, say so
// in the log, and begin anew: sessions end, and no key stays in a cache.
func TestReplicasAfterALossyPromotion(t *testing.T) {
	t.Parallel()
	old := pglab.Start(t, pglab.Config{NoSync: true})
	standby := old.Standby(t, "b")
	var j journal
	o := &pgstore.Options{Unreplicated: true, Logger: j.logger()}
	a := newStore(t, both(old, standby), "apikeys", 3*time.Second, o)
	b := newStore(t, both(old, standby), "apikeys", 3*time.Second, alone)
	ctx := within(t, 3*patience)
	issued, err := a.Create(ctx, keystore.Spec{Name: "leaked"})
	require.NoError(t, err)
	other, err := a.Create(ctx, keystore.Spec{Name: "other"})
	require.NoError(t, err)
	old.Await(t, "select count(*) from pg_stat_replication "+
		"where replay_lsn = pg_current_wal_lsn()", "1")
	standby.Stop()
	require.NoError(t, a.Revoke(ctx, issued.Key.ID, "test"))
	requireRevoked(ctx, t, []*keystore.Store{a, b}, issued.Secret.Reveal())
	var session *keystore.Session
	require.Eventually(t, func() bool {
		session, err = a.Bind(ctx, other.Secret.Reveal())
		return err == nil
	}, patience, time.Millisecond)
	defer session.Close()
	old.Crash()
	require.NoError(t, standby.Start())
	standby.Promote(t)
	require.Eventually(t, func() bool { return session.Cause() != nil }, patience,
		time.Millisecond)
	require.Eventually(t, func() bool {
		_, err := a.Verify(ctx, issued.Secret.Reveal())
		return err == nil
	}, patience, time.Millisecond, "the revocation is lost")
	require.Contains(t, j.String(), "revoked keys may be active again")
	// As the message says.
	require.Eventually(t, func() bool {
		return b.Revoke(ctx, issued.Key.ID, "again") == nil
	}, patience, 10*time.Millisecond)
	requireRevoked(ctx, t, []*keystore.Store{a, b}, issued.Secret.Reveal())
}

// The server restarts. Afterwards, the stores serve callers again without help, and no key that was
// revoked is admitted.
func TestReplicasWhileTheServerRestarts(t *testing.T) {
	t.Parallel()
	primary, _ := startPair(t)
	stores := newReplicas(t, primary.URL())
	ctx := within(t, 3*patience)
	for _, stop := range []func(){primary.Stop, primary.Crash} {
		active, err := stores[0].Create(ctx, keystore.Spec{Name: "active"})
		require.NoError(t, err)
		leaked, err := stores[0].Create(ctx, keystore.Spec{Name: "leaked"})
		require.NoError(t, err)
		require.NoError(t, stores[1].Revoke(ctx, leaked.Key.ID, "test"))
		stop()
		for _, s := range stores {
			_, err := s.Verify(ctx, leaked.Secret.Reveal())
			require.Error(t, err)
		}
		require.NoError(t, primary.Start())
		for i, s := range stores {
			require.Eventually(t, func() bool {
				_, err := s.Verify(ctx, active.Secret.Reveal())
				return err == nil
			}, patience, time.Millisecond, "store %d", i)
		}
		requireRevoked(ctx, t, stores, leaked.Secret.Reveal())
		require.Eventually(t, func() bool {
			return stores[2].Revoke(ctx, active.Key.ID, "test") == nil
		}, patience, time.Millisecond)
		requireRevoked(ctx, t, stores, active.Secret.Reveal())
	}
}
