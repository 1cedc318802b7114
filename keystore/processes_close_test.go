package keystore

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
)

// A gated observer blocks in Ended until the gate is closed.
type gatedObserver struct {
	Observer
	entered atomic.Int64 // calls of Ended
	left    atomic.Int64
	gate    chan struct{}
}

func (g *gatedObserver) Verified(Verification) {}
func (g *gatedObserver) Refused(Refusal)       {}
func (g *gatedObserver) Changed(Event)         {}

func (g *gatedObserver) Ended(BindEnd) {
	g.entered.Add(1)
	<-g.gate
	g.left.Add(1)
}

// An observed is a process with a session and a gated observer.
type observed struct {
	*member
	shift   atomic.Int64 // of the wall clock
	issued  *Issued
	session *Session
}

// observe opens the store in a new process, with a session of a key that expires in a minute.
func (f *fleet) observe(o Observer) *observed {
	p := new(observed)
	p.member = f.openAt(&p.shift, &Options{Observer: o})
	p.issued = p.create(Spec{ExpiresAt: time.Now().Add(time.Minute)})
	p.session = p.binds(p.issued)
	return p
}

// Each way in which a context ends on a goroutine that no call waits for.
var endsInTheBackground = map[string]func(t *testing.T, f *fleet, p *observed){
	"another process revokes": func(t *testing.T, f *fleet, p *observed) {
		require.NoError(t, f.open(nil).Revoke(t.Context(), p.issued.Key.ID, ""))
	},
	"the gate closes": func(_ *testing.T, _ *fleet, p *observed) {
		p.link.Set(badlink.Faults{Drop: true})
		time.Sleep(2 * testFreshness)
		p.link.Set(badlink.Faults{})
		p.awaitFresh()
	},
	"a context finds the gate closed": func(t *testing.T, _ *fleet, p *observed) {
		p.shift.Store(int64(time.Hour))
		require.ErrorIs(t, p.session.Cause(), ErrUnavailable)
	},
	"the key expires": func(*testing.T, *fleet, *observed) { time.Sleep(time.Minute) },
}

// Close waits until no goroutine of the store notifies the observer.
func TestCloseWaitsForTheObserver(t *testing.T) {
	for name, end := range endsInTheBackground {
		t.Run(name, func(t *testing.T) {
			fleetTest(t, func(t *testing.T, f *fleet) {
				o := &gatedObserver{gate: make(chan struct{})}
				p := f.observe(o)
				end(t, f, p)
				synctest.Wait()
				require.EqualValues(t, 1, o.entered.Load())

				var closed atomic.Bool
				done := make(chan error)
				go func() {
					err := p.Close()
					closed.Store(true)
					done <- err
				}()
				synctest.Wait()
				require.False(t, closed.Load(), "Close has returned while the observer runs")
				close(o.gate)
				require.NoError(t, <-done)
				require.EqualValues(t, 1, o.left.Load())
				require.Error(t, p.session.Cause())
				time.Sleep(5 * time.Minute)
				require.EqualValues(t, 1, o.entered.Load(), "notified after Close")
			})
		})
	}
}

// An observer that never returns does not keep Close for good.
func TestCloseGivesUpOnAnObserver(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		o := &gatedObserver{gate: make(chan struct{})}
		p := f.observe(o)
		time.Sleep(time.Minute + time.Millisecond) // the timer has run
		require.Equal(t, reportPatience, took(func() { require.NoError(t, p.Close()) }))
		close(o.gate)
	})
}

// A closing observer closes its store.
type closingObserver struct {
	gatedObserver
	store atomic.Pointer[Store]
	err   chan error
}

func (c *closingObserver) Ended(BindEnd) { c.err <- c.store.Load().Close() }

// An observer that closes the store in a goroutine of the store gets an answer.
func TestAnObserverThatCloses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		o := &closingObserver{err: make(chan error, 1)}
		p := f.observe(o)
		o.store.Store(p.Store)
		time.Sleep(time.Minute + time.Millisecond) // the timer has run
		require.NoError(t, <-o.err)
		require.ErrorIs(t, p.Err(), ErrClosed)
	})
}
