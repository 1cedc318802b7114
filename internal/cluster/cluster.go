// Package cluster keeps the caches of several processes in step with one store: once
// [Cluster.Barrier] has returned nil in one process, every change that was confirmed before the
// call is in force in every process.
//
// Each process has one entry in the store, its member record. Only the process itself writes the
// record, and other processes may delete the record. One write of a member record has up to three
// meanings: the process is alive (a heartbeat); every change up to a position is in force in the
// process (a barrier ack); and, all other processes, send an ack (a barrier request). Every process
// reads all member records, and all changes of API keys, from one ordered feed of the backend.
//
// The package knows the contract of a storage engine, and neither engines nor API keys.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Cluster is the part that one process takes in the protocol. A Cluster is safe for concurrent
// use.
//
// # Terms
//
//	membership    the period in which a process takes part in the protocol. A process that
//	              loses its membership joins again, with a new ID
//	member        a process with a membership
//	member record one entry of the store for each member, written only by the member
//	table         the membership table: all member records, plus a header
//	heartbeat     one numbered write of the member record, by the heartbeat writer
//	confirmed     a write is confirmed once its Apply has returned nil
//	delivered     a write is delivered once the feed of the process has yielded the write
//	applied       the position up to which a process has applied the changes of the feed
//	in force      a change is in force in a process once the process has applied the change,
//	              or may admit nothing
//	proof         a heartbeat that is confirmed and delivered. If the write began at s, the
//	              proof is valid until s+D
//	D             the freshness: one number for all processes of the store, in the header
//	rho           the fraction by which one clock may run faster than another, over D
//	gate          the freshness gate: open while the process has a valid proof
//	guard entry   a second entry of each member; see invariant 7
//	evict         to delete the member record and the guard entry of a silent process
//	floor         a stamp; a member asks all others to issue no stamp at or below the floor
//	watermark     the stamp below which a member has no pending stamp; see Watermark
//
// # Invariants
//
//  1. (applied) A process has applied every change at or below applied. The cache holds no older
//     value of the changed key: the cache holds no value, or the value after the change. The
//     bindings of the key were notified.
//  2. (proof) The gate is open until s+D only if a heartbeat whose write began after s was both
//     confirmed and delivered. A change that was confirmed before s has a lower position than the
//     heartbeat, so the change is at or below applied. Delivery alone is not enough: a deposed
//     PostgreSQL primary shows its own feed writes that the primary could not replicate. A
//     heartbeat is identified by its number, not by the revision of the member record, because a
//     late write of an earlier heartbeat can get the revision.
//  3. (gate) Every admission found the gate open after its call began, and before its look into the
//     cache. After a check that follows the look, a value from before the gate closed could be
//     admitted once the gate has opened again. A call that binds a context to a key asks again
//     after the context was registered, and each message of a stream asks.
//  4. (join) A membership starts in this order: write the member record, start the feed at S, flush
//     the cache, read the membership table, apply batches. Flush comes after S: a value that was
//     read before S may lack a change below S, and the feed does not report this change. The member
//     record comes before Flush: a process with a barrier request at C waits for the members that
//     were in the table at C, and for no other. A process that joins later caches only values that
//     were read after C.
//  5. (eviction) A process deletes the member record of another process only at a revision that was
//     seen D(1+rho) ago or earlier. So no later heartbeat was committed, no later heartbeat can be
//     committed any more, and the proof of the seen heartbeat has run out.
//  6. (barrier) A change that was confirmed at c is in force everywhere in two cases. (i) D(1+rho)
//     has passed since c: a proof that began before c has run out, and a proof that began after c
//     covers the change (2). (ii) A barrier request was written after c and has the position C, and
//     each member that was in the table at C has acked C or a later position (1), or is gone (5).
//     In both cases, the Barrier also needs a confirmed write of the own member record that began
//     after c. The write shows that the caller's view at c was the view of the engine, and that D
//     was still the D of the store.
//  7. (guard entry) Each Apply of a process with an event Checks the guard entry of the process,
//     see Guard. A process that was evicted changes nothing any more, however late its Apply
//     arrives.
//  8. (floor) Each process issues only stamps above every floor that was in the table when the
//     process joined. The header carries the floors of members that are gone: the Apply that
//     deletes a member record also raises the floor in the header. So that a reader finds the
//     events of gone members too, the header also carries the last stamps of these members.
//
// The protocol compares only times of one process: its monotonic clock, and for a machine that
// sleeps also its wall clock, see gate. Clocks of other processes and of the engine play no part,
// except that no clock may run faster than another by more than rho.
type Cluster struct {
	gate gate // read by every call of Fresh

	cfg  Config
	log  *slog.Logger
	ctx  context.Context // ends at Close
	stop context.CancelFunc
	done sync.WaitGroup

	mu         sync.Mutex // guards all below, and the fields of the membership that name mu
	freshness  time.Duration
	member     *membership // nil: the process has no membership at present
	closed     bool
	lastNumber uint64 // of the newest request
	requests   []*request
	floor      int64 // the highest floor that the process knows
	latest     int64 // the highest stamp that a process is known to have issued
	lastError  error // why the last membership ended, or could not start
	counts     Stats

	clockReported int64 // when a difference of clocks was logged last, by the wall clock

	refused error         // why no membership can start, until an operator changes something
	changed chan struct{} // closed when Start must look again; nil: Start does not wait
}

// A Config says which store to keep in step, and how. Backend, Changed, Flush and EndAll must be
// set.
type Config struct {
	Backend backend.Feeder
	// Freshness is D. 0 means the D of the store, or DefaultFreshness for a new store.
	Freshness time.Duration
	// Changed applies changed records, in order: evicts each value from the cache, prevents the
	// install of values that were read before, and notifies the bindings. Only one call of Changed
	// runs at a time.
	Changed func([]backend.Entry)
	// Flush empties the cache, and prevents the install of values that were read before.
	Flush func()
	// EndAll ends every bound context. EndAll may be called several times.
	EndAll func(cause error)
	// Stamps makes the process issue no event stamp at or below floor from now on, and returns the
	// watermark of the process and the last stamp: no stamp at or below the watermark is pending or
	// will be issued, and no stamp above last was issued. A stamp stays pending until its outcome
	// is certain. Stamps must not call the Cluster. A nil Stamps means that the process issues no
	// stamps.
	Stamps func(floor int64) (watermark, last int64)
	// Name is a name of the process, for people who read the membership table.
	Name string
	// Log receives the ends of memberships. nil means no log.
	Log *slog.Logger

	// Tests set Wrong and Clock. A nil Clock means the clocks of the machine.
	Wrong Variant
	Clock func() Instant
}

// DefaultFreshness is the D of a new store. An etcd cluster elects a new leader within this time,
// so the crash of a leader closes no gate.
const DefaultFreshness = 3 * time.Second

// MinFreshness is the shortest D. A call of the backend has at least a quarter of this time.
const MinFreshness = 4 * minTimeout

// rho is 1/5: chrony slews a clock by up to a twelfth, either way.
const rhoDivisor = 5

// Bound returns D(1+rho): how long a proof may be valid, on the clock of another process.
func Bound(freshness time.Duration) time.Duration { return freshness + freshness/rhoDivisor }

var (
	// ErrClosed is returned after Close.
	ErrClosed = errors.New("cluster: closed")
	// ErrNoMembership is returned by Guard while the process has no membership, and is the cause
	// with which contexts end when a membership ends.
	ErrNoMembership = errors.New("cluster: out of contact with the other processes of the store")
	// ErrStale is the cause with which contexts end when the gate closes.
	ErrStale = fmt.Errorf("%w: no heartbeat was confirmed and delivered in time", ErrNoMembership)
	// ErrFreshness is returned by Start if the processes of the store have another D.
	ErrFreshness = errors.New("cluster: the store has another freshness")
)

// Start joins the membership table, and returns once the gate is open. If ctx ends first, Start
// leaves the table, and returns the error of ctx and why the process could not join. Start returns
// ErrFreshness if Config.Freshness differs from the D of the store.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	if cfg.Freshness != 0 && cfg.Freshness < MinFreshness {
		return nil, fmt.Errorf("cluster: the freshness is %v: it must be 0, or at least %v",
			cfg.Freshness, MinFreshness)
	}
	c := &Cluster{cfg: cfg, log: cfg.Log, changed: make(chan struct{})}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.gate.init(cfg.Wrong)
	c.gate.clock = cfg.Clock
	if c.cfg.Clock == nil {
		c.cfg.Clock = c.gate.now
	}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	c.done.Go(c.run)
	c.done.Go(c.watchGate)
	err := c.waitOpen(ctx)
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// waitOpen waits until the first proof, or until it is clear that none will come.
func (c *Cluster) waitOpen(ctx context.Context) error {
	for {
		c.mu.Lock()
		changed, refused, last := c.changed, c.refused, c.lastError
		opened := changed == nil
		c.mu.Unlock()
		switch {
		case opened:
			return nil
		case refused != nil:
			return refused
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("cluster: could not join the other processes: %w",
				errors.Join(ctx.Err(), last))
		}
	}
}

// Close closes the gate, then calls EndAll, then deletes the member record and the guard entry. So
// no process waits for a closed process. If the backend does not answer, Close gives up after 3D/4;
// the other processes then evict the member. A second call waits for the first. Close the Backend
// after Close.
func (c *Cluster) Close() {
	c.mu.Lock()
	c.closed = true
	c.gate.close()
	c.mu.Unlock()
	c.stop()
	c.done.Wait()
}

// Stats holds counts since Start, and two present numbers: Processes, the number of member records,
// and FeedLag. Both are 0 while the process has no membership.
type Stats struct {
	Processes int
	// FeedLag is how long the last heartbeat took from the beginning of its write until the feed
	// delivered it, or how long the oldest heartbeat waits for the feed, if that is longer.
	FeedLag     time.Duration
	Memberships uint64 // how often the process joined
	Closings    uint64 // how often the gate closed because no proof came in time
	Evictions   uint64 // how often this process evicted another process
	Acked       uint64 // how many Barriers ended because all members had acked
	Deadlines   uint64 // how many Barriers ended because the deadline had passed
}

// Stats returns the present counts.
func (c *Cluster) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.counts
	if m := c.member; m != nil {
		s.Processes = len(m.members)
		s.FeedLag = m.feedLagLocked()
	}
	return s
}

// Freshness returns the D of the store.
func (c *Cluster) Freshness() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.freshness
}

// Guard returns the Check that each Apply with an event must contain: see invariant 7. If the Apply
// then returns backend.ErrConflict, the process may have been evicted: call Guard again. Guard
// returns ErrNoMembership while the process has no membership.
func (c *Cluster) Guard() (backend.Change, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member == nil {
		return backend.Change{}, ErrNoMembership
	}
	return backend.Change{Key: c.member.guardKey(), Expect: guardRevision, Check: true}, nil
}

// First reports whether this process has the lowest ID of all members, so that one process does the
// work that no process has to do twice. Two processes may believe to be first for a moment.
func (c *Cluster) First() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.member == nil {
		return false
	}
	own := string(c.member.id[:])
	for id := range c.member.members {
		if id < own {
			return false
		}
	}
	return true
}

// run has one membership after the other until Close.
func (c *Cluster) run() {
	pause := minPause
	for c.ctx.Err() == nil {
		began := c.cfg.Clock().Mono
		err := c.runMembership()
		if c.ctx.Err() != nil {
			return
		}
		c.log.Warn("API key store lost contact with the other processes, and joins again",
			"error", err)
		if c.cfg.Clock().Mono-began > int64(4*maxPause) {
			pause = minPause
		}
		c.sleep(c.ctx, pause)
		pause = min(2*pause, maxPause)
	}
}

// The pauses between two memberships.
const (
	minPause = 50 * time.Millisecond
	maxPause = time.Second
)

// sleep returns after d, or when ctx ends.
func (c *Cluster) sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// limited returns a context for one call of the backend. The timeout is much shorter than D: if
// the engine loses a write, because its leader dies, the next heartbeat must still be in time.
func (c *Cluster) limited(
	ctx context.Context, freshness time.Duration,
) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, max(freshness/4, minTimeout))
}

const minTimeout = 100 * time.Millisecond

// notifyStartLocked makes Start look again.
func (c *Cluster) notifyStartLocked() {
	if c.changed != nil {
		close(c.changed)
		c.changed = make(chan struct{})
	}
}
