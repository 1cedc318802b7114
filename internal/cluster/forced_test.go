package cluster

import (
	"bytes"
	"context"
	"iter"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The tests of this file run the steps in the one order in which an error of the protocol shows.
// Chaos does not find these orders, or not reliably.

// forced runs a scenario with the correct protocol, which must hold, and then with a wrong variant,
// which the scenario must catch.
func forced(t *testing.T, wrong Variant, scenario func(t *testing.T, w *world)) {
	t.Run("correct", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(0)
			scenario(t, w)
			require.Empty(t, w.violations)
		})
	})
	t.Run("wrong", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(wrong)
			scenario(t, w)
			require.NotEmpty(t, w.violations, "the error was not caught")
		})
	})
}

// start adds processes that have joined, and that close at the end of the bubble.
func (w *world) joined(t *testing.T, names ...string) (all []*process) {
	for i, name := range names {
		p := w.add(name, uint64(i))
		w.joinAndClose(t, p)
		all = append(all, p)
	}
	return all
}

func (w *world) joinAndClose(t *testing.T, p *process) {
	require.NoError(t, p.join(t.Context(), testFreshness))
	t.Cleanup(func() {
		p.link.heal()
		p.c.Close()
		p.link.pending.Wait()
		require.NoError(t, p.link.Close())
	})
}

// A primary is an engine that may be deposed: from then on, the primary shows the writes of its own
// process to the feed of this process, and confirms none, because the other server does not have
// the writes.
type primary struct {
	backend.Feeder
	mu      sync.Mutex // guards all below
	deposed bool
	own     backend.Entry // the member record, as the primary shows it
	last    backend.Position
	batches chan backend.Batch
	stop    context.CancelFunc // ends the feed of the engine
}

func (p *primary) depose() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deposed = true
	p.stop()
}

func (p *primary) isDeposed() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.deposed
}

func (p *primary) Apply(ctx context.Context, changes ...backend.Change) error {
	if !p.isDeposed() {
		return p.Feeder.Apply(ctx, changes...)
	}
	p.mu.Lock()
	p.last++
	b := backend.Batch{Position: p.last}
	for _, c := range changes {
		if c.Delete {
			b.Changes = append(b.Changes, backend.Entry{Key: c.Key})
			continue
		}
		p.own = backend.Entry{Key: c.Key, Value: c.Value, Revision: c.Expect + 1}
		b.Changes = append(b.Changes, p.own)
	}
	p.batches <- b
	p.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

func (p *primary) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	p.mu.Lock()
	own := p.own
	p.mu.Unlock()
	if bytes.Equal(key, own.Key) {
		return own, nil
	}
	return p.Feeder.Get(ctx, key)
}

func (p *primary) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		inner, stop := context.WithCancel(ctx)
		defer stop()
		p.mu.Lock()
		p.stop = stop
		p.mu.Unlock()
		for b, err := range p.Feeder.Feed(inner, from, to, after) {
			if p.isDeposed() {
				break
			}
			p.mu.Lock()
			p.last = b.Position
			p.mu.Unlock()
			if !yield(b, err) {
				return
			}
		}
		for {
			select {
			case b := <-p.batches:
				if !yield(b, nil) {
					return
				}
			case <-ctx.Done():
				yield(backend.Batch{}, ctx.Err())
				return
			}
		}
	}
}

// joinedOnPrimary adds a process whose engine can be deposed.
func (w *world) joinedOnPrimary(t *testing.T) (*process, *primary) {
	p := w.add("p", 7)
	old := &primary{Feeder: p.link.Feeder, batches: make(chan backend.Batch, 1000)}
	p.link.Feeder = old
	p.link.hook = func(context.Context, string, []backend.Change) error { return nil }
	w.joinAndClose(t, p)
	return p, old
}

// A process that is alone on a deposed primary needs no ack, because the other processes joined on
// the other server. A Barrier does not return, because no write is confirmed: invariant 6.
func TestForcedBarrierOnADeposedPrimary(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		p, old := w.joinedOnPrimary(t)
		old.depose()
		ctx, cancel := context.WithTimeout(t.Context(), 20*testFreshness)
		defer cancel()
		require.ErrorIs(t, p.c.Barrier(ctx), context.DeadlineExceeded)
		require.False(t, p.fresh())
	})
}

// A heartbeat that was delivered and not confirmed is no proof: invariant 2.
func TestForcedUnconfirmedHeartbeat(t *testing.T) {
	forced(t, unconfirmed, func(t *testing.T, w *world) {
		ctx := t.Context()
		q := w.joined(t, "q")[0]
		p, old := w.joinedOnPrimary(t)
		require.NoError(t, q.change(ctx, "ka"))
		_, err := p.admit(ctx, "ka", false)
		require.NoError(t, err)

		old.depose()
		require.NoError(t, q.change(ctx, "ka"))
		_, _ = p.admit(ctx, "ka", false)
	})
}

// The cache is flushed after the feed has begun, and so after the member record was written:
// invariant 4.
func TestForcedFlushBeforeTheMemberRecord(t *testing.T) {
	forced(t, flushEarly, func(t *testing.T, w *world) {
		ctx := t.Context()
		all := w.joined(t, "p", "q")
		p, q := all[0], all[1]
		require.NoError(t, q.change(ctx, "ka"))

		// A reader of p is between the gate and the cache, when the membership of p ends.
		reader := newSteps("look", "install")
		p.step = reader.step
		go p.admit(ctx, "ka", false)
		reader.reached("look")
		release := loseMembership(p)
		reader.proceed("look")
		reader.reached("install") // the reader has read the old revision

		// q does not wait for p, because p is not in the table.
		require.NoError(t, q.change(ctx, "ka"))
		reader.proceed("install")
		synctest.Wait()
		release()
		p.awaitFresh()
		_, err := p.admit(ctx, "ka", false)
		require.NoError(t, err)
	})
}

// loseMembership ends the membership of p by a gap, and stops p just before p joins again. The
// result lets p join.
func loseMembership(p *process) (release func()) {
	joining, joined := make(chan struct{}), make(chan struct{})
	p.link.mu.Lock()
	p.link.hook = func(_ context.Context, point string, changes []backend.Change) error {
		if point == "apply" && len(changes) == 3 && !changes[0].Delete && !isClosed(joining) {
			close(joining)
			<-joined
		}
		return nil
	}
	p.link.mu.Unlock()
	p.link.set(func(f *fault) { f.feedErr = backend.ErrGap })
	<-joining
	p.link.heal()
	return func() { close(joined) }
}

// awaitFresh returns when the gate is open.
func (p *process) awaitFresh() { await("the gate of "+p.name, p.fresh) }

// await returns when a condition holds. The time of a bubble costs nothing, so await waits long.
func await(what string, holds func() bool) {
	for range 10_000 {
		if holds() {
			return
		}
		time.Sleep(testFreshness / 100)
	}
	panic("waited too long for " + what)
}

// steps stops a goroutine at each of its points once.
type steps struct{ at, go_ map[string]chan struct{} }

func newSteps(points ...string) *steps {
	s := &steps{map[string]chan struct{}{}, map[string]chan struct{}{}}
	for _, point := range points {
		s.at[point], s.go_[point] = make(chan struct{}), make(chan struct{})
	}
	return s
}

func (s *steps) step(point string) {
	if at := s.at[point]; at != nil && !isClosed(at) {
		close(at)
		<-s.go_[point]
	}
}

func (s *steps) reached(point string) { <-s.at[point] }
func (s *steps) proceed(point string) { close(s.go_[point]) }

// A heartbeat is identified by its number: invariant 2. Heartbeat 1 arrives late, and gets the
// revision that heartbeat 2 expects. A change was confirmed between the two.
func TestForcedHeartbeatKnownByItsRevision(t *testing.T) {
	forced(t, byRevision, func(t *testing.T, w *world) {
		ctx := t.Context()
		all := w.joined(t, "p", "q")
		p, q := all[0], all[1]
		require.NoError(t, q.change(ctx, "ka"))
		_, err := p.admit(ctx, "ka", false)
		require.NoError(t, err)

		late, read := make(chan []backend.Change, 1), make(chan struct{})
		var step atomic.Int32
		p.link.mu.Lock()
		p.link.hook = func(ctx context.Context, point string, changes []backend.Change) error {
			switch {
			case point == "apply" && heartbeatOf(changes) != 0 && step.CompareAndSwap(0, 1):
				late <- changes
				<-ctx.Done() // heartbeat 1 does not arrive in time
				return ctx.Err()
			case point == "got" && changes[0].Key[0] == memberSpace && step.CompareAndSwap(1, 2):
				close(read) // the record is as before; the answer takes its time
				time.Sleep(testFreshness/4 - 2*time.Millisecond)
			}
			return nil
		}
		p.link.mu.Unlock()
		heartbeat := <-late
		<-read
		require.NoError(t, w.engine.Open().Apply(ctx, heartbeat...)) // now heartbeat 1 arrives
		synctest.Wait()
		p.link.set(func(f *fault) { f.silent = true })
		require.NoError(t, q.change(ctx, "ka")) // returns after D(1+rho)
		_, _ = p.admit(ctx, "ka", false)
	})
}

// A proof counts from the moment before the write of the heartbeat: invariant 2. A change that is
// confirmed between the write and its answer may have a higher position than the heartbeat.
func TestForcedChangeBeforeTheAnswerToAHeartbeat(t *testing.T) {
	forced(t, beganLate, func(t *testing.T, w *world) {
		ctx := t.Context()
		all := w.joined(t, "p", "q")
		p, q := all[0], all[1]
		require.NoError(t, q.change(ctx, "ka"))
		_, err := p.admit(ctx, "ka", false)
		require.NoError(t, err)

		began := make(chan struct{})
		var step atomic.Int32
		p.link.mu.Lock()
		p.link.hook = func(_ context.Context, point string, changes []backend.Change) error {
			if point == "applied" && heartbeatOf(changes) != 0 && step.CompareAndSwap(0, 1) {
				close(began)
				time.Sleep(testFreshness/4 - time.Millisecond) // the answer takes its time
			}
			return nil
		}
		p.link.mu.Unlock()
		<-began
		synctest.Wait()
		p.link.set(func(f *fault) { f.silent = true })
		require.NoError(t, q.change(ctx, "ka")) // returns after D(1+rho)
		_, _ = p.admit(ctx, "ka", false)
	})
}

// The header carries the floor of a member that has left: invariant 8. The clock of the next member
// is behind.
func TestForcedFloorOfAMemberThatIsGone(t *testing.T) {
	forced(t, keepFloor, func(t *testing.T, w *world) {
		ctx := t.Context()
		p := w.add("p", 1)
		p.shift.Store(int64(time.Hour))
		require.NoError(t, p.join(ctx, testFreshness))
		require.NoError(t, p.change(ctx, "ka"))
		require.NoError(t, p.readEvents(ctx))
		p.c.Close()
		require.NoError(t, p.link.Close())

		q := w.joined(t, "q")[0]
		require.NoError(t, q.change(ctx, "ka"))
		require.NoError(t, w.checkEvents())
	})
}

// The two errors of the next tests are errors of package keystore, which this package's model of a
// store makes in its place.

// The gate is asked before the cache is looked at: invariant 3.
func TestForcedGateAskedAfterTheCache(t *testing.T) {
	for _, wrong := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(0)
			ctx := t.Context()
			all := w.joined(t, "p", "q")
			p, q := all[0], all[1]
			p.gateLate = wrong
			require.NoError(t, q.change(ctx, "ka"))
			_, err := p.admit(ctx, "ka", false)
			require.NoError(t, err)

			p.link.set(func(f *fault) { f.silent = true })
			require.NoError(t, q.change(ctx, "ka"))
			reader := newSteps("hit")
			p.step = reader.step
			done := make(chan error)
			go func() {
				_, err := p.admit(ctx, "ka", false)
				done <- err
			}()
			synctest.Wait() // the reader has the old revision, or was refused
			p.link.heal()
			if wrong {
				p.awaitFresh()
				reader.proceed("hit")
				require.NoError(t, <-done)
			} else {
				require.ErrorIs(t, <-done, errRefused)
			}
			require.Equal(t, wrong, w.broken())
		})
	}
}

// A Bind asks the gate again after the context was registered: invariant 3. Otherwise a context
// that is registered after EndAll is never notified of the changes of the gap.
func TestForcedBindWithoutASecondLook(t *testing.T) {
	for _, wrong := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(0)
			ctx := t.Context()
			all := w.joined(t, "p", "q")
			p, q := all[0], all[1]
			p.noSecondLook = wrong
			require.NoError(t, q.change(ctx, "ka"))
			_, err := p.admit(ctx, "ka", false)
			require.NoError(t, err)

			reader := newSteps("look")
			p.step = reader.step
			done := make(chan error)
			go func() {
				_, err := p.admit(ctx, "ka", true)
				done <- err
			}()
			reader.reached("look")
			release := loseMembership(p)
			reader.proceed("look")
			err = <-done
			require.NoError(t, q.change(ctx, "ka"))
			release()
			p.awaitFresh()
			if wrong {
				require.NoError(t, err)
				require.Equal(t, 1, p.alive("ka", 2), "the context has missed the change")
			} else {
				require.ErrorIs(t, err, errRefused)
				require.Zero(t, p.alive("ka", 2))
			}
		})
	}
}

// A process that was evicted changes nothing any more: invariant 7. Without the guard entry, a late
// Apply would succeed.
func TestForcedChangeAfterTheEviction(t *testing.T) {
	for _, guarded := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(0)
			ctx := t.Context()
			all := w.joined(t, "p", "q")
			p, q := all[0], all[1]
			guard, err := p.c.Guard()
			require.NoError(t, err)
			p.link.set(func(f *fault) { f.dropCalls = true })
			await("the eviction", func() bool { return q.c.Stats().Evictions > 0 })
			changes := []backend.Change{{Key: []byte("kb")}}
			if guarded {
				changes = append(changes, guard)
			}
			err = w.engine.Open().Apply(ctx, changes...) // arrives late
			if guarded {
				require.ErrorIs(t, err, backend.ErrConflict)
			} else {
				require.NoError(t, err)
			}
			p.link.heal()
			p.awaitFresh()
			again, err := p.c.Guard()
			require.NoError(t, err)
			require.NotEqual(t, guard.Key, again.Key, "a new membership has a new ID")
		})
	}
}
