package keystore

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
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
		m := &member{s, f, link}
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
