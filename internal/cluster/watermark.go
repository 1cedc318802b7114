package cluster

import (
	"context"
	"time"
)

// Watermark returns a stamp up to which a reader may read the events of all processes: each event
// at or below the stamp is visible, and no more such events will appear, in any process.
//
// Watermark asks all members to issue no stamp at or below a floor, and waits until each member's
// watermark has reached the floor, or the member is gone. A member that is silent therefore delays
// Watermark until the member is evicted, and a member that waits for the outcome of an Apply delays
// Watermark until the outcome is certain. If ctx ends first, Watermark returns the error of ctx.
// Watermark returns ErrClosed after Close.
//
// The stamp is at or above the stamp of every change that had returned before the call, in any
// process, except a process that died without Close. If the clock of another process is ahead, the
// first answers show this, and Watermark asks again with a higher floor. When Watermark returns,
// the process has applied the changes of all these events.
func (c *Cluster) Watermark(ctx context.Context) (last int64, err error) {
	last, err = c.watermarkAt(ctx)
	c.mu.Lock()
	behind := max(c.latest, c.floor) > last
	c.mu.Unlock()
	if err == nil && behind {
		last, err = c.watermarkAt(ctx)
	}
	return last, err
}

// watermarkAt makes one request with a floor, and waits until each member has reached the floor.
// The floor is above every known stamp and watermark, so each member answers with a new record, and
// the record has the last stamp of the member.
func (c *Cluster) watermarkAt(ctx context.Context) (last int64, err error) {
	c.mu.Lock()
	c.floor = max(c.floor+1, c.cfg.Clock().Wall, c.latest+1)
	floor := c.floor
	c.mu.Unlock()
	r := c.newRequest(floor)
	defer c.forget(r)
	select {
	case <-r.done:
		return floor, nil
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-c.ctx.Done():
		return 0, ErrClosed
	}
}

// StampsMoved makes the process report its watermark without delay, if another process may wait
// for the watermark. Call StampsMoved after a stamp is no longer pending.
func (c *Cluster) StampsMoved() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m := c.member; m != nil && m.watermark < c.floor {
		m.wake()
	}
}

// A member whose wall clock is ahead of the clock of this process by more than maxAhead is
// reported, once in clockInterval. The protocol does not depend on wall clocks, but the expiry of
// keys does.
const (
	maxAhead      = time.Second
	clockInterval = time.Hour
)

// checkClockLocked compares the wall clock of a member with the wall clock of this process. A
// record takes time to arrive, so only a clock that is ahead is certain to be wrong, or the own
// clock is behind.
func (m *membership) checkClockLocked(other *member, now int64) {
	ahead := time.Duration(other.time - now)
	if ahead <= maxAhead || m.clockReported != 0 && now-m.clockReported < int64(clockInterval) {
		return
	}
	m.clockReported, m.clockAhead = now, aheadClock{other.name, ahead}
}

// An aheadClock is a member whose wall clock is ahead.
type aheadClock struct {
	name string
	by   time.Duration
}

// reportClock logs what checkClockLocked has found. The caller does not hold the lock, because the
// logger is code of the user.
func (m *membership) reportClock(ahead aheadClock) {
	if ahead.by == 0 {
		return
	}
	m.log.Warn("API key store: the clock of another process is ahead of the clock of this process, "+
		"so keys expire at different times: synchronize the clocks of the machines, for example "+
		"with NTP", "process", ahead.name, "difference", ahead.by)
}
