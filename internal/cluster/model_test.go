package cluster

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// testFreshness is D in the bubbles.
const testFreshness = time.Second

// A world is several processes on one engine.
type world struct {
	engine *backendtest.Shared
	wrong  Variant
	start  time.Time

	mu         sync.Mutex
	returned   map[string]uint64 // by key: the highest revision whose change has returned
	violations []string
	processes  []*process
	reads      []eventRead

	admitted, refused, changes, watermarks atomic.Int64
}

// An eventRead is what a reader of events saw up to a watermark.
type eventRead struct {
	last   int64
	events map[int64]bool
}

func newWorld(wrong Variant) *world {
	return &world{engine: backendtest.NewShared(), wrong: wrong, start: time.Now(),
		returned: map[string]uint64{}}
}

func (w *world) violated(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.violations) == 10 {
		return
	}
	w.violations = append(w.violations, fmt.Sprintf("%v: ", time.Since(w.start))+
		fmt.Sprintf(format, args...))
}

func (w *world) broken() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.violations) > 0
}

// A process is a model of a store: a cache by revision, the bindings, and the stamps of events.
type process struct {
	voids sync.WaitGroup // the calls of voidEvent; ends before the pending calls of the link
	*world
	name string
	link *link
	c    *Cluster
	log  *slog.Logger // nil: no log

	rate   float64      // of the monotonic clock
	asleep atomic.Int64 // how long the monotonic clock has stood still
	shift  atomic.Int64 // of the wall clock
	sleeps bool         // chaos: the machine sleeps, and its wall clock is never set

	mu       sync.Mutex
	gen      uint64
	cache    map[string]uint64
	bindings map[*binding]struct{}
	stamps   stamps

	// For forced tests: step runs between the steps of an admission, and the other fields leave out
	// parts of the work that package keystore does.
	step         func(point string)
	gateLate     bool // the gate is asked after the look into the cache
	noSecondLook bool // a Bind does not ask the gate again
}

type binding struct {
	key      string
	revision uint64
	ended    bool
}

// stamps is a small sequencer.
type stamps struct {
	mu      sync.Mutex
	last    int64
	pending map[int64]bool
}

func (s *stamps) begin(now int64) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last+1, now)
	s.pending[s.last] = true
	return s.last
}

func (s *stamps) end(stamp int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pending, stamp)
}

// newest returns the last stamp.
func (s *stamps) newest() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

func (s *stamps) raise(floor int64) (watermark, last int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, floor)
	watermark = s.last
	for stamp := range s.pending {
		watermark = min(watermark, stamp-1)
	}
	return watermark, s.last
}

// add makes a process that has not joined yet.
func (w *world) add(name string, seed uint64) *process {
	p := &process{world: w, name: name, link: newLink(w.engine.Open(), seed), rate: 1,
		cache: map[string]uint64{}, bindings: map[*binding]struct{}{},
		stamps: stamps{pending: map[int64]bool{}}, step: func(string) {}}
	w.mu.Lock()
	w.processes = append(w.processes, p)
	w.mu.Unlock()
	return p
}

func (p *process) clock() Instant {
	mono := int64(float64(time.Since(p.world.start)-time.Duration(p.asleep.Load())) * p.rate)
	return Instant{mono + 1, time.Now().UnixNano() + p.shift.Load()}
}

// join starts the Cluster of the process.
func (p *process) join(ctx context.Context, freshness time.Duration) error {
	c, err := Start(ctx, Config{
		Backend: p.link, Freshness: freshness, Name: p.name, Wrong: p.wrong, Clock: p.clock,
		Changed: p.changed, Flush: p.flush, EndAll: p.endAll,
		Stamps: p.stamps.raise, Log: p.log,
	})
	p.c = c
	return err
}

func (p *process) changed(entries []backend.Entry) {
	p.link.pause()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gen++
	for _, e := range entries {
		delete(p.cache, string(e.Key))
		for b := range p.bindings {
			if b.key == string(e.Key) && b.revision < e.Revision {
				b.ended = true
			}
		}
	}
}

func (p *process) flush() {
	p.link.pause()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gen++
	clear(p.cache)
}

func (p *process) endAll(error) {
	p.link.pause()
	p.mu.Lock()
	defer p.mu.Unlock()
	for b := range p.bindings {
		b.ended = true
	}
	clear(p.bindings)
}

// fresh is Fresh, with the clocks of the process.
func (p *process) fresh() bool { return p.c.Fresh() }

var errRefused = errors.New("refused")

// admit returns the revision of a key that the process admits, as Verify or as Bind, and checks C1,
// C4 and C6.
func (p *process) admit(ctx context.Context, key string, bind bool) (*binding, error) {
	p.link.pause()
	p.world.mu.Lock()
	least := p.world.returned[key] // before the call begins
	p.world.mu.Unlock()
	began := time.Now()
	b, err := p.look(ctx, key, bind)
	if err != nil {
		p.refused.Add(1)
		return nil, err
	}
	p.admitted.Add(1)
	if b.revision < least {
		p.violated("C4: %s admitted %q at revision %d, after revision %d had returned",
			p.name, key, b.revision, least)
	}
	if proof := p.link.proof(); began.Sub(proof) > Bound(testFreshness) && !p.link.hooked() {
		p.violated("C6: %s admitted %q %v after the last proof", p.name, key, began.Sub(proof))
	}
	return b, nil
}

func (p *process) look(ctx context.Context, key string, bind bool) (*binding, error) {
	if !p.gateLate && !p.fresh() {
		return nil, errRefused
	}
	p.step("look")
	b := &binding{key: key}
	p.mu.Lock()
	gen := p.gen
	revision, hit := p.cache[key]
	if hit {
		b.revision = revision
		p.bindLocked(b, bind)
	}
	p.mu.Unlock()
	if hit {
		p.step("hit")
	}
	if p.gateLate && !p.fresh() {
		return nil, errRefused
	}
	if !hit {
		e, err := p.link.Get(ctx, []byte(key))
		if err != nil {
			return nil, err
		}
		p.step("install")
		p.mu.Lock()
		b.revision = e.Revision
		if gen == p.gen {
			p.cache[key] = e.Revision
			p.bindLocked(b, bind)
		}
		stale := gen != p.gen
		p.mu.Unlock()
		if stale && bind {
			return nil, errRefused
		}
	}
	if bind && !p.noSecondLook && !p.fresh() {
		p.release(b)
		return nil, errRefused
	}
	return b, nil
}

func (p *process) bindLocked(b *binding, bind bool) {
	if bind {
		p.bindings[b] = struct{}{}
	}
}

func (p *process) release(b *binding) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.bindings, b)
	b.ended = true
}

// alive returns the bindings of a key, from before a revision, whose context has no error.
func (p *process) alive(key string, revision uint64) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for b := range p.bindings {
		if b.key == key && b.revision < revision && !b.ended && p.fresh() {
			n++
		}
	}
	return n
}

// change writes a new revision of a key, with an event, and returns once the change is in force
// everywhere. change checks C2.
func (p *process) change(ctx context.Context, key string) error {
	revision, err := p.commit(ctx, key)
	if err != nil {
		return err
	}
	return p.settle(ctx, key, revision)
}

// settle waits until a revision of a key is in force everywhere.
func (p *process) settle(ctx context.Context, key string, revision uint64) error {
	if err := p.c.Barrier(ctx); err != nil {
		return err
	}
	p.changes.Add(1)
	p.world.mu.Lock()
	p.world.returned[key] = max(p.world.returned[key], revision)
	all := p.world.processes
	p.world.mu.Unlock()
	for _, other := range all {
		if n := other.alive(key, revision); n > 0 {
			p.violated("C2: %d contexts of %q are alive in %s after revision %d has returned",
				n, key, other.name, revision)
		}
	}
	return nil
}

// commit writes a new revision of a key, with an event and the guard entry.
func (p *process) commit(ctx context.Context, key string) (revision uint64, err error) {
	guard, err := p.c.Guard()
	if err != nil {
		return 0, err
	}
	e, err := p.link.Get(ctx, []byte(key))
	if err != nil && !errors.Is(err, backend.ErrNotFound) {
		return 0, err
	}
	stamp := p.stamps.begin(p.clock().Wall)
	err = p.link.Apply(ctx, guard,
		backend.Change{Key: []byte(key), Expect: e.Revision, Restricts: true},
		backend.Change{Key: eventKey(stamp), Value: guard.Key[1:]})
	if err == nil || errors.Is(err, backend.ErrConflict) {
		p.stamps.end(stamp)
		p.c.StampsMoved()
	} else {
		p.voids.Go(func() { p.voidEvent(stamp) })
	}
	return e.Revision + 1, err
}

const void = "void"

// voidEvent makes the outcome of an Apply certain.
func (p *process) voidEvent(stamp int64) {
	for {
		ctx, cancel := context.WithTimeout(context.Background(), testFreshness/4)
		err := p.link.Apply(ctx, backend.Change{Key: eventKey(stamp), Value: []byte(void)})
		cancel()
		if err == nil || errors.Is(err, backend.ErrConflict) {
			p.stamps.end(stamp)
			p.c.StampsMoved()
			return
		}
		time.Sleep(testFreshness / 4)
	}
}

func eventKey(stamp int64) []byte {
	return binary.BigEndian.AppendUint64([]byte{'e'}, uint64(stamp))
}

// readEvents reads the events up to a watermark.
func (p *process) readEvents(ctx context.Context) error {
	last, err := p.c.Watermark(ctx)
	if err != nil {
		return err
	}
	events, err := p.world.events(last)
	if err != nil {
		return err
	}
	p.watermarks.Add(1)
	p.world.mu.Lock()
	defer p.world.mu.Unlock()
	p.world.reads = append(p.world.reads, eventRead{last, events})
	return nil
}

// events returns the stamps of the events up to a stamp.
func (w *world) events(last int64) (map[int64]bool, error) {
	events := map[int64]bool{}
	b := w.engine.Open()
	defer b.Close()
	for e, err := range b.Scan(context.Background(), []byte{'e'}, eventKey(last+1)) {
		if err != nil {
			return nil, err
		}
		if string(e.Value) != void {
			events[int64(binary.BigEndian.Uint64(e.Key[1:]))] = true
		}
	}
	return events, nil
}

// checkEvents checks C10: no event appears at or below a watermark that has returned.
func (w *world) checkEvents() error {
	for _, read := range w.reads {
		now, err := w.events(read.last)
		if err != nil {
			return err
		}
		if !maps.Equal(now, read.events) {
			w.violated("C10: %d events up to the watermark %d; there were %d when it returned",
				len(now), read.last, len(read.events))
		}
	}
	return nil
}

// table returns how many entries the membership table has, without the header.
func (w *world) table() (n int) {
	b := w.engine.Open()
	defer b.Close()
	for e, err := range b.Scan(context.Background(), []byte{memberSpace}, []byte{guardSpace + 1}) {
		if err == nil && len(e.Key) == memberKeyLen {
			n++
		}
	}
	return n
}
