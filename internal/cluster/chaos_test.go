package cluster

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

var (
	seeds     = flag.Int("seeds", 60, "how many seeds of chaos to run")
	firstSeed = flag.Uint64("seed", 1, "the first seed; the next seeds count up")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A seed is three processes for chaosTime, each with random faults.
const (
	chaosProcesses = 3
	chaosKeys      = 3
	chaosTime      = 15 * testFreshness
)

// TestChaos checks C1, C2, C4, C6, C7, C10 and C12. A Verify of the model returns a revision, so C4
// includes C1. The long run is
//
//	go test ./internal/cluster -run Chaos -seeds 20000 -timeout 0
func TestChaos(t *testing.T) {
	var total tally
	for i := range *seeds {
		total.add(chaos(t, *firstSeed+uint64(i), 0))
		if t.Failed() {
			return
		}
		if (i+1)%500 == 0 {
			t.Logf("%d seeds: %+v", i+1, total)
		}
	}
	figures.Record(t, "%d seeds from seed %d, %d admissions and %d refusals, %d changes, %d "+
		"watermarks, %d memberships, %d evictions: 0 violations", *seeds, *firstSeed, total.Admitted,
		total.Refused, total.Changes, total.Watermarks, total.Joins, total.Evictions)
}

// A tally says how much a run has tested.
type tally struct {
	Admitted, Refused, Changes, Watermarks, Closings, Joins, Evictions, Acked, Deadlines int64

	Violations int
	Stale      int // of them: violations of C2 and C4, and not only of C6
}

func (f *tally) add(g tally) {
	f.Admitted += g.Admitted
	f.Refused += g.Refused
	f.Changes += g.Changes
	f.Watermarks += g.Watermarks
	f.Closings += g.Closings
	f.Joins += g.Joins
	f.Evictions += g.Evictions
	f.Acked += g.Acked
	f.Deadlines += g.Deadlines
	f.Violations += g.Violations
	f.Stale += g.Stale
}

// chaos runs one seed. With the correct protocol, a violation fails the test.
func chaos(t *testing.T, seed uint64, wrong Variant) (f tally) {
	synctest.Test(t, func(t *testing.T) {
		s := &chaosRun{world: newWorld(wrong), rng: rand.New(rand.NewPCG(seed, 0))}
		s.run(t, seed)
		f = s.tally()
		if wrong == 0 {
			require.Empty(t, s.violations, "seed %d", seed)
		}
	})
	return f
}

type chaosRun struct {
	*world
	rng  *rand.Rand
	over atomic.Bool
	ctx  context.Context

	statsMu sync.Mutex
	total   tally
}

func (s *chaosRun) tally() tally {
	f := s.total
	f.Admitted, f.Refused = s.admitted.Load(), s.refused.Load()
	f.Changes, f.Watermarks = s.world.changes.Load(), s.watermarks.Load()
	f.Violations = len(s.violations)
	for _, v := range s.violations {
		if strings.Contains(v, " C2: ") || strings.Contains(v, " C4: ") {
			f.Stale++
		}
	}
	return f
}

func (s *chaosRun) run(t *testing.T, seed uint64) {
	var cancel context.CancelFunc
	s.ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	var places sync.WaitGroup
	places.Go(s.watchGuards)
	for i := range chaosProcesses {
		rng := rand.New(rand.NewPCG(seed, uint64(i)+100))
		places.Go(func() { s.place(t, i, rng) })
	}
	time.Sleep(chaosTime)
	s.over.Store(true)
	cancel()
	places.Wait()
	for _, p := range s.processes {
		p.link.pending.Wait()
	}
	time.Sleep(10 * testFreshness) // the last events become certain
	require.NoError(t, s.checkEvents())
	if s.table() > 0 {
		s.checkOrphans(t)
	}
}

// checkOrphans checks that a new process removes what processes left that could not reach the
// engine, and that nothing is left when this process has closed: C12.
func (s *chaosRun) checkOrphans(t *testing.T) {
	p := s.add("last", 1)
	require.NoError(t, p.join(context.Background(), 0))
	time.Sleep(4 * testFreshness)
	p.c.Close()
	require.NoError(t, p.link.Close())
	require.Zero(t, s.table(), "C12: the membership table has entries of closed processes")
}

// place runs one process after the other until the end, on a goroutine of its own.
func (s *chaosRun) place(t *testing.T, i int, rng *rand.Rand) {
	for n := 0; !s.over.Load(); n++ {
		p := s.add(fmt.Sprintf("process %d.%d", i, n), rng.Uint64())
		p.rate = 0.925 + 0.15*rng.Float64()
		p.shift.Store(int64(rng.NormFloat64() * float64(time.Minute)))
		p.sleeps = rng.IntN(2) == 0
		p.link.set(func(f *fault) {
			f.delay = time.Duration(rng.Int64N(int64(testFreshness / 40)))
			f.feedDelay = time.Duration(rng.Int64N(int64(testFreshness / 40)))
		})
		if err := p.join(s.ctx, testFreshness); err != nil {
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			if err := p.link.Close(); err != nil {
				t.Error(err)
			}
			return
		}
		life, cancel := context.WithCancel(s.ctx)
		var clients sync.WaitGroup
		for j := range 3 {
			rng := rand.New(rand.NewPCG(rng.Uint64(), uint64(j)))
			clients.Go(func() { s.reader(life, p, rng) })
		}
		writer := rand.New(rand.NewPCG(rng.Uint64(), 9))
		clients.Go(func() { s.writer(life, p, writer) })
		if rng.IntN(2) == 0 {
			clients.Go(func() { s.watch(life, p) })
		}
		for s.ctx.Err() == nil && rng.IntN(8) > 0 {
			s.trouble(p, rng)
		}
		p.link.set(func(f *fault) { f.stopped = false })
		if rng.IntN(2) == 0 {
			p.link.heal()
		}
		cancel()
		p.c.Close()
		clients.Wait()
		p.link.heal()
		s.note(p)
		p.voids.Wait()
		p.link.pending.Wait()
		time.Sleep(testFreshness)
		if err := p.link.Close(); err != nil {
			t.Error(err)
		}
	}
}

// watchGuards checks C7: no event of a member is committed after the guard entry of the member was
// deleted.
func (s *chaosRun) watchGuards() {
	b := s.engine.Open()
	defer b.Close()
	gone := map[string]bool{}
	for s.ctx.Err() == nil {
		for batch, err := range b.Feed(s.ctx, []byte{'e'}, []byte{guardSpace + 1}, 0) {
			if err != nil {
				break // a gap: the check misses the deletions in the gap
			}
			for _, e := range batch.Changes {
				switch {
				case e.Key[0] == guardSpace && e.Revision == 0:
					gone[memberID(e.Key)] = true
				case e.Key[0] == 'e' && gone[string(e.Value)]:
					s.violated("C7: a member made a change after its eviction")
				}
			}
		}
	}
}

func (s *chaosRun) note(p *process) {
	s.statsMu.Lock()
	defer s.statsMu.Unlock()
	st := p.c.Stats()
	s.total.add(tally{
		Closings: int64(st.Closings), Joins: int64(st.Memberships), Evictions: int64(st.Evictions),
		Acked: int64(st.Acked), Deadlines: int64(st.Deadlines),
	})
}

func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

func upTo(rng *rand.Rand, d time.Duration) time.Duration {
	return time.Duration(rng.Int64N(int64(d)))
}

// trouble is one fault of a process, after a time without.
func (s *chaosRun) trouble(p *process, rng *rand.Rand) {
	sleep(s.ctx, upTo(rng, 2*testFreshness))
	hold := upTo(rng, testFreshness/2)
	switch rng.IntN(6) {
	case 0, 1:
		hold = upTo(rng, 4*testFreshness)
	case 2: // the process is evicted
		hold = 3*testFreshness + upTo(rng, 3*testFreshness)
	}
	l := p.link
	which := rng.IntN(11)
	if which == 9 && p.sleeps {
		which = 6 // see gate: a machine that sleeps, and whose wall clock is then set back
	} else if which == 6 && !p.sleeps {
		which = 9
	}
	switch which {
	case 0:
		l.set(func(f *fault) { f.dropCalls = true })
	case 1:
		l.set(func(f *fault) { f.dropReply = true })
	case 2:
		l.set(func(f *fault) { f.late = true })
	case 3:
		l.set(func(f *fault) { f.silent = true })
	case 4: // the feed is silent until it is started again
		l.endFeeds()
	case 5:
		l.set(func(f *fault) { f.stopped = true })
	case 6: // the machine sleeps: its monotonic clock stands still
		before := time.Now()
		l.set(func(f *fault) { f.stopped = true })
		stop := int64(p.asleep.Load())
		for end := before.Add(hold); time.Now().Before(end) && s.ctx.Err() == nil; {
			p.asleep.Store(stop + int64(time.Since(before)))
			sleep(s.ctx, testFreshness/50)
		}
		p.asleep.Store(stop + int64(time.Since(before)))
		hold = 1
	case 7:
		s.engine.Trim() // a feed that lags has a gap
		l.set(func(f *fault) { f.silent = true })
		sleep(s.ctx, hold)
		s.engine.Trim()
	case 8:
		l.set(func(f *fault) { f.feedErr = errors.New("the feed is broken") })
	case 9:
		p.shift.Add(int64(rng.NormFloat64() * float64(testFreshness)))
	case 10:
		l.set(func(f *fault) { f.late, f.silent = true, true })
	}
	sleep(s.ctx, hold)
	l.heal()
}

func key(rng *rand.Rand) string { return "k" + string(rune('a'+rng.IntN(chaosKeys))) }

// reader verifies and binds.
func (s *chaosRun) reader(ctx context.Context, p *process, rng *rand.Rand) {
	var bound []*binding
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, testFreshness)
		b, err := p.admit(limited, key(rng), rng.IntN(3) == 0)
		cancel()
		if err == nil {
			bound = append(bound, b)
		}
		if len(bound) > 8 {
			p.release(bound[0])
			bound = bound[1:]
		}
		sleep(ctx, upTo(rng, testFreshness/20))
	}
}

// writer changes keys.
func (s *chaosRun) writer(ctx context.Context, p *process, rng *rand.Rand) {
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, 4*testFreshness)
		_ = p.change(limited, key(rng))
		cancel()
		sleep(ctx, upTo(rng, testFreshness/2))
	}
}

// watch reads events.
func (s *chaosRun) watch(ctx context.Context, p *process) {
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, 4*testFreshness)
		_ = p.readEvents(limited)
		cancel()
		sleep(ctx, testFreshness/2)
	}
}
