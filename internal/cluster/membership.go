package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// errGone ends a membership whose member record was deleted or damaged, or was put back to an
// earlier revision because the engine was restored.
var errGone = errors.New(
	"cluster: the member record of this process was deleted, damaged or restored")

// errLag ends a membership whose feed delivers heartbeats too late, and does not catch up.
var errLag = errors.New("cluster: the feed of this process lags by more than the freshness")

// A membership is the period in which the process has one member record. The fields under the
// comment are guarded by the lock of the Cluster; no other field is written after join.
type membership struct {
	*Cluster
	id        [16]byte
	freshness time.Duration
	ctx       context.Context // ends with the membership
	cancel    context.CancelCauseFunc
	kick      chan struct{}  // wakes the heartbeat writer
	writer    sync.WaitGroup // the heartbeat writer

	// Guarded by the lock of the Cluster:

	ended        bool
	members      map[string]*member // by ID, including the own
	header       header
	applied      backend.Position
	heartbeats   map[uint64]*heartbeat // by number: those that may still become a proof
	lastWritten  uint64                // the number of the last heartbeat that began
	delivered    uint64                // the number of the last heartbeat that was delivered
	watermark    int64                 // in the last heartbeat that began
	lastDelivery int64                 // when a heartbeat was delivered, or the feed was started
	lagSince     int64                 // since when proofs have come too late; 0: the last was in time
	feedLag      time.Duration         // of the last heartbeat that was delivered
	clockAhead   aheadClock            // zero: nothing to report
	damaged      []damagedMember       // to report
	restartFeed  context.CancelFunc    // ends the running Feed, so that follow starts another
}

// runMembership joins, and returns why the membership ended.
func (c *Cluster) runMembership() error {
	m, err := c.join()
	if err == nil {
		err = m.follow()
	}
	c.mu.Lock()
	if m.ended = true; c.ctx.Err() != nil {
		err = ErrClosed
	}
	c.member, c.lastError, c.refused = nil, err, nil
	if isPermanent(err) {
		c.refused = err
	}
	c.gate.close()
	for _, r := range c.requests {
		r.at, r.waiting = 0, nil // the next membership makes the request again
	}
	c.notifyStartLocked()
	c.mu.Unlock()

	cause := ErrNoMembership
	if errors.Is(err, ErrClosed) {
		cause = ErrClosed
	}
	c.cfg.EndAll(cause)
	m.cancel(err)
	m.writer.Wait()
	m.leave()
	return err
}

// isPermanent reports whether no membership can start until a person changes something.
func isPermanent(err error) bool {
	return errors.Is(err, ErrFreshness) || errors.Is(err, record.ErrNewer) ||
		errors.Is(err, errHeader) || errors.Is(err, backend.ErrClosed)
}

// join is step 1 of a membership: join writes the member record and the guard entry. join returns
// a membership also with an error, because the outcome of the write may be unknown.
//
// The Apply writes the header too, so of two processes that join at the same time, one conflicts
// and reads the header again. Otherwise one process could replace the D of a table that is no
// longer empty.
func (c *Cluster) join() (*membership, error) {
	m := &membership{
		Cluster: c, kick: make(chan struct{}, 1), members: make(map[string]*member),
		heartbeats: make(map[uint64]*heartbeat), freshness: c.cfg.Freshness,
	}
	if m.freshness == 0 {
		m.freshness = DefaultFreshness
	}
	_, _ = rand.Read(m.id[:]) // never returns an error
	m.ctx, m.cancel = context.WithCancelCause(c.ctx)
	if c.cfg.Wrong.has(flushEarly) {
		c.cfg.Flush()
	}
	for {
		err := m.tryJoin()
		if !errors.Is(err, backend.ErrConflict) || m.ctx.Err() != nil {
			return m, err
		}
		c.sleep(m.ctx, mathrand.N(minPause))
	}
}

func (m *membership) tryJoin() error {
	ctx, cancel := m.limited(m.ctx, m.freshness)
	defer cancel()
	h, err := m.readHeader(ctx)
	if err != nil {
		return err
	}
	if err := m.agree(ctx, &h); err != nil {
		return err
	}
	m.mu.Lock()
	number := m.lastNumber
	m.mu.Unlock()
	m.freshness = h.freshness
	change, err := h.change()
	if err != nil {
		return err
	}
	value, err := record.EncodeMember(&record.Member{
		Request: number, Floor: h.floor, Name: m.cfg.Name, Time: m.cfg.Clock().Wall,
	})
	if err != nil {
		return err
	}
	err = m.cfg.Backend.Apply(ctx, change,
		backend.Change{Key: m.memberKey(), Value: value, Restricts: true},
		backend.Change{Key: m.guardKey(), Restricts: true})
	if err != nil {
		return fmt.Errorf("cluster: join: %w", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.Cluster.freshness = h.freshness
	for _, r := range m.requests {
		r.freshness = max(r.freshness, h.freshness)
	}
	m.writtenLocked(number)
	return nil
}

// agree sets the D of the header, or returns ErrFreshness. Only an empty table takes another D,
// because a process that waits until a deadline must know the D of every proof.
func (m *membership) agree(ctx context.Context, h *header) error {
	want := m.cfg.Freshness
	switch {
	case h.freshness == 0: // a new table
		h.freshness = m.freshness
		return nil
	case want == 0 || want == h.freshness:
		return nil
	}
	for e, err := range m.cfg.Backend.Scan(ctx, []byte{memberSpace}, []byte{memberSpace + 1}) {
		if err != nil {
			return err
		}
		if len(e.Key) == memberKeyLen {
			return fmt.Errorf("%w: %v, and this process is configured with %v: configure all "+
				"processes with the same freshness, or with 0 to use the freshness of the store",
				ErrFreshness, h.freshness, want)
		}
	}
	h.freshness = want
	return nil
}

// follow does steps 2 to 5 of a membership, and returns why the membership ended.
func (m *membership) follow() error {
	after := backend.Position(0)
	for {
		err := m.followFeed(&after)
		if cause := context.Cause(m.ctx); cause != nil {
			return cause
		}
		if after == 0 || errors.Is(err, errGone) || errors.Is(err, backend.ErrGap) ||
			errors.Is(err, backend.ErrClosed) {
			return err
		}
		m.sleep(m.ctx, m.freshness/64) // the next Feed starts after applied, so nothing is missed
	}
}

// followFeed applies the batches of one Feed until the Feed ends.
func (m *membership) followFeed(after *backend.Position) error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	m.mu.Lock()
	m.restartFeed, m.lastDelivery = cancel, m.cfg.Clock().Mono
	m.mu.Unlock()
	if *after == 0 {
		// No heartbeat shows yet that the feed is silent.
		defer time.AfterFunc(m.freshness, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.member != m {
				cancel()
			}
		}).Stop()
	}
	from, to := []byte{feedFrom}, []byte{feedTo}
	for b, err := range m.cfg.Backend.Feed(ctx, from, to, *after) {
		switch {
		case err != nil:
			return fmt.Errorf("cluster: feed: %w", err)
		case *after == 0:
			if err := m.begin(ctx, b.Position); err != nil {
				return err
			}
			m.writer.Go(m.writeHeartbeats)
		default:
			if err := m.applyBatch(b); err != nil {
				return err
			}
		}
		*after = b.Position
	}
	return errors.New("cluster: the feed has ended without an error")
}

// begin does steps 3 and 4: begin flushes the cache, and reads the membership table.
func (m *membership) begin(ctx context.Context, start backend.Position) error {
	if !m.cfg.Wrong.has(flushEarly) {
		m.cfg.Flush()
	}
	ctx, cancel := m.limited(ctx, m.freshness)
	defer cancel()
	members := make(map[string]*member)
	for e, err := range m.cfg.Backend.Scan(ctx, []byte{memberSpace}, []byte{memberSpace + 1}) {
		if errors.Is(err, backend.ErrCorrupt) {
			return fmt.Errorf("cluster: read the membership table: %w: the other processes remove "+
				"a damaged member record: if there are none, stop all processes of the store, and "+
				"delete the entry", err)
		}
		if err != nil {
			return fmt.Errorf("cluster: read the membership table: %w", err)
		}
		if len(e.Key) != memberKeyLen {
			continue
		}
		other := parseMember(e, 0, m.cfg.Clock().Mono)
		members[memberID(e.Key)] = other
		if other.damaged != nil {
			m.reportDamage(damagedMember{e.Key, other.damaged})
		}
	}
	// The header comes after the members: a member that left before the Scan could read its record
	// has left its floor in the header.
	h, err := m.readHeader(ctx)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.raiseFloorLocked(h.floor)
	for _, other := range members {
		m.raiseFloorLocked(other.floor)
		m.latest = max(m.latest, other.last)
	}
	floor := m.floor
	m.mu.Unlock()
	m.stamps(floor) // before Guard allows the first stamp of the membership

	m.mu.Lock()
	defer m.mu.Unlock()
	m.members, m.header, m.applied = members, h, start
	m.member = m
	m.counts.Memberships++
	return nil
}

// applyBatch is step 5, for one Batch.
func (m *membership) applyBatch(b backend.Batch) error {
	var records []backend.Entry
	number, wake := uint64(0), false
	m.mu.Lock()
	for _, e := range b.Changes {
		if e.Key[0] != memberSpace {
			records = append(records, e)
			continue
		}
		if len(e.Key) != memberKeyLen {
			m.headerChangedLocked(e)
			continue
		}
		own, requested := m.memberChangedLocked(e, b.Position)
		if own && e.Revision == 0 {
			m.mu.Unlock()
			return errGone
		}
		wake = wake || requested && !own
		if own {
			number = m.ownDeliveredLocked(e, b.Position)
		}
	}
	ahead, damaged := m.clockAhead, m.damaged
	m.clockAhead, m.damaged = aheadClock{}, nil
	m.mu.Unlock()
	m.reportClock(ahead)
	m.reportDamage(damaged...)
	if len(records) > 0 {
		m.cfg.Changed(records)
	}
	m.mu.Lock()
	m.applied = b.Position
	if number != 0 {
		m.delivered = max(m.delivered, number)
		m.lastDelivery = m.cfg.Clock().Mono
		if h := m.heartbeats[number]; h != nil {
			m.feedLag = time.Duration(m.lastDelivery - h.began.Mono)
		}
	}
	m.finishLocked()
	m.proveLocked()
	m.mu.Unlock()
	if wake {
		m.wake()
	}
	return nil
}

// leave deletes the own member record and the guard entry, after the gate was closed. leave raises
// the floor of the header in the same Apply: see invariant 8.
//
// A conflict comes from a late heartbeat of this process, or from the header, which each process
// that joins writes. So leave repeats many conflicts, and few other errors.
func (m *membership) leave() {
	for conflicts, failures := 0, 0; conflicts < 100 && failures < 3; {
		err := m.tryLeave()
		switch {
		case err == nil, errors.Is(err, backend.ErrNotFound):
			return
		case errors.Is(err, backend.ErrConflict):
			conflicts++
			time.Sleep(mathrand.N(10 * time.Millisecond))
		default:
			failures++
		}
	}
}

func (m *membership) tryLeave() error {
	_, last := m.stamps(0)
	m.mu.Lock()
	m.latest = max(m.latest, last)
	m.mu.Unlock()
	ctx, cancel := m.limited(context.WithoutCancel(m.ctx), m.freshness)
	defer cancel()
	e, err := m.cfg.Backend.Get(ctx, m.memberKey())
	if errors.Is(err, backend.ErrCorrupt) {
		e.Revision, err = damagedRevision, nil
	}
	if err != nil {
		return err
	}
	h, err := m.readHeader(ctx)
	if err != nil {
		return err
	}
	return m.remove(ctx, m.memberKey(), e.Revision, h)
}

// damagedRevision is the revision at which a Feeder deletes an entry whose revision is damaged.
const damagedRevision = math.MaxUint64

// remove deletes a member record at a revision, and the guard entry of the member, and carries the
// floor on in the header.
func (m *membership) remove(ctx context.Context, key []byte, revision uint64, h header) error {
	guard, err := m.removeGuard(ctx, guardKeyOf(key))
	if err != nil {
		return err
	}
	changes := []backend.Change{
		{Key: key, Expect: revision, Delete: true, Restricts: true}, guard,
	}
	m.mu.Lock()
	floor := max(m.floor, m.latest)
	m.mu.Unlock()
	if floor > h.floor && !m.cfg.Wrong.has(keepFloor) {
		h.floor = floor
		if h.freshness == 0 {
			h.freshness = m.freshness
		}
		change, err := h.change()
		if err != nil {
			return err
		}
		changes = append(changes, change)
	}
	return m.cfg.Backend.Apply(ctx, changes...)
}

// removeGuard returns the Change that makes sure that a guard entry is gone. A member record that
// was not written by a process may have no guard entry, or another one.
func (m *membership) removeGuard(ctx context.Context, key []byte) (backend.Change, error) {
	e, err := m.cfg.Backend.Get(ctx, key)
	switch {
	case errors.Is(err, backend.ErrNotFound):
		return backend.Change{Key: key, Check: true}, nil
	case errors.Is(err, backend.ErrCorrupt):
		e.Revision = damagedRevision
	case err != nil:
		return backend.Change{}, err
	}
	return backend.Change{Key: key, Expect: e.Revision, Delete: true, Restricts: true}, nil
}
