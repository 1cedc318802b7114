package keystore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A processes connects a Store with the other processes that have the same store open. A Store has
// a processes if its backend is a backend.Feeder. Package cluster has the protocol and its
// invariants. This type says where the Store takes part:
//
//  1. (gate) Verify and Bind ask the gate before the look into the cache. Bind asks again after the
//     registration, and each Cause, Err and Done of a bound context asks. A bound context that
//     finds the gate closed has ended for good.
//  2. (feed) Each record that the feed delivers goes through Publish of the fence. A record that
//     was deleted, or cannot be read, ends the bindings of its key. After a gap in the feed, Flush
//     evicts all keys and ends all bindings.
//  3. (guard) Each Apply with an event Checks the guard entry of the process. The process gets the
//     guard before the stamp of the event: so the stamp is above every floor that was in the table
//     when the membership of the guard began.
//  4. (stamp) A stamp stays pending until the outcome of its Apply is certain: see resolve.
//  5. (barrier) A call that changes keys returns nil only after a Barrier that began after the
//     commit. A call that finds nothing to change makes a Barrier too, because the change that it
//     finds may be in force in this process only.
type processes struct {
	cluster *cluster.Cluster
	wrong   variant // for tests

	mu      sync.Mutex    // guards all below
	changed chan struct{} // closed when the feed delivers a record; nil: no reader waits
	watches []*addWatch   // of the running calls of RevokeAll
}

// An addWatch collects the keys that the feed delivers and that a query selects. If RevokeAll has
// not read a key because the key was added during the call, the key is one of these.
type addWatch struct {
	query Query
	ids   []token.ID // perhaps a key twice
	many  bool       // the query may select more keys than those of ids
}

// maxAdded is the largest number of keys that an addWatch collects.
const maxAdded = 4096

// watch begins an addWatch.
func (p *processes) watch(q Query) *addWatch {
	w := &addWatch{query: q}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watches = append(p.watches, w)
	return w
}

// unwatch ends an addWatch.
func (p *processes) unwatch(w *addWatch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watches = slices.DeleteFunc(p.watches, func(other *addWatch) bool { return other == w })
}

// found returns the keys that an addWatch has collected up to now, in ascending order. many means
// that there may be more.
func (p *processes) found(w *addWatch) (ids []token.ID, many bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids = slices.Clone(w.ids)
	slices.SortFunc(ids, func(a, b token.ID) int { return bytes.Compare(a[:], b[:]) })
	return slices.Compact(ids), w.many
}

// A deliveredRecord is a record that the feed has delivered, and is decoded at most once.
type deliveredRecord struct {
	entry   backend.Entry
	decoded bool
	record  *keyRecord // nil: not decoded, or damaged
}

// decode returns the record, or nil if the record is damaged.
func (d *deliveredRecord) decode() *keyRecord {
	if !d.decoded {
		d.decoded = true
		if kr, err := parseKeyRecord(d.entry); err == nil {
			d.record = kr
		}
	}
	return d.record
}

// cached returns the key of the record, or nil if the record is damaged.
func (d *deliveredRecord) cached() *cachedKey {
	if kr := d.decode(); kr != nil {
		return kr.cached()
	}
	return nil
}

// noteDelivered adds a delivered key to the watches.
func (p *processes) noteDelivered(id token.ID, d *deliveredRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.watches {
		if w.many || record.IsRevoked(d.entry.Value) {
			continue
		}
		switch kr := d.decode(); {
		case kr != nil && (kr.record.RevokedAt != 0 || !w.query.selects(&kr.cached().key)):
		case len(w.ids) == maxAdded:
			w.many = true
		default:
			w.ids = append(w.ids, id)
		}
	}
}

// Why Verify and Bind refuse every token, and why sessions end, while the process is out of contact
// with the other processes.
var (
	errStale        = fmt.Errorf("%w: %w", ErrUnavailable, cluster.ErrStale)
	errNoMembership = fmt.Errorf("%w: %w", ErrUnavailable, cluster.ErrNoMembership)
)

// joinProcesses joins the other processes, if the backend is a Feeder. joinProcesses returns when
// the process may admit callers, and waits for at most Options.Timeout.
func (s *Store) joinProcesses() error {
	freshness := s.freshness
	feeder, ok := s.backend.(backend.Feeder)
	if !ok {
		if freshness != 0 {
			return invalid("Options.Freshness is %v, but the backend is not a backend.Feeder: the "+
				"store belongs to one process, so set Freshness to 0", freshness)
		}
		return nil
	}
	if err := s.checkFreshness(freshness); err != nil {
		return err
	}
	p := new(processes)
	s.processes = p
	s.reads = newSharedReads(func(ctx context.Context, id token.ID) (backend.Entry, error) {
		return s.backend.Get(ctx, storageKey(id))
	}, s.limitedWrite)
	ctx, cancel := s.limited(context.Background())
	defer cancel()
	cfg := cluster.Config{
		Backend:   feeder,
		Freshness: freshness,
		Changed:   s.publishDelivered,
		Flush:     s.flushCache,
		EndAll:    s.endAll,
		Stamps:    s.sequencer.Raise,
		Name:      processName(),
		Log:       s.log,
	}
	if s.configureCluster != nil {
		s.configureCluster(&cfg)
	}
	c, err := cluster.Start(ctx, cfg)
	switch {
	case errors.Is(err, cluster.ErrFreshness), errors.Is(err, record.ErrNewer):
		return invalid("Options.Freshness: %s", strings.TrimPrefix(err.Error(), "cluster: "))
	case err != nil:
		return wrapErr("join the other processes", err)
	}
	p.cluster = c
	if err := s.checkFreshness(c.Freshness()); err != nil {
		c.Close()
		return err
	}
	return nil
}

// checkFreshness returns ErrInvalid if the freshness is not usable with the timeout. 0 is usable:
// the freshness of the store is not known yet.
func (s *Store) checkFreshness(freshness time.Duration) error {
	switch bound := cluster.Bound(freshness); {
	case freshness == 0:
		return nil
	case freshness < cluster.MinFreshness:
		return invalid("Options.Freshness is %v: it must be 0, or at least %v", freshness,
			cluster.MinFreshness)
	case s.timeout > 0 && s.timeout <= bound:
		return invalid("Options.Timeout is %v, and the freshness of the store is %v: a change may "+
			"wait for other processes for %v, so Timeout must be longer", s.timeout, freshness,
			bound)
	}
	return nil
}

// processName names this process for people who read the membership table.
func processName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	return fmt.Sprintf("%s, process %d", host, os.Getpid())
}

// isFresh reports whether this process may admit a caller.
func (s *Store) isFresh() bool { return s.processes == nil || s.processes.cluster.Fresh() }

// refuseStale returns why a call is refused that has found the gate closed.
func (s *Store) refuseStale(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	return errStale
}

// publishDelivered is cluster.Config.Changed. Most keys that other processes change are used by no
// session of this process, and by no running RevokeAll. So publishDelivered decodes a record only
// if one of these needs the record.
func (s *Store) publishDelivered(entries []backend.Entry) {
	for _, e := range entries {
		if len(e.Key) != 1+len(token.ID{}) || e.Key[0] != keySpace {
			continue
		}
		id := token.ID(e.Key[1:])
		a := s.accounts.find(id)
		if e.Revision == 0 { // purged
			if a != nil {
				a.hold()
			}
			s.fence.Publish(id, nil, ErrRevoked)
			continue
		}
		d := &deliveredRecord{entry: e}
		if a != nil && !s.isWrong(noCreditNote) {
			if e := d.cached(); e != nil {
				a.noteKey(e)
			} else {
				a.hold()
			}
		}
		s.processes.noteDelivered(id, d)
		s.fence.Publish(id, d.cached, ErrNarrowed)
	}
	s.processes.noteChanged()
}

// flushCache is cluster.Config.Flush.
func (s *Store) flushCache() {
	if !s.isWrong(noCreditHold) {
		for _, a := range s.accounts.list() {
			a.hold()
		}
	}
	s.fence.Flush(errNoMembership)
	s.processes.noteFlush()
	s.processes.noteChanged()
}

// noteFlush notes in the watches that the feed has left out changes.
func (p *processes) noteFlush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, w := range p.watches {
		w.many = true
	}
}

// endAll is cluster.Config.EndAll.
func (s *Store) endAll(cause error) {
	switch {
	case errors.Is(cause, cluster.ErrStale):
		cause = errStale
	case errors.Is(cause, cluster.ErrClosed):
		cause = ErrClosed
	default:
		cause = errNoMembership
	}
	s.fence.EndAll(cause)
}

// noteChanged wakes the readers that wait for events of other processes.
func (p *processes) noteChanged() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.changed != nil {
		close(p.changed)
		p.changed = nil
	}
}

// nextChange returns a channel that is closed when the feed delivers the next record.
func (p *processes) nextChange() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.changed == nil {
		p.changed = make(chan struct{})
	}
	return p.changed
}

// barrier returns nil when every change that was committed before the call is in force in every
// process. Otherwise barrier returns ErrNotEverywhere. In a store of one process, barrier does
// nothing.
func (s *Store) barrier(ctx context.Context, doing string) error {
	if s.processes == nil || doing == "restore" && s.isWrong(noRestoreBarrier) {
		return nil
	}
	began := time.Now()
	err := s.processes.cluster.Barrier(ctx)
	s.counts.barriers.since(began)
	if err == nil {
		return nil
	}
	cause := endOf(ctx)
	if cause == nil {
		cause = ErrClosed
	}
	return &messageError{
		fmt.Sprintf("keystore: %s: %v: %v after the change, it is in force in every process: %v",
			doing, ErrNotEverywhere, cluster.Bound(s.processes.cluster.Freshness()), cause),
		errors.Join(ErrNotEverywhere, cause),
	}
}

// guard returns the Change that each Apply with an event must contain. In a store of one process,
// there is no such Change, and the result is nil.
func (s *Store) guard() (*backend.Change, error) {
	if s.processes == nil || s.isWrong(noGuard) {
		return nil, nil
	}
	c, err := s.processes.cluster.Guard()
	if err != nil {
		return nil, errNoMembership
	}
	return &c, nil
}

// mayRetry reports whether a write that returned err has changed nothing, and may succeed later.
func mayRetry(err error) bool {
	return errors.Is(err, backend.ErrConflict) || errors.Is(err, cluster.ErrNoMembership)
}

// resolve makes the outcome of an Apply certain whose answer was lost, because readers of events
// wait for the stamp, in every process. resolve returns true when the Apply was made, or can no
// longer be made. If the store closes first, resolve returns false. Close then deletes the guard
// entry, so that the Apply can no longer be made.
//
// The Apply expects that there is no event with its stamp. So resolve writes a void event with the
// stamp, which no reader receives. If that write succeeds, the Apply will conflict. If the write
// conflicts, there is an event with the stamp: of this Apply, which was made, or of another
// process. The Apply makes all its changes or none, so one of its events is enough.
func (s *Store) resolve(p *prepared) (certain bool) {
	void, err := record.EncodeEvent(&record.Event{
		Action: record.Action_ACTION_VOID, KeyId: p.event.KeyId, Revision: p.event.Revision,
	})
	if err != nil {
		return false // impossible: the encoding of the event itself succeeded
	}
	for s.serving() == nil {
		ctx, cancel := s.limitedWrite(s.serves)
		err := s.backend.Apply(ctx,
			// RevokeAll waits for the outcome, so a full storage must accept the void event.
			backend.Change{Key: eventKey(p.stamp), Value: void, Restricts: true},
			backend.Change{Key: eventIndexKey(p.key.ID, p.stamp)})
		cancel()
		if !outcomeUnknown(err) && !errors.Is(err, backend.ErrFull) {
			return true
		}
		if !s.pause(context.Background(), maxPause) {
			break
		}
	}
	return false
}

// retries reports whether a write that returned err may succeed later, and waits before the next
// attempt. The write changed nothing. In a store of several processes, a write may lose a race
// against another process, may have the stamp of another process, or may begin while the process
// has no membership. The random pause gives each process its turn: the change queue orders only
// the changes of this process. A change that restricts a key pauses for less.
//
// attempt counts from 0. In a store of one process, the attempts are limited, and there is no
// pause.
func (s *Store) retries(ctx context.Context, err error, attempt int, restricts bool) bool {
	if s.processes == nil {
		return errors.Is(err, backend.ErrConflict) && attempt+1 < changeAttempts
	}
	longest := maxPause
	if restricts {
		longest /= 4
	}
	return mayRetry(err) && s.pause(ctx, longest)
}

// contention returns the error of a change for which retries has returned false. lost is the error
// of the last write.
func (s *Store) contention(ctx context.Context, doing string, lost error) error {
	ended := endOf(ctx)
	switch {
	case s.serving() != nil:
		return s.serving()
	case ended != nil && !errors.Is(ended, errSlow):
		return ended
	case errors.Is(lost, backend.ErrConflict):
		lost = errors.New("too much contention on this key")
	}
	return wrapErr(doing, lost)
}

// pause returns true after a random time up to longest. If ctx ends first, or the store stops,
// pause returns false.
func (s *Store) pause(ctx context.Context, longest time.Duration) bool {
	timer := time.NewTimer(minPause + rand.N(longest-minPause))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	case <-s.serves.Done():
		return false
	}
}

// leaveProcesses deletes the member record of this process, so that no process waits for this
// process. leaveProcesses first waits for the writes that are under way: without the guard entry,
// these writes would fail.
func (s *Store) leaveProcesses() {
	p := s.processes
	if p == nil {
		return
	}
	s.writes.Wait() // each write ends: see limitedWrite
	p.cluster.Close()
	if err := s.completeUsage(context.Background()); err != nil {
		s.log.Warn("API key store could not write that all uses of keys are known", "error", err)
	}
}

// The shortest and the longest pause before a change tries again that lost a race against another
// process.
const (
	minPause = time.Millisecond
	maxPause = 50 * time.Millisecond
)
