package cluster

import (
	"errors"
	"math"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A heartbeat is one write of the member record that is not yet a proof.
type heartbeat struct {
	began     Instant // before the write
	confirmed bool
}

// wake makes the heartbeat writer write without delay.
func (m *membership) wake() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

// writeHeartbeats writes the member record every D/4, and when wake was called. One write at a time
// is under way.
func (m *membership) writeHeartbeats() {
	tick := time.NewTicker(m.freshness / 4)
	defer tick.Stop()
	revision := uint64(1) // of the member record
	for m.ctx.Err() == nil {
		if err := m.writeHeartbeat(&revision); err != nil {
			// The next heartbeat must not wait for the tick.
			if err := m.resolve(&revision); err != nil {
				m.cancel(err)
			}
			continue
		}
		m.evictSilent()
		m.checkFeed()
		select {
		case <-tick.C:
		case <-m.kick:
		case <-m.ctx.Done():
		}
	}
}

// writeHeartbeat makes one heartbeat. After an error, the outcome is unknown.
func (m *membership) writeHeartbeat(revision *uint64) error {
	r := m.nextRecord()
	key := m.trackedAs(r.Heartbeat, *revision+1)
	value, err := record.EncodeMember(r)
	if err != nil {
		return err
	}
	ctx, cancel := m.limited(m.ctx, m.freshness)
	defer cancel()
	m.began(key)
	err = m.cfg.Backend.Apply(ctx, backend.Change{
		Key: m.memberKey(), Value: value, Expect: *revision, Restricts: true,
	})
	if m.cfg.Wrong.has(beganLate) {
		m.began(key)
	}
	if err != nil {
		return err
	}
	*revision++
	m.confirmed(key, r.Request)
	return nil
}

// nextRecord returns the record of the next heartbeat.
func (m *membership) nextRecord() *record.Member {
	// An ack must have the last stamp of a moment after the request: see Watermark. So the stamps
	// come after the position.
	m.mu.Lock()
	floor, applied, request := m.floor, m.applied, m.lastNumber
	m.mu.Unlock()
	watermark, last := m.stamps(floor)

	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastWritten++
	m.watermark = watermark
	m.latest = max(m.latest, last)
	return &record.Member{
		Heartbeat: m.lastWritten, Applied: uint64(applied), Request: request,
		Floor: floor, Watermark: watermark, Last: last, Name: m.cfg.Name, Time: m.cfg.Clock().Wall,
	}
}

// trackedAs returns the number by which a heartbeat is identified.
func (m *membership) trackedAs(number, revision uint64) uint64 {
	if m.cfg.Wrong.has(byRevision) {
		return revision
	}
	return number
}

// began notes that the write of a heartbeat begins now.
func (m *membership) began(number uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.heartbeats[number] = &heartbeat{began: m.cfg.Clock()}
	if len(m.heartbeats) > maxHeartbeats {
		m.forgetHeartbeatsLocked()
	}
}

// maxHeartbeats is the number of heartbeats from which on the process forgets some.
const maxHeartbeats = 256

// forgetHeartbeatsLocked forgets the heartbeats that are not confirmed and began more than D ago,
// except the first: while the engine refuses writes, each attempt is another heartbeat. None of
// these can open the gate. The first heartbeat stays for feedLagLocked. A confirmed heartbeat
// stays, because proveLocked finds with it that the feed lags.
func (m *membership) forgetHeartbeatsLocked() {
	now, first := m.cfg.Clock().Mono, uint64(math.MaxUint64)
	for number := range m.heartbeats {
		first = min(first, number)
	}
	for number, h := range m.heartbeats {
		if !h.confirmed && number != first && now-h.began.Mono > int64(m.freshness) {
			delete(m.heartbeats, number)
		}
	}
}

// confirmed notes that the write of a heartbeat with a request number returned nil.
func (m *membership) confirmed(number, request uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.heartbeats[number]; h != nil {
		h.confirmed = true
	}
	m.writtenLocked(request)
	m.finishLocked()
	m.proveLocked()
}

// resolve reads the revision of the member record after a heartbeat with an unknown outcome.
// resolve returns errGone if the member record was deleted, has an earlier revision, or has lost
// its revision.
func (m *membership) resolve(revision *uint64) error {
	for {
		e, err := m.readOwn()
		switch {
		case errors.Is(err, backend.ErrNotFound), errors.Is(err, backend.ErrCorrupt),
			err == nil && e.Revision < *revision:
			return errGone
		case err == nil && e.Revision > *revision:
			if m.cfg.Wrong.has(byRevision) && e.Revision == *revision+1 {
				m.confirmed(e.Revision, 0)
			}
			*revision = e.Revision
			return nil
		}
		m.sleep(m.ctx, m.freshness/64)
		if err == nil || m.ctx.Err() != nil {
			return nil
		}
	}
}

func (m *membership) readOwn() (backend.Entry, error) {
	ctx, cancel := m.limited(m.ctx, m.freshness)
	defer cancel()
	return m.cfg.Backend.Get(ctx, m.memberKey())
}

// ownDeliveredLocked notes that the feed has delivered the own member record at a position, and
// returns the number of the heartbeat.
func (m *membership) ownDeliveredLocked(e backend.Entry, at backend.Position) (number uint64) {
	own := m.members[string(m.id[:])]
	if own == nil || own.revision != e.Revision {
		return 0
	}
	m.placeLocked(own.request, at)
	return m.trackedAs(own.heartbeat, e.Revision)
}

// proveLocked raises the gate after a heartbeat was confirmed, or was delivered: see invariant 2.
func (m *membership) proveLocked() {
	if m.ended || m.closed {
		return
	}
	last := uint64(0) // the last proof
	for number, h := range m.heartbeats {
		proves := h.confirmed || m.cfg.Wrong.has(unconfirmed)
		if proves && number <= m.delivered && number > last {
			last = number
		}
	}
	if last == 0 {
		return
	}
	now := m.cfg.Clock()
	open := m.gate.raise(m.heartbeats[last].began, now, m.freshness)
	switch {
	case open:
		m.lagSince = 0
	case m.lagSince == 0:
		m.lagSince = now.Mono
	}
	for number := range m.heartbeats {
		if number <= last {
			delete(m.heartbeats, number)
		}
	}
	if open && m.changed != nil { // for the first time since Start
		close(m.changed)
		m.changed = nil
	}
}

// feedLagLocked returns Stats.FeedLag.
func (m *membership) feedLagLocked() time.Duration {
	lag, now := m.feedLag, m.cfg.Clock().Mono
	for number, h := range m.heartbeats {
		if number > m.delivered {
			lag = max(lag, time.Duration(now-h.began.Mono))
		}
	}
	return lag
}

// checkFeed starts the feed again if heartbeats are confirmed and none was delivered for D: the
// feed may come from a server that was deposed.
//
// A feed may also lag: after a silence, the feed delivers each heartbeat when its proof has run out
// already, and new changes may come as fast as the process applies the old ones. Such a process
// would never be fresh again. So checkFeed ends the membership if the feed has not caught up within
// D(1+rho). The next membership starts its feed at the present.
func (m *membership) checkFeed() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.cfg.Clock().Mono
	switch {
	case m.lagSince != 0 && now-m.lagSince > int64(Bound(m.freshness)):
		m.cancel(errLag)
	case now-m.lastDelivery > int64(m.freshness):
		m.lastDelivery = now
		m.restartFeed()
	}
}
