package cluster

import (
	"context"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A request is a barrier request that a call of Barrier or Watermark waits for. The fields are
// guarded by the lock of the Cluster, except the channels.
type request struct {
	number    uint64
	floor     int64         // 0: Barrier waits for acks; otherwise Watermark waits for watermarks
	began     int64         // on the monotonic clock
	freshness time.Duration // the longest D of the store since then

	at      backend.Position // of the request; 0: not delivered
	waiting map[string]bool  // the members of the table at this position that have not acked

	written chan struct{} // closed once a record with this request or a later one is confirmed
	done    chan struct{} // closed once the request is written, and waits for no member
}

// Barrier returns nil once everything that was confirmed before the call is in force in every
// process. That is as soon as all processes have acked, and at the latest D(1+rho) after the call,
// if the engine still confirms the writes of this process: see invariant 6. Otherwise Barrier
// returns the error of ctx, or ErrClosed after Close. Changes of this process that were confirmed
// are in force everywhere D(1+rho) later even then.
func (c *Cluster) Barrier(ctx context.Context) error {
	r := c.newRequest(0)
	defer c.forget(r)
	timer := time.NewTimer(c.untilDeadline(r))
	defer timer.Stop()
	var overdue <-chan struct{} // set when the deadline has passed, and no write was confirmed yet
	for {
		select {
		case <-r.done:
			c.count(&c.counts.Acked)
			return nil
		case <-timer.C:
			if left := c.untilDeadline(r); left > 0 {
				timer.Reset(left)
			} else {
				overdue = r.written
			}
		case <-overdue:
			if left := c.untilDeadline(r); left > 0 { // the D of the store has become longer
				overdue = nil
				timer.Reset(left)
				continue
			}
			c.count(&c.counts.Deadlines)
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-c.ctx.Done():
			return ErrClosed
		}
	}
}

// untilDeadline returns how long it takes until each proof that began before the request has run
// out on every clock.
func (c *Cluster) untilDeadline(r *request) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Duration(r.began - c.cfg.Clock().Mono + int64(Bound(r.freshness)))
}

func (c *Cluster) count(n *uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	*n++
}

// newRequest makes a request, and wakes the heartbeat writer. Without a membership, the next
// membership makes the request.
func (c *Cluster) newRequest(floor int64) *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lastNumber++
	r := &request{
		number: c.lastNumber, floor: floor, began: c.cfg.Clock().Mono, freshness: c.freshness,
		written: make(chan struct{}), done: make(chan struct{}),
	}
	c.requests = append(c.requests, r)
	if c.member != nil {
		c.member.wake()
	}
	return r
}

// forget removes a request for which no call waits any more.
func (c *Cluster) forget(r *request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = slices.DeleteFunc(c.requests, func(other *request) bool { return other == r })
}

// writtenLocked notes that a record with a request number is confirmed. The write began after each
// request with this number or a lower number.
func (c *Cluster) writtenLocked(number uint64) {
	for _, r := range c.requests {
		if r.number <= number && !isClosed(r.written) {
			close(r.written)
		}
	}
}

// placeLocked notes that the feed has delivered a record with a request number at a position. The
// members of the table at this position are then known.
func (m *membership) placeLocked(number uint64, at backend.Position) {
	for _, r := range m.requests {
		if r.number > number || r.at != 0 {
			continue
		}
		r.at, r.waiting = at, make(map[string]bool)
		for id, other := range m.members {
			if !m.hasAcked(r, id, other) {
				r.waiting[id] = true
			}
		}
	}
}

// hasAcked reports whether the record of a member is an ack of a request. For a Barrier, the own
// process has no ack to send: the process has applied the position once the batch is applied.
//
// A Watermark needs the ack too, and not only the watermark. The watermark of a member whose clock
// is ahead may have reached the floor long ago, and only an answer to the request has the last
// stamp of the member.
func (m *membership) hasAcked(r *request, id string, other *member) bool {
	if m.cfg.Wrong.has(ReturnEarly) {
		return true
	}
	acked := id == string(m.id[:]) || other.applied >= r.at
	return acked && (r.floor == 0 || other.watermark >= r.floor)
}

// ackedLocked notes a new record of a member.
func (m *membership) ackedLocked(id string, other *member) {
	for _, r := range m.requests {
		if r.at != 0 && m.hasAcked(r, id, other) {
			delete(r.waiting, id)
		}
	}
}

// goneLocked notes that a member is gone: no request waits for the member any more, see invariants
// 5 and 7.
func (m *membership) goneLocked(id string) {
	for _, r := range m.requests {
		delete(r.waiting, id)
	}
}

// finishLocked ends the requests that are written and wait for no member.
func (c *Cluster) finishLocked() {
	for _, r := range c.requests {
		if r.at != 0 && len(r.waiting) == 0 && isClosed(r.written) && !isClosed(r.done) {
			close(r.done)
		}
	}
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
