package keystore

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// The chaos of processes: several stores on one engine in memory, in a bubble of testing/synctest,
// each behind a network with random faults. Clients of each process change and use keys. When all
// is over, the history is judged: see linearizable_regular_test.go, and verdict. The stamps of the
// events are from the clocks of the processes, and these clocks differ by minutes.

var seeds = flag.Int("seeds", 20, "how many seeds of the chaos of processes to run")

const (
	chaosFreshness = time.Second
	chaosTimeout   = 4 * time.Second // of a call
	chaosTime      = 15 * chaosFreshness
	chaosSlots     = 24 // keys
	chaosClients   = 3  // of each process, beside a writer and a follower
	chaosDoomed    = 6  // each sixth key has an owner whose keys RevokeAll revokes
)

// TestProcessesChaos checks C1 to C7 and C10 to C12. The long run is
//
//	go test ./keystore -run ProcessesChaos -seeds 20000 -timeout 0
func TestProcessesChaos(t *testing.T) {
	seed := seedOf()
	t.Logf("the first seed is %d", seed)
	began := time.Now()
	count, total := make(tally), new(chaosFigures)
	for n := range uint64(*seeds) {
		if found := runChaos(t, seed+n, rightProcesses, count, total); len(found) > 0 {
			t.Fatalf("again: go test ./keystore -run ProcessesChaos -seeds 1 -seed %d:\n%v", seed+n,
				errors.Join(found...))
		}
		if (n+1)%500 == 0 {
			t.Logf("%d seeds in %v: %v", n+1, time.Since(began).Round(time.Second), total)
		}
	}
	t.Logf("what the seeds came to:\n%v", count)
	figures.Record(t, "%d seeds from seed %d, %v: 0 violations", *seeds, seed, total)
}

// chaosFigures say how much a run has tested.
type chaosFigures struct {
	Processes, Operations, Faults, Events, Followed int
}

func (f *chaosFigures) String() string {
	return fmt.Sprintf("%d processes with %d faults, %d operations, %d events, %d read by followers",
		f.Processes, f.Faults, f.Operations, f.Events, f.Followed)
}

// A chaos is the run of one seed.
type chaos struct {
	*trial
	t      *testing.T
	shared *backendtest.Shared
	wrong  processVariant
	start  time.Time
	ctx    context.Context // of the clients and of the faults
	historyClock

	guests []*guest
	young  []byte    // a backup of the guests: all are active
	old    []byte    // a later backup: all are revoked or disabled
	died   time.Time // the guests of the backup old were revoked before

	mu        sync.Mutex // guards all below
	created   int        // slots
	processes []*chaosProcess
	breaches  []error // what was found wrong before the verdict
	faults    int
	events    []Event
}

// runChaos runs one seed, and returns the violations.
func runChaos(
	t *testing.T, seed uint64, wrong processVariant, count tally, total *chaosFigures,
) (found []error) {
	c := &chaos{t: t, wrong: wrong}
	synctest.Test(t, func(t *testing.T) {
		c.t, c.shared, c.start = t, backendtest.NewShared(), time.Now()
		c.trial = newTrial(seed, chaosSlots)
		c.evicts = true
		c.run(rand.New(rand.NewPCG(seed, 0)))
	})
	found = append(c.breaches, c.verdict()...)
	count.add(c.trial)
	total.Processes += len(c.processes)
	total.Operations += len(c.ops)
	total.Faults += c.faults
	total.Events += len(c.events)
	for _, p := range c.processes {
		total.Followed += len(p.followed)
	}
	return found
}

// A historyClock is the clock of a history. Two moments are never equal.
type historyClock struct {
	at atomic.Int64
}

func (c *historyClock) moment() int64 {
	for {
		last := c.at.Load()
		next := max(last+1, time.Now().UnixNano())
		if c.at.CompareAndSwap(last, next) {
			return next
		}
	}
}

func (c *chaos) breach(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.breaches) < 10 {
		c.breaches = append(c.breaches, fmt.Errorf("seed %d, %v: %s", c.seed, time.Since(c.start),
			fmt.Sprintf(format, args...)))
	}
}

func (c *chaos) run(rng *rand.Rand) {
	c.invite()
	time.Sleep(time.Duration(rng.Int64N(int64(time.Minute)))) // uses are noted by the minute
	var cancel context.CancelFunc
	c.ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	var places sync.WaitGroup
	for i := range 3 + rng.IntN(3) {
		rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(i)))
		places.Go(func() { c.place(rng) })
	}
	time.Sleep(chaosTime)
	cancel()
	places.Wait()
	for _, p := range c.processes {
		p.link.Wait()
	}
	c.checkRemains()
}

// checkRemains opens a last store, reads what is there, and checks C12.
func (c *chaos) checkRemains() {
	p := c.add(1)
	if err := p.open(); err != nil {
		c.breach("the last process cannot join: %v", err)
		return
	}
	time.Sleep(10 * chaosFreshness) // processes that are gone are evicted
	for e, err := range p.store.Events(context.Background(), EventQuery{}) {
		if err != nil {
			c.breach("the last process cannot read the events: %v", err)
			break
		}
		c.events = append(c.events, e)
	}
	c.checkUsage(p.store)
	c.checkGuests(p)
	if err := p.player.close(); err != nil {
		c.breach("Close: %v", err)
	}
	p.link.Wait()
	if left := membersIn(c.t, c.shared); left != "" {
		c.breach("C12: after all stores were closed, the membership table has %s", left)
	}
}

// membersIn returns the first letters of the member records and the guard entries in a store.
func membersIn(t *testing.T, shared *backendtest.Shared) (left string) {
	b := shared.Open()
	for e, err := range b.Scan(context.Background(), []byte{'m'}, []byte{'o'}) {
		require.NoError(t, err)
		if isMemberKey(e.Key) || isGuardKey(e.Key) {
			left += string(e.Key[:1])
		}
	}
	require.NoError(t, b.Close())
	return left
}

// checkUsage checks that no use is lost that a process noted which could write at its Close.
func (c *chaos) checkUsage(s *Store) {
	for n, k := range c.keys {
		if k == nil {
			continue
		}
		var last int64
		for _, p := range c.processes {
			if p.closedWell {
				last = max(last, p.used[n])
			}
		}
		if last == 0 {
			continue
		}
		want := time.Unix(0, last).Truncate(time.Minute)
		if key, err := s.Get(context.Background(), k.ID); err != nil {
			c.breach("Get: %v", err)
		} else if key.LastUsedAt.Before(want) {
			c.breach("key %d was used at %v: LastUsedAt is %v", n, want, key.LastUsedAt)
		}
	}
}

// place runs one process after the other until the end.
func (c *chaos) place(rng *rand.Rand) {
	for c.ctx.Err() == nil {
		p := c.add(rng.Uint64())
		if err := p.open(); err != nil {
			c.breach("a process cannot join: %v", err)
			_ = p.link.Close()
			return
		}
		life, cancel := context.WithCancel(c.ctx)
		var clients sync.WaitGroup
		for j := range chaosClients {
			rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(j)))
			clients.Go(func() { p.read(life, j, rng) })
		}
		writer := rand.New(rand.NewPCG(rng.Uint64(), 9))
		clients.Go(func() { p.write(life, chaosClients, writer) })
		if rng.IntN(2) == 0 {
			clients.Go(func() { p.follow(life) })
		}
		for c.ctx.Err() == nil && rng.IntN(8) > 0 {
			p.trouble(rng)
		}
		p.set(func(f *badlink.Faults) { f.Stopped = false })
		healed := rng.IntN(2) == 0
		if healed {
			p.heal()
			p.checkRecovered()
		}
		cancel()
		clients.Wait()
		p.sampleAll() // Close would hide why a context that lost contact had ended
		p.closedWell = healed
		if err := p.player.close(); err != nil && healed {
			c.breach("Close: %v", err)
		}
		p.sampleAll()
		p.heal()
		pauseFor(context.Background(), chaosFreshness)
	}
}

func pauseFor(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// A chaosProcess is a store behind a network with faults.
type chaosProcess struct {
	*player
	*chaos
	link   *badlink.Link
	delay  time.Duration // of each request, each answer and each Batch, at most
	sleeps bool          // the machine sleeps, and its wall clock is never set
	rate   float64       // of the monotonic clock
	asleep atomic.Int64  // how long the monotonic clock has stood still
	shift  atomic.Int64  // of the wall clock

	faults    sync.Mutex // guards all below, up to used
	now       badlink.Faults
	rng       *rand.Rand
	troubled  time.Time // when the last fault ended
	faulty    bool      // a fault is present
	proofs    map[string]*proofOf
	lastProof time.Time // when the last heartbeat began that is confirmed and delivered

	used       [chaosSlots]int64 // when each key was last admitted
	closedWell bool              // the process had no fault at its Close
	followed   []Event           // what the follower has read
}

// A proofOf is one heartbeat.
type proofOf struct {
	began                time.Time
	confirmed, delivered bool
}

func (c *chaos) add(seed uint64) *chaosProcess {
	rng := rand.New(rand.NewPCG(seed, 7))
	p := &chaosProcess{
		player: c.player(nil, 0), chaos: c, link: badlink.Open(c.shared), rng: rng,
		delay:  time.Duration(1 + rng.Int64N(int64(chaosFreshness/40))),
		proofs: map[string]*proofOf{}, rate: 0.925 + 0.15*rng.Float64(), sleeps: rng.IntN(2) == 0,
	}
	p.shift.Store(int64(rng.NormFloat64() * float64(time.Minute)))
	p.player.moment, p.player.resume = c.moment, p.link.AwaitRunning
	p.player.record = p.recordOp
	p.player.limited = func() (context.Context, context.CancelFunc) {
		if p.chance(8) {
			return context.WithTimeout(context.Background(), p.random(2*chaosFreshness))
		}
		return context.WithTimeout(context.Background(), 6*chaosFreshness)
	}
	p.link.OnApply, p.link.OnGet, p.link.OnBatch = p.onApply, p.onGet, p.onBatch
	c.mu.Lock()
	defer c.mu.Unlock()
	c.processes = append(c.processes, p)
	p.player.process = len(c.processes)
	return p
}

// random returns a time below limit.
func (p *chaosProcess) random(limit time.Duration) time.Duration {
	p.faults.Lock()
	defer p.faults.Unlock()
	return time.Duration(p.rng.Int64N(int64(limit)))
}

// chance reports true once in n times.
func (p *chaosProcess) chance(n int) bool {
	p.faults.Lock()
	defer p.faults.Unlock()
	return p.rng.IntN(n) == 0
}

// open opens the store of the process.
func (p *chaosProcess) open() error {
	opts := &Options{Timeout: chaosTimeout, Freshness: chaosFreshness}
	if p.chance(2) {
		opts.CacheSize = 2
	}
	s, err := openProcess(p.link, opts, p.wrong, p.instant)
	p.chaos.mu.Lock()
	defer p.chaos.mu.Unlock()
	p.player.store = s
	return err
}

// instant returns what the clocks of the process show.
func (p *chaosProcess) instant() cluster.Instant {
	mono := int64(float64(time.Since(p.chaos.start)-time.Duration(p.asleep.Load())) * p.rate)
	return cluster.Instant{Mono: mono + 1, Wall: time.Now().UnixNano() + p.shift.Load()}
}

func (p *chaosProcess) set(change func(*badlink.Faults)) {
	p.faults.Lock()
	defer p.faults.Unlock()
	change(&p.now)
	p.faulty = true
	p.link.Set(p.now)
}

func (p *chaosProcess) heal() {
	p.faults.Lock()
	defer p.faults.Unlock()
	p.now, p.faulty, p.troubled = badlink.Faults{}, false, time.Now()
	p.link.Set(p.now)
}

// wellSince reports whether the process has had no fault since some time before a moment: enough
// to join again after a gap.
func (p *chaosProcess) wellSince(moment int64) bool {
	p.faults.Lock()
	defer p.faults.Unlock()
	return !p.faulty && p.troubled.Add(4*chaosFreshness).UnixNano() < moment
}

func (p *chaosProcess) onApply(
	ctx context.Context, changes []backend.Change, next func(context.Context) error,
) error {
	beat := p.began(changes)
	p.checkGuarded(changes)
	time.Sleep(p.random(p.delay))
	err := next(ctx)
	time.Sleep(p.random(p.delay))
	p.link.AwaitRunning()
	if err == nil && beat != nil {
		p.prove(beat, &beat.confirmed)
	}
	return err
}

func (p *chaosProcess) onGet(
	ctx context.Context, _ []byte, next func(context.Context) (backend.Entry, error),
) (backend.Entry, error) {
	time.Sleep(p.random(p.delay))
	e, err := next(ctx)
	time.Sleep(p.random(p.delay))
	p.link.AwaitRunning()
	return e, err
}

func (p *chaosProcess) onBatch(_ context.Context, b backend.Batch) {
	time.Sleep(p.random(p.delay))
	p.link.AwaitRunning()
	for _, e := range b.Changes {
		if beat := p.heartbeat(e.Key, e.Value); beat != nil {
			p.prove(beat, &beat.delivered)
		}
	}
}

// began notes the heartbeat that an Apply writes.
func (p *chaosProcess) began(changes []backend.Change) *proofOf {
	if len(changes) != 1 || !isMemberKey(changes[0].Key) || changes[0].Delete {
		return nil
	}
	p.faults.Lock()
	defer p.faults.Unlock()
	beat := &proofOf{began: time.Now()}
	p.proofs[string(changes[0].Key)+string(changes[0].Value)] = beat
	return beat
}

// heartbeat returns the heartbeat of this process that an entry shows, or nil.
func (p *chaosProcess) heartbeat(key, value []byte) *proofOf {
	if !isMemberKey(key) {
		return nil
	}
	p.faults.Lock()
	defer p.faults.Unlock()
	return p.proofs[string(key)+string(value)]
}

func (p *chaosProcess) prove(beat *proofOf, holds *bool) {
	p.faults.Lock()
	defer p.faults.Unlock()
	*holds = true
	if beat.confirmed && beat.delivered && beat.began.After(p.lastProof) {
		p.lastProof = beat.began
	}
}

func isMemberKey(key []byte) bool { return len(key) == 17 && key[0] == 'm' }
func isGuardKey(key []byte) bool  { return len(key) == 17 && key[0] == 'n' }

// checkGuarded checks C7: each Apply that changes a key Checks a guard entry, so that an evicted
// process changes nothing. The engine does the rest.
func (p *chaosProcess) checkGuarded(changes []backend.Change) {
	key, guard := false, false
	for _, c := range changes {
		key = key || c.Key[0] == keySpace
		guard = guard || isGuardKey(c.Key) && c.Check
	}
	if key && !guard {
		p.breach("C7: an Apply that changes a key Checks no guard entry")
	}
}

// recordOp records an op, and checks C3, C6 and the uses of the keys.
func (p *chaosProcess) recordOp(o op, secret string) {
	p.trial.record(o, secret)
	if o.Return == 0 {
		return
	}
	switch o.Kind {
	case opVerify, opBind:
		p.faults.Lock()
		proof := p.lastProof.UnixNano()
		if o.Result == isOK {
			p.used[o.Key] = max(p.used[o.Key], o.Call)
		}
		p.faults.Unlock()
		if o.Result != isNothing && time.Duration(o.Call-proof) > cluster.Bound(chaosFreshness) {
			p.breach("C6: process %d answered %v, and its last proof had begun %v before the call",
				o.Process, &o, time.Duration(o.Call-proof))
		}
	case opUpdate, opRotate, opDisable, opEnable, opRevoke:
		// The clock of the process may be slow by a twelfth, and other changes may come first.
		took := time.Duration(o.Return - o.Call)
		if o.Result == isOK && took > 2*cluster.Bound(chaosFreshness) && p.wellSince(o.Call) {
			p.breach("C3: %v took %v", &o, took)
		}
	}
}

// checkRecovered checks C7: a process that was cut off joins again without help. Other processes
// may trim the log meanwhile, and the process then joins once more.
func (p *chaosProcess) checkRecovered() {
	for !isFresh(p.store) {
		if p.wellSince(time.Now().Add(-4 * chaosFreshness).UnixNano()) {
			p.breach("C7: process %d does not join again: %+v", p.player.process,
				p.store.processes.cluster.Stats())
			return
		}
		pauseFor(context.Background(), chaosFreshness/25)
	}
}

// trouble is one fault of a process, after a time without.
func (p *chaosProcess) trouble(rng *rand.Rand) {
	upTo := func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }
	pauseFor(p.ctx, upTo(2*chaosFreshness))
	if p.ctx.Err() != nil {
		return
	}
	hold := upTo(chaosFreshness / 2)
	switch rng.IntN(6) {
	case 0, 1:
		hold = upTo(4 * chaosFreshness)
	case 2: // the process is evicted
		hold = 3*chaosFreshness + upTo(3*chaosFreshness)
	}
	p.chaos.mu.Lock()
	p.chaos.faults++
	p.chaos.mu.Unlock()
	which := rng.IntN(10)
	if which == 9 && p.sleeps {
		which = 6 // a machine that sleeps, and whose wall clock is set back, is outside the model
	} else if which == 6 && !p.sleeps {
		which = 9
	}
	switch which {
	case 0:
		p.set(func(f *badlink.Faults) { f.Drop = true })
	case 1:
		p.set(func(f *badlink.Faults) { f.LoseAnswers = true })
	case 2:
		p.set(func(f *badlink.Faults) { f.Delay = upTo(3 * chaosFreshness) })
	case 3:
		p.set(func(f *badlink.Faults) { f.Silent = true })
	case 4:
		p.link.MuteFeeds()
		p.set(func(*badlink.Faults) {})
	case 5:
		p.set(func(f *badlink.Faults) { f.Stopped = true })
	case 6: // the machine sleeps: its monotonic clock stands still
		p.set(func(f *badlink.Faults) { f.Stopped = true })
		slept, before := p.asleep.Load(), time.Now()
		for end := before.Add(hold); time.Now().Before(end) && p.ctx.Err() == nil; {
			p.asleep.Store(slept + int64(time.Since(before)))
			pauseFor(p.ctx, chaosFreshness/50)
		}
		p.asleep.Store(slept + int64(time.Since(before)))
		hold = 1
	case 7: // a feed that lags has a gap
		p.trim()
		p.set(func(f *badlink.Faults) { f.Silent = true })
		pauseFor(p.ctx, hold)
		p.trim()
	case 8:
		p.set(func(f *badlink.Faults) { f.FeedError = errors.New("the feed is broken") })
	case 9:
		p.shift.Add(int64(rng.NormFloat64() * float64(chaosFreshness)))
		p.set(func(*badlink.Faults) {})
	}
	pauseFor(p.ctx, hold)
	p.heal()
}

// trim trims the log. Each process whose feed lags has a gap then, so trim is a fault of them all.
func (c *chaos) trim() {
	c.mu.Lock()
	all := c.processes
	c.mu.Unlock()
	for _, p := range all {
		p.faults.Lock()
		p.troubled = time.Now()
		p.faults.Unlock()
	}
	c.shared.Trim()
}

// slot returns a key that exists, or -1. Young keys are used more.
func (p *chaosProcess) slot(rng *rand.Rand) int {
	p.chaos.mu.Lock()
	created := p.chaos.created
	p.chaos.mu.Unlock()
	if created == 0 {
		return -1
	}
	n := max(rng.IntN(created), rng.IntN(created))
	if p.played(n) == nil {
		return -1
	}
	return n
}

// doomed is the owner of the keys that RevokeAll revokes, and isDoomed reports whether the key of a
// slot is such a key.
func (p *chaosProcess) doomed() string { return fmt.Sprintf("doomed of %d", p.player.seed) }

func isDoomed(slot int) bool { return slot%chaosDoomed == chaosDoomed-1 }

// createNext makes the key of the next slot.
func (p *chaosProcess) createNext(client int) {
	p.chaos.mu.Lock()
	n := p.chaos.created
	if n < chaosSlots {
		p.chaos.created++
	}
	p.chaos.mu.Unlock()
	if n == chaosSlots {
		return
	}
	owner := p.owner(n)
	if isDoomed(n) {
		owner = p.doomed()
	}
	p.create(client, n, owner, 0)
}

// read verifies, binds and reads.
func (p *chaosProcess) read(ctx context.Context, client int, rng *rand.Rand) {
	for ctx.Err() == nil {
		pauseFor(ctx, time.Duration(rng.Int64N(int64(chaosFreshness/8))))
		if rng.IntN(6) == 0 {
			p.meet(rng)
			continue
		}
		n := p.slot(rng)
		if n < 0 {
			continue
		}
		switch x := rng.IntN(100); {
		case x < 55:
			p.verify(client, n, p.secret(rng, n))
		case x < 70:
			p.bind(client, n, p.secret(rng, n))
		case x < 85:
			p.sample(client, n)
		case x < 92:
			p.get(client, n)
		case x < 97:
			p.list(client, n, p.owner(rng.IntN(2)))
		default:
			p.player.events(client, n)
		}
	}
}

// write changes keys, and looks at once at what the changes must have ended, in all processes.
func (p *chaosProcess) write(ctx context.Context, client int, rng *rand.Rand) {
	for ctx.Err() == nil {
		pauseFor(ctx, time.Duration(rng.Int64N(int64(chaosFreshness/3))))
		if rng.IntN(6) == 0 {
			p.host(rng)
			continue
		}
		n := p.slot(rng)
		x := rng.IntN(100)
		if n < 0 || x < 16 {
			p.createNext(client)
			continue
		}
		o := op{Client: client, Key: n}
		if rng.IntN(5) == 0 {
			o.If = p.keys[n].seen.Load()
		}
		id := p.keys[n].ID
		switch {
		case x < 48:
			o.Kind = opUpdate
			if rng.IntN(2) == 0 && !isDoomed(n) {
				o.Owner = p.owner(rng.IntN(2))
			}
			p.update(o)
		case x < 60:
			o.Kind = opRotate
			p.rotate(o)
		case x < 72:
			o.Kind = opDisable
			p.do(o, func(ctx context.Context) (*Key, string, error) {
				return nil, "", p.store.Disable(ctx, id, "")
			})
		case x < 90:
			o.Kind = opEnable
			p.do(o, func(ctx context.Context) (*Key, string, error) {
				return nil, "", p.store.Enable(ctx, id)
			})
		case x < 97:
			o.Kind = opRevoke
			p.do(o, func(ctx context.Context) (*Key, string, error) {
				return nil, "", p.store.Revoke(ctx, id, "")
			})
		default:
			p.revokeAll(client)
		}
		p.everywhere(client, n, rng)
	}
}

// everywhere looks at the key in all processes.
func (p *chaosProcess) everywhere(client, n int, rng *rand.Rand) {
	p.sample(client, n)
	var all []*chaosProcess
	p.chaos.mu.Lock()
	for _, other := range p.processes {
		if other.store != nil { // otherwise the process has not joined yet
			all = append(all, other)
		}
	}
	p.chaos.mu.Unlock()
	for _, other := range all {
		if other.store.serving() == nil && other.running() {
			other.verify(client, n, p.secret(rng, n))
		}
	}
}

// running reports whether the process is not stopped.
func (p *chaosProcess) running() bool {
	p.faults.Lock()
	defer p.faults.Unlock()
	return !p.now.Stopped
}

// revokeAll revokes the doomed keys. For each of them, the call is a Revoke.
func (p *chaosProcess) revokeAll(client int) {
	p.player.mu.Lock()
	var had [chaosSlots]bool
	for n, k := range p.keys {
		had[n] = k != nil
	}
	p.player.mu.Unlock()
	all := p.do(op{Client: client, Key: -1, Kind: opRevokeAll},
		func(ctx context.Context) (*Key, string, error) {
			_, err := p.store.RevokeAll(ctx, Query{Owner: p.doomed()}, "", nil)
			return nil, "", err
		})
	for n := range p.keys {
		o := all
		o.Key, o.Kind, o.All = n, opRevoke, true
		if !had[n] && o.Result == isOK {
			o.Result = inDoubt // the Create may have come later
		}
		if isDoomed(n) {
			p.trial.record(o, "")
		}
	}
}

// follow follows the events from the beginning, and continues after each error.
func (p *chaosProcess) follow(ctx context.Context) {
	after := p.chaos.start.Add(-time.Hour) // a clock may be behind
	for ctx.Err() == nil {
		for e, err := range p.store.Follow(ctx, EventQuery{After: after}) {
			if err != nil {
				break
			}
			p.followed = append(p.followed, e)
			after = e.At
		}
		pauseFor(ctx, chaosFreshness/4)
	}
}

// verdict judges the history of a seed, and returns the violations.
func (c *chaos) verdict() (found []error) {
	events := make(map[string][]Event)
	for _, e := range c.events {
		events[e.KeyID] = append(events[e.KeyID], e)
	}
	for n, k := range c.keys {
		if k == nil {
			continue // the Create has failed
		}
		revisions, err := serialOf(events[k.ID], c.of(n))
		if err != nil {
			err = c.violation(n, "C10: "+err.Error())
		} else {
			err = c.checkProcesses(n, revisions)
		}
		if err != nil {
			found = append(found, err)
		}
	}
	for _, p := range c.processes {
		if err := c.checkFollowed(p.followed); err != nil {
			found = append(found, err)
		}
	}
	return found
}

// checkFollowed checks C10: a follower has read all events up to the last event that it has read.
func (c *chaos) checkFollowed(followed []Event) error {
	for i, e := range followed {
		if i >= len(c.events) {
			return fmt.Errorf("seed %d: C10: a follower has read event %d, %+v, and there are %d "+
				"events", c.seed, i, e, len(c.events))
		}
		if want := c.events[i]; e != want {
			return fmt.Errorf("seed %d: C10: event %d of a follower is %+v, and is %+v", c.seed, i, e,
				want)
		}
	}
	return nil
}
