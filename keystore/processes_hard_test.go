package keystore

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The second OnEnd of a session asks the gate, and the gate is closed. The session ends, and
// neither the session nor the process stops.
func TestASecondOnEndFindsTheGateClosed(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		link := badlink.Open(f.shared)
		s, err := newStore(f.options(nil))
		require.NoError(t, err)
		s.configureCluster = func(c *cluster.Config) {
			c.EndAll = func(error) {} // the goroutine that ends the sessions has not run yet
		}
		require.NoError(t, s.start(guardBackend(link, s.panics)))
		defer s.Close()
		m := &member{Store: s, f: f, link: link}
		session := m.binds(m.create(Spec{}))
		first, second := make(chan struct{}), make(chan struct{})
		session.OnEnd(func() { close(first) })
		link.Set(badlink.Faults{Silent: true})
		for s.isFresh() {
			time.Sleep(time.Millisecond)
		}
		session.OnEnd(func() { close(second) })
		<-first
		<-second
		require.ErrorIs(t, session.Cause(), ErrUnavailable)
		link.Set(badlink.Faults{})
	})
}

// The storage is full, and the answer of a Create was lost. The void event that makes the outcome
// certain does not wait for space, because RevokeAll waits for the outcome.
func TestAVoidEventOnAFullStorage(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		issued := b.create(Spec{})
		var full atomic.Bool
		a.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			restricts := false
			for _, c := range changes {
				restricts = restricts || c.Restricts
				if c.Key[0] == keySpace && c.Expect == 0 {
					full.Store(true)
					return context.DeadlineExceeded
				}
			}
			if full.Load() && !restricts {
				return backend.ErrFull
			}
			return next(ctx)
		})
		_, err := a.Create(t.Context(), Spec{Name: "lost"})
		require.ErrorIs(t, err, ErrUnavailable)
		for _, m := range []*member{a, b} {
			_, err := m.RevokeAll(t.Context(), Query{}, "", &RevokeAllOptions{All: true})
			require.NoError(t, err)
		}
		require.ErrorIs(t, a.uses(issued), ErrRevoked)
		require.NoError(t, a.CheckIntegrity(t.Context()))
		require.NoError(t, b.CheckIntegrity(t.Context()))
	})
}

// A process without a Timeout has lost the answer of a write. The write ends all the same, because
// the readers of events in all processes wait for the outcome.
func TestALostAnswerWithoutATimeout(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(&Options{Timeout: -1}), f.open(nil)
		id := b.create(Spec{}).Key.ID
		var lost atomic.Bool
		a.onApply(func(ctx context.Context, changes []backend.Change,
			next func(context.Context) error) error {
			if changes[0].Key[0] != keySpace || !lost.CompareAndSwap(false, true) {
				return next(ctx)
			}
			if err := next(ctx); err != nil {
				t.Error(err)
			}
			<-ctx.Done()
			return ctx.Err()
		})
		disabled := start(func() error { return a.Disable(t.Context(), id, "") })
		synctest.Wait()
		time.Sleep(time.Minute)
		require.ErrorIs(t, disabled(), ErrUnavailable)
		var last Action
		for e, err := range b.Events(t.Context(), EventQuery{}) {
			require.NoError(t, err)
			last = e.Action
		}
		require.Equal(t, ActionDisable, last)
	})
}
