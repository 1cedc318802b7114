package cluster

import (
	"sync/atomic"
	"time"
)

// An Instant is one reading of both clocks of the process.
type Instant struct {
	Mono int64 // nanoseconds of the monotonic clock since the origin of the gate
	Wall int64 // nanoseconds since the Unix epoch
}

// A gate is open while the process has a valid proof.
//
// The monotonic clock of Linux stops while the machine sleeps, and the wall clock does not. So a
// proof that began at s ends at s+D on either clock, whichever is first. A wall clock that is set
// forward by more than is left of D closes the gate until the next proof. A wall clock that is set
// back changes nothing, because the monotonic clock still counts.
//
// Two cases are outside the model: a hypervisor that stops a guest, and so both clocks of the
// guest, for longer than rho D; and a machine that sleeps for longer than rho D, and whose wall
// clock is set back by as much before the next proof.
type gate struct {
	// prove writes wall before until, and Fresh reads until before wall. So Fresh sees the wall of
	// the same proof or of a later one. A later proof is valid too, so the pair need not match.
	until atomic.Int64 // of mono; 0: closed
	wall  atomic.Int64
	// The origin is a field, so that a gate in a bubble of testing/synctest uses the bubble's time.
	origin time.Time
	clock  func() Instant // for tests: Config.Clock
	_      [64]byte       // keeps the fields that change out of the cache line of the gate

	wrong Variant
	moved chan struct{} // has an element if until may have moved while the watcher waited for that
}

func (g *gate) init(wrong Variant) {
	g.origin = time.Now()
	g.moved = make(chan struct{}, 1)
	g.wrong = wrong
}

// Fresh reports whether the gate is open: whether the process may admit a caller now. Every call
// that admits a caller calls Fresh first, see invariant 3. Fresh takes no lock, allocates nothing,
// and reads both clocks once.
func (c *Cluster) Fresh() bool {
	if c.gate.clock != nil {
		return c.gate.openAt(c.gate.clock())
	}
	now := time.Now()
	return int64(now.Sub(c.gate.origin)) < c.gate.until.Load() &&
		now.UnixNano() < c.gate.wall.Load()
}

// openAt is Fresh, for a moment that was read from the clocks just before.
func (g *gate) openAt(now Instant) bool {
	return now.Mono < g.until.Load() && now.Wall < g.wall.Load()
}

// now reads both clocks.
func (g *gate) now() Instant {
	now := time.Now()
	return Instant{int64(now.Sub(g.origin)), now.UnixNano()}
}

// raise keeps the gate open until a proof that began at s has run out, and reports whether the gate
// is open now. A proof that has run out already changes nothing.
func (g *gate) raise(s, now Instant, freshness time.Duration) (open bool) {
	until, wall := s.Mono+int64(freshness), s.Wall+int64(freshness)
	if g.wrong.has(GateAlwaysOpen) {
		until, wall = 1<<62, 1<<62
	}
	if now.Mono < until && until > g.until.Load() {
		g.wall.Store(wall)
		g.until.Store(until)
		g.wake()
	}
	return g.openAt(now)
}

// close closes the gate until the next raise.
func (g *gate) close() {
	if g.wrong.has(GateAlwaysOpen) {
		return
	}
	g.until.Store(0)
	g.wake()
}

func (g *gate) wake() {
	select {
	case g.moved <- struct{}{}:
	default:
	}
}

// watchGate ends all contexts when the gate closes because no proof came in time. The guarantee
// does not depend on this goroutine, because every message calls Fresh.
func (c *Cluster) watchGate() {
	reported := int64(0) // the closing that was reported last
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		until := c.gate.until.Load()
		if until != 0 && until != reported {
			left := time.Duration(until - c.cfg.Clock().Mono)
			if left <= 0 {
				reported = until
				c.reportClosing(until)
				continue
			}
			timer.Reset(left)
			select {
			case <-timer.C:
			case <-c.ctx.Done():
				return
			}
			continue
		}
		select {
		case <-c.gate.moved:
		case <-c.ctx.Done():
			return
		}
	}
}

// reportClosing ends all contexts, unless a new proof came in the meantime.
func (c *Cluster) reportClosing(until int64) {
	if c.gate.until.Load() != until {
		return
	}
	c.mu.Lock()
	c.counts.Closings++
	c.mu.Unlock()
	c.cfg.EndAll(ErrStale)
}
