package sharedlab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

var (
	chaosFor       = flag.Duration("duration", 15*time.Second, "how long TestChaos injects faults")
	chaosFreshness = flag.Duration("freshness", time.Second, "D of TestChaos")
)

// A chaos is some store processes on an engine, and what was injected and seen.
type chaos struct {
	t         *testing.T
	engine    Engine
	freshness time.Duration
	longest   time.Duration // of a fault; a process that is silent for 2.4 D is evicted
	wrong     string
	space     string
	file      string // of the board
	board     *board
	stores    []*storeProcess
	without   []string // what could not be injected, and why

	mu      sync.Mutex
	deck    []string // of the faults of stores: those that were not injected lately
	rows    map[string]*row
	history []injection
	lost    []window
	failed  error // the laboratory has failed
}

// A storeProcess is a store in a process of its own, with a network of its own. One goroutine at a
// time injects faults.
type storeProcess struct {
	chaos   *chaos
	index   int
	network *Network
	process *process
}

// A row has what was seen while a fault was injected. Faults overlap, so the rows do too.
type row struct {
	name  string
	times int
	took  time.Duration
	seen  tally
}

// An injection is a fault that was injected, by CLOCK_MONOTONIC.
type injection struct {
	what     string
	from, to int64
}

// A tally is the sum of what the store processes have noted.
type tally struct {
	revoked, returned, uncertain, admitted, denied, gate, away, late int64
	messages, streams, strange                                       int64
}

func (c *chaos) tally() (t tally) {
	for i := range c.board.stores {
		s := &c.board.stores[i]
		t = t.plus(tally{s.revoked.Load(), s.returned.Load(), s.uncertain.Load(), s.admitted.Load(),
			s.denied.Load(), s.gate.Load(), s.away.Load(), s.late.Load(), s.messages.Load(),
			s.streams.Load(), s.strange.Load()}, 1)
	}
	return t
}

// plus returns t + sign*u.
func (t tally) plus(u tally, sign int64) tally {
	return tally{t.revoked + sign*u.revoked, t.returned + sign*u.returned,
		t.uncertain + sign*u.uncertain, t.admitted + sign*u.admitted, t.denied + sign*u.denied,
		t.gate + sign*u.gate, t.away + sign*u.away, t.late + sign*u.late,
		t.messages + sign*u.messages, t.streams + sign*u.streams, t.strange + sign*u.strange}
}

// startChaos starts store processes on an engine. The even ones are behind a link, if the machine
// allows network namespaces.
func startChaos(
	t *testing.T, engine Engine, stores int, freshness time.Duration, wrong string,
	duration time.Duration,
) *chaos {
	c := &chaos{t: t, engine: engine, freshness: freshness, longest: 5 * freshness, wrong: wrong,
		space: newPrefix(), file: filepath.Join(t.TempDir(), "board"), rows: make(map[string]*row)}
	var err error
	// The processes make fewer than 100 keys a second. The file takes space for the keys that
	// exist.
	c.board, err = newBoard(c.file, 2000+100*int(duration.Seconds()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.board.close()) })
	for i := range stores {
		var over *link
		if i%2 == 0 {
			if over, err = newLink(t); err != nil {
				c.without = append(c.without, "loss of packets: "+err.Error())
			}
		}
		s := &storeProcess{chaos: c, index: i, network: newNetwork(t, engine, over)}
		require.NoError(t, s.start())
		t.Cleanup(func() { s.process.end((*process).kill) })
		c.stores = append(c.stores, s)
	}
	for _, s := range c.stores {
		require.NoError(t, s.process.wait())
		if c.board.stores[s.index].movable.Load() == 0 {
			c.without = append(c.without, "wall clocks: "+s.process.stderr())
		}
	}
	c.without = slices.Compact(c.without)
	for _, what := range c.without {
		t.Log("NOT INJECTED: " + what)
	}
	return c
}

func (s *storeProcess) start() (err error) {
	c := s.chaos
	s.process, err = startProcess("store", storeSettings{Engine: c.engine.Name(),
		Addresses: s.network.Addresses(), Space: c.space, Freshness: c.freshness, Board: c.file,
		Index: s.index, Wrong: c.wrong}, s.network.link.start)
	return err
}

// faults returns what a store process can suffer.
func (s *storeProcess) faults() []Fault {
	until := func(begin, end func() error) func(context.Context) error {
		return func(ctx context.Context) error {
			if err := begin(); err != nil {
				return err
			}
			<-ctx.Done()
			return end()
		}
	}
	var all []Fault
	for name, cut := range map[string]Cut{
		"both ways": {true, true}, "to the servers": {ToServer: true},
		"to a process": {ToProcess: true},
	} {
		all = append(all, Fault{Name: "stalled network, " + name, Inject: until(
			func() error { s.network.Cut(cut); return nil },
			func() error { s.network.Cut(Cut{}); return nil })})
		if s.network.link != nil {
			all = append(all, Fault{Name: "lost packets, " + name, Inject: until(
				func() error { return s.network.link.drop(cut) },
				func() error { return s.network.link.drop(Cut{}) })})
		}
	}
	all = append(all,
		Fault{Name: "SIGSTOP of a process", Inject: until(
			func() error { return s.process.pause() },
			func() error { return s.process.resume() })},
		Fault{Name: "kill -9 of a process", Inject: until(
			func() error { s.process.end((*process).kill); return nil }, s.start)})
	if own := &s.chaos.board.stores[s.index]; own.movable.Load() != 0 {
		for name, sign := range map[string]int64{"forward": 1, "back": -1} {
			all = append(all, Fault{Name: "wall clock set " + name, Inject: until(
				func() error { own.clock.Store(sign * (1 + rand.Int64N(7200))); return nil },
				func() error { own.clock.Store(0); return nil })})
		}
	}
	return all
}

// draw returns one of the faults: as a rule, one that no process has suffered lately.
func (c *chaos) draw(faults []Fault) Fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	for range 2 {
		i := slices.IndexFunc(faults, func(f Fault) bool { return slices.Contains(c.deck, f.Name) })
		if i >= 0 {
			c.deck = slices.DeleteFunc(c.deck, func(n string) bool { return n == faults[i].Name })
			return faults[i]
		}
		for _, f := range faults {
			c.deck = append(c.deck, f.Name)
		}
	}
	panic("impossible: the deck has all faults")
}

// inject injects a fault for a random time, and notes what was seen.
func (c *chaos) inject(ctx context.Context, f Fault) error {
	before, from := c.tally(), monotonic()
	limited, cancel := context.WithTimeout(ctx, rand.N(c.longest))
	defer cancel()
	if err := f.Inject(limited); err != nil {
		return fmt.Errorf("%s: %w", f.Name, err)
	}
	to := monotonic()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.rows[f.Name] == nil {
		c.rows[f.Name] = &row{name: f.Name}
	}
	r := c.rows[f.Name]
	r.times++
	r.took += time.Duration(to - from)
	r.seen = r.seen.plus(c.tally(), 1).plus(before, -1)
	c.history = append(c.history, injection{f.Name, from, to})
	if f.Loses {
		c.lost = append(c.lost, window{from, to})
	}
	return nil
}

// hurt injects faults into one process until ctx ends.
func (s *storeProcess) hurt(ctx context.Context, faults []Fault) error {
	for ctx.Err() == nil {
		rand.Shuffle(len(faults), func(i, j int) { faults[i], faults[j] = faults[j], faults[i] })
		before := s.admitted()
		pauseFor(ctx, time.Second+rand.N(2*s.chaos.freshness))
		// A process that admits nothing would not be hurt. The servers may be away for longer.
		for range 50 {
			if s.admitted() == before {
				pauseFor(ctx, 100*time.Millisecond)
			}
		}
		if ctx.Err() != nil {
			break
		}
		if s.process.hasExited() {
			return fmt.Errorf("process %d has ended: %s", s.index, s.process.stderr())
		}
		f := s.chaos.draw(faults)
		if err := s.chaos.inject(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

// admitted returns the number of calls that the process has admitted.
func (s *storeProcess) admitted() int64 { return s.chaos.board.stores[s.index].admitted.Load() }

// run injects faults until the time is over, or a violation is found. The faults of the engine are
// injected on this goroutine. choose returns the faults of a process.
func (c *chaos) run(
	duration time.Duration, engineFaults []Fault, choose func(*storeProcess) []Fault,
) []violation {
	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	var all sync.WaitGroup
	for _, s := range c.stores {
		faults := choose(s)
		if len(faults) == 0 {
			continue
		}
		all.Go(func() {
			if err := s.hurt(ctx, faults); err != nil {
				c.mu.Lock()
				c.failed = errors.Join(c.failed, err)
				c.mu.Unlock()
				cancel()
			}
		})
	}
	next := 0
	for ctx.Err() == nil && len(c.board.violations(c.lost)) == 0 {
		pauseFor(ctx, time.Second)
		if len(engineFaults) == 0 || ctx.Err() != nil {
			continue
		}
		if next == 0 {
			rand.Shuffle(len(engineFaults), func(i, j int) {
				engineFaults[i], engineFaults[j] = engineFaults[j], engineFaults[i]
			})
		}
		f := engineFaults[next]
		next = (next + 1) % len(engineFaults)
		if err := c.inject(ctx, f); err != nil {
			c.mu.Lock()
			c.failed = errors.Join(c.failed, err)
			c.mu.Unlock()
			break
		}
	}
	cancel()
	all.Wait()
	require.NoError(c.t, c.failed)
	return c.board.violations(c.lost)
}

// finish requires that all processes come back without help, and end in order.
func (c *chaos) finish() {
	healed := monotonic()
	for _, s := range c.stores {
		require.Eventually(c.t, func() bool {
			if s.process.hasExited() {
				return true
			}
			for n := range c.board.used() {
				if c.board.slots[n].seen[s.index].admitted.Load() > healed {
					return true
				}
			}
			return false
		}, 2*patience, 10*time.Millisecond, "process %d admits nothing: %s", s.index,
			s.process.stderr())
		require.False(c.t, s.process.hasExited(), s.process.stderr())
	}
	for _, s := range c.stores {
		s.process.end((*process).stop)
		require.True(c.t, s.process.cmd.ProcessState.Success(), "process %d: %v: %s", s.index,
			s.process.cmd.ProcessState, s.process.stderr())
	}
}

// explain returns a violation with the faults of that time.
func (c *chaos) explain(v violation) string {
	s := &c.board.slots[v.slot]
	text := fmt.Sprintf("%s: process %d, key %d", v.what, v.process, v.slot)
	for name, at := range map[string]int64{
		"Create began": s.began.Load(), "Create returned": s.ready.Load(),
		"Update began": s.updating.Load(), "Update returned": s.updated.Load(),
		"Revoke began": s.revoking.Load(), "Revoke returned": s.revoked.Load(),
	} {
		if at != 0 {
			text += fmt.Sprintf("\n\t%s at %v", name, time.Duration(at-v.at))
		}
	}
	for _, i := range c.history {
		if near := int64(10 * time.Second); i.from < v.at+near && i.to > v.at-near {
			text += fmt.Sprintf("\n\t%s from %v to %v", i.what, time.Duration(i.from-v.at),
				time.Duration(i.to-v.at))
		}
	}
	return text
}

// table returns what was injected and seen, in Markdown.
func (c *chaos) table(violations []violation) string {
	var b strings.Builder
	b.WriteString("| injected | times | seconds | keys revoked | returned an error | " +
		"calls admitted | Unauthenticated | refused for the gate | Unavailable | too late | " +
		"messages |\n|---|---|---|---|---|---|---|---|---|---|---|\n")
	line := func(r row) {
		s := r.seen
		fmt.Fprintf(&b, "| %s | %d | %.0f | %d | %d | %d | %d | %d | %d | %d | %d |\n", r.name,
			r.times, r.took.Seconds(), s.revoked, s.uncertain, s.admitted, s.denied, s.gate, s.away,
			s.late, s.messages)
	}
	var names []string
	for name := range c.rows {
		names = append(names, name)
	}
	slices.Sort(names)
	all := row{name: "in all", seen: c.tally()}
	for _, name := range names {
		line(*c.rows[name])
		all.times += c.rows[name].times
		all.took += c.rows[name].took
	}
	line(all)
	b.WriteString("\n| seen | times |\n|---|---|\n")
	for _, what := range []string{admittedLate, receivedLate, sentLate, aliveLate, deniedGood,
		staleRevision} {
		n := 0
		for _, v := range violations {
			if v.what == what {
				n++
			}
		}
		fmt.Fprintf(&b, "| %s | %d |\n", what, n)
	}
	return b.String()
}

// report writes the table, and requires that nothing was wrong.
func (c *chaos) report(violations []violation) {
	c.t.Log("\n" + c.table(violations))
	for _, v := range violations[:min(len(violations), 5)] {
		c.t.Log(c.explain(v))
	}
	seen := c.tally()
	for _, s := range c.stores {
		if seen.strange > 0 {
			c.t.Log(s.process.stderr())
		}
	}
	require.Empty(c.t, violations)
	require.Zero(c.t, seen.strange, "results that no fault explains")
	require.Positive(c.t, seen.revoked)
	require.Positive(c.t, seen.admitted)
	require.Positive(c.t, seen.messages)
}

// engines start the engines of the chaos. small says that the faults of the servers are not
// injected.
var engines = map[string]func(t *testing.T, small bool) Engine{
	"etcd": func(t *testing.T, small bool) Engine {
		if small {
			return StartEtcd(t, EtcdConfig{NoSync: true})
		}
		return StartEtcd(t, EtcdConfig{Members: 3, NoSync: true})
	},
	"postgres": func(t *testing.T, _ bool) Engine { return StartPostgres(t) },
}

// onEngines runs a test on each engine that -engine allows.
func onEngines(t *testing.T, small bool, test func(*testing.T, Engine)) {
	require.True(t, *onlyEngine == "" || engines[*onlyEngine] != nil,
		"-engine is %q, and must be etcd or postgres", *onlyEngine)
	for name, start := range engines {
		if *onlyEngine == "" || *onlyEngine == name {
			t.Run(name, func(t *testing.T) { test(t, start(t, small)) })
		}
	}
}

// Once Revoke, Disable or Rotate has returned nil, no process admits the key, no message passes on
// a stream of the key, and every session of the key has ended, whatever networks, processes,
// servers and clocks do. No process denies a good key. -duration says how long the test runs, and
// -freshness is D.
func TestChaos(t *testing.T) { onEngines(t, false, testChaos) }

func testChaos(t *testing.T, lab Engine) {
	c := startChaos(t, lab, maxStores, *chaosFreshness, "", *chaosFor)
	violations := c.run(*chaosFor, lab.Faults(t), (*storeProcess).faults)
	if len(violations) == 0 {
		c.finish()
		violations = c.board.violations(c.lost)
	}
	c.report(violations)
	seen := c.tally()
	var injected []string
	for name, r := range c.rows {
		injected = append(injected, fmt.Sprintf("%s %d", name, r.times))
	}
	slices.Sort(injected)
	figures.RecordAs(t, fmt.Sprintf("%s, D %v", t.Name(), *chaosFreshness),
		"%v: %d keys were revoked by %d calls that returned, and %d calls returned an error; %d "+
			"calls admitted, %d Unauthenticated, %d Unavailable, %d of them for the gate; %d "+
			"messages on %d streams; 0 calls admitted, 0 messages and 0 sessions alive after the "+
			"return, 0 good keys denied; injected: %s",
		*chaosFor, seen.revoked, seen.returned, seen.uncertain, seen.admitted, seen.denied,
		seen.away, seen.gate, seen.messages, seen.streams, strings.Join(injected, ", "))
}

// The controls of TestChaos: with each wrong protocol, the same processes find a violation, while
// the network of one process is cut, both ways.
func TestChaosCatches(t *testing.T) { onEngines(t, true, testChaosCatches) }

func testChaosCatches(t *testing.T, lab Engine) {
	cuts := func(s *storeProcess) []Fault {
		return slices.DeleteFunc(s.faults(), func(f Fault) bool {
			return s.index > 0 || !strings.Contains(f.Name, "both ways")
		})
	}
	for wrong := range wrongs {
		t.Run(wrong, func(t *testing.T) {
			const limit = 3 * time.Minute // a busy machine needs more cuts
			c := startChaos(t, lab, 2, time.Second, wrong, limit)
			began := time.Now()
			violations := c.run(limit, nil, cuts)
			require.NotEmpty(t, violations, "the control was not caught\n%s", c.table(violations))
			t.Logf("caught after %v: %s", time.Since(began).Round(time.Millisecond),
				c.explain(violations[0]))
		})
	}
}
