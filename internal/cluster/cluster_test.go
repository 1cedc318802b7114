package cluster

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/sequencer"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// bubble runs a test in a bubble, with the correct protocol.
func bubble(t *testing.T, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(0)
		test(t, w)
		require.Empty(t, w.violations)
	})
}

// took returns how long a call takes.
func took(call func()) time.Duration {
	began := time.Now()
	call()
	return time.Since(began)
}

// Without failures, a Barrier takes a few round trips. The engine in memory answers in no time.
func TestBarrierWaitsForAcks(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b", "c")
		for range 10 {
			for _, p := range all {
				require.Zero(t, took(func() { require.NoError(t, p.c.Barrier(t.Context())) }))
			}
		}
		st := all[0].c.Stats()
		require.EqualValues(t, 10, st.Acked)
		require.Zero(t, st.Deadlines)
		require.Equal(t, 3, st.Processes)
	})
}

// A process that is cut off delays a Barrier by D(1+rho), until the process is evicted.
func TestBarrierWaitsUntilTheDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		all := w.joined(t, "a", "b")
		a, b := all[0], all[1]
		last := time.Now()
		b.link.set(func(f *fault) { f.dropCalls = true })
		wait := took(func() { require.NoError(t, a.change(ctx, "ka")) })
		require.Equal(t, Bound(testFreshness), wait)
		require.False(t, b.fresh())
		await("the eviction", func() bool { return a.c.Stats().Evictions > 0 })
		// 2D(1+rho) after the last heartbeat, and up to D/4 until the next look.
		require.GreaterOrEqual(t, time.Since(last), 2*Bound(testFreshness)-testFreshness/4)
		require.LessOrEqual(t, time.Since(last), 2*Bound(testFreshness)+testFreshness/3)
		require.Zero(t, took(func() { require.NoError(t, a.change(ctx, "ka")) }))
		require.Equal(t, 1, a.c.Stats().Processes)

		b.link.heal()
		b.awaitFresh()
		require.EqualValues(t, 2, b.c.Stats().Memberships)
		require.Zero(t, took(func() { require.NoError(t, a.change(ctx, "ka")) }))
		_, err := b.admit(ctx, "ka", false)
		require.NoError(t, err)
	})
}

// While the engine answers reads and refuses writes, the memory of a process does not grow, and the
// process is fresh again soon after the engine accepts writes.
func TestEngineThatRefusesWrites(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.add("a", 0)
		var refuses atomic.Bool
		a.link.hook = func(_ context.Context, point string, _ []backend.Change) error {
			if point == "apply" && refuses.Load() {
				return backend.ErrFull
			}
			return nil
		}
		require.NoError(t, a.join(t.Context(), testFreshness))
		defer a.c.Close()
		known := func() int {
			a.c.mu.Lock()
			defer a.c.mu.Unlock()
			return len(a.c.member.heartbeats)
		}
		refuses.Store(true)
		time.Sleep(1000 * testFreshness)
		require.LessOrEqual(t, known(), maxHeartbeats+1)
		require.Greater(t, a.c.Stats().FeedLag, 900*testFreshness)
		require.False(t, a.fresh())
		refuses.Store(false)
		a.awaitFresh()
		require.EqualValues(t, 1, a.c.Stats().Memberships)
		require.Less(t, known(), 3)
	})
}

// A process that reaches nothing cannot know whether its view is the view of the engine. So its
// Barrier waits for a confirmed write, also after the deadline.
func TestBarrierNeedsAConfirmedWrite(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b")
		a := all[0]
		a.link.set(func(f *fault) { f.dropCalls = true })
		ctx, cancel := context.WithTimeout(t.Context(), 2*testFreshness)
		defer cancel()
		require.ErrorIs(t, a.c.Barrier(ctx), context.DeadlineExceeded)

		done := make(chan error)
		go func() { done <- a.c.Barrier(t.Context()) }()
		time.Sleep(10 * testFreshness) // the process is evicted
		a.link.heal()
		require.NoError(t, <-done)
	})
}

func TestClose(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		all := w.joined(t, "a", "b")
		a, b := all[0], all[1]
		require.NoError(t, a.change(ctx, "ka"))
		bound, err := b.admit(ctx, "ka", true)
		require.NoError(t, err)
		waiting := make(chan error)
		a.link.set(func(f *fault) { f.silent = true })
		go func() { waiting <- b.c.Barrier(ctx) }()
		synctest.Wait()

		require.Equal(t, 4, w.table())
		b.c.Close()
		require.ErrorIs(t, <-waiting, ErrClosed)
		require.ErrorIs(t, b.c.Barrier(ctx), ErrClosed)
		_, err = b.c.Watermark(ctx)
		require.ErrorIs(t, err, ErrClosed)
		_, err = b.c.Guard()
		require.ErrorIs(t, err, ErrNoMembership)
		require.False(t, b.c.Fresh())
		require.True(t, bound.ended)
		require.Equal(t, 2, w.table(), "C12: the member record and the guard entry are gone")
		a.link.heal()
		synctest.Wait()
		require.Zero(t, took(func() { require.NoError(t, a.change(ctx, "ka")) }),
			"C12: no process waits for a closed process")
	})
	goleak.VerifyNone(t)
}

// Many processes that join and leave at the same time, and ask for watermarks, write the header at
// the same time. No process leaves anything behind.
func TestManyProcessesJoinAndLeave(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		const processes = 20
		results := make(chan error, processes)
		for i := range processes {
			p := w.add("p", uint64(i))
			p.link.set(func(f *fault) { f.delay = 2 * time.Millisecond })
			go func() {
				err := p.join(t.Context(), testFreshness)
				if err == nil {
					err = p.readEvents(t.Context())
					p.c.Close()
				}
				results <- err
			}()
		}
		for range processes {
			require.NoError(t, <-results)
		}
		require.Zero(t, w.table())
	})
}

// Close ends even if the engine never answers.
func TestCloseWithoutTheEngine(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		a := w.joined(t, "a")[0]
		a.link.set(func(f *fault) { f.dropCalls, f.silent = true, true })
		require.LessOrEqual(t, took(a.c.Close), time.Second)
	})
	goleak.VerifyNone(t)
}

func TestFreshnessBelongsToTheStore(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ctx := t.Context()
		a := w.add("a", 1)
		require.NoError(t, a.join(ctx, 0))
		require.Equal(t, DefaultFreshness, a.c.Freshness())
		b := w.add("b", 1)
		require.NoError(t, b.join(ctx, 0))

		c := w.add("c", 1)
		err := c.join(ctx, time.Second)
		require.ErrorIs(t, err, ErrFreshness)
		require.EqualError(t, err, "cluster: the store has another freshness: 3s, and this "+
			"process is configured with 1s: configure all processes with the same freshness, or "+
			"with 0 to use the freshness of the store")
		require.Equal(t, 4, w.table())

		a.c.Close()
		b.c.Close()
		require.NoError(t, c.join(ctx, time.Second), "an empty table takes another freshness")
		require.NoError(t, a.join(ctx, 0))
		require.Equal(t, time.Second, a.c.Freshness())
		a.c.Close()
		c.c.Close()
		require.ErrorContains(t, c.join(ctx, -1), "the freshness is -1ns: it must be 0")
	})
}

// Of two processes that join an empty table with different D at the same time, one is refused.
func TestFreshnessOfTwoProcessesThatJoinTogether(t *testing.T) {
	for range 50 {
		bubble(t, func(t *testing.T, w *world) {
			old := w.add("old", 1)
			require.NoError(t, old.join(t.Context(), 2*time.Second))
			old.c.Close()
			both := []*process{w.add("a", 1), w.add("b", 2)}
			errs := make([]error, 2)
			var joins sync.WaitGroup
			for i, p := range both {
				p.link.set(func(f *fault) { f.delay = time.Millisecond })
				joins.Go(func() { errs[i] = p.join(t.Context(), time.Duration(i+1)*time.Second) })
			}
			joins.Wait()
			require.True(t, (errs[0] == nil) != (errs[1] == nil), "%v", errs)
			require.ErrorIs(t, errors.Join(errs...), ErrFreshness)
			for i, p := range both {
				if errs[i] == nil {
					p.c.Close()
				}
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*testFreshness)
		defer cancel()
		p := w.add("unreachable", 1)
		p.link.set(func(f *fault) { f.dropCalls = true })
		err := p.join(ctx, 0)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "cluster: could not join the other processes: ")

		p = w.add("closed", 1)
		require.NoError(t, p.link.Close())
		require.ErrorIs(t, p.join(t.Context(), 0), backend.ErrClosed)

		newer, err := record.EncodeMemberTable(&record.MemberTable{Freshness: 1})
		require.NoError(t, err)
		newer = append(newer, 0x08, record.Format+1) // the last value of a field counts
		require.NoError(t, w.engine.Open().Apply(t.Context(),
			backend.Change{Key: []byte{memberSpace}, Value: newer}))
		p = w.add("older", 1)
		err = p.join(t.Context(), 0)
		require.ErrorIs(t, err, record.ErrNewer)
		require.ErrorContains(t, err, "header of the membership table")
	})
}

// A feed that is silent from the start does not delay Start for ever, and a feed that becomes
// silent is started again within the same membership.
func TestSilentFeedIsStartedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		p := w.add("p", 1)
		p.link.set(func(f *fault) { f.deadFeed = 1 })
		w.joinAndClose(t, p)
		joins := p.c.Stats().Memberships
		p.link.endFeeds()
		time.Sleep(3 * testFreshness)
		require.True(t, p.fresh())
		require.Equal(t, joins, p.c.Stats().Memberships)
		require.EqualValues(t, 1, p.c.Stats().Closings)
	})
}

// A process whose feed lags by more than D, and does not catch up because new changes come as fast
// as the process applies the old ones, joins again, and starts at the present.
func TestFeedThatLagsForGood(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "p")
		p := all[1]
		p.link.set(func(f *fault) { f.silent = true })
		const interval = testFreshness / 100
		writing, stop := context.WithCancel(t.Context())
		var writer sync.WaitGroup
		writer.Go(func() {
			b := w.engine.Open()
			for revision := uint64(0); writing.Err() == nil; revision++ {
				if err := b.Apply(writing, backend.Change{Key: []byte("kw"), Expect: revision,
					Restricts: true}); err != nil {
					return
				}
				sleep(writing, interval)
			}
		})
		time.Sleep(3 * testFreshness / 2)
		require.False(t, p.fresh())
		// Each batch takes as long as the interval between two changes: 1.5 s behind for good.
		p.link.set(func(f *fault) { f.silent, f.feedDelay, f.steady = false, interval, true })
		wait := took(p.awaitFresh)
		require.Less(t, wait, 3*testFreshness)
		require.EqualValues(t, 2, p.c.Stats().Memberships)
		p.link.set(func(f *fault) { f.feedDelay, f.steady = 0, false })
		stop()
		writer.Wait()
		require.NoError(t, p.change(t.Context(), "ka"))
	})
}

// A process joins again, with an empty cache, after a gap, after a restore of the engine, and after
// its member record was deleted.
func TestProcessJoinsAgain(t *testing.T) {
	for name, lose := range map[string]func(w *world, p *process){
		"gap": func(w *world, p *process) {
			p.link.set(func(f *fault) { f.feedErr = backend.ErrGap })
			time.Sleep(testFreshness / 2)
			p.link.heal()
		},
		"restore": func(w *world, p *process) {
			restore := w.engine.Save()
			time.Sleep(testFreshness)
			restore()
		},
		"deleted": func(w *world, p *process) {
			b := w.engine.Open()
			defer b.Close()
			guard, _ := p.c.Guard()
			key := append([]byte{memberSpace}, guard.Key[1:]...)
			for {
				e, err := b.Get(context.Background(), key)
				if err == nil {
					err = b.Apply(context.Background(),
						backend.Change{Key: key, Expect: e.Revision, Delete: true})
				}
				if err == nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, w *world) {
				all := w.joined(t, "p", "q")
				p, q := all[0], all[1]
				require.NoError(t, q.change(t.Context(), "ka"))
				bound, err := p.admit(t.Context(), "ka", true)
				require.NoError(t, err)
				lose(w, p)
				time.Sleep(testFreshness)
				p.awaitFresh()
				require.Empty(t, p.cache)
				require.True(t, bound.ended)
				require.Greater(t, p.c.Stats().Memberships, uint64(1))
				q.awaitFresh()
				require.NoError(t, q.change(t.Context(), "ka"))
			})
		})
	}
}

// A machine that sleeps stops its monotonic clock. The proof ends by the wall clock. A wall clock
// that is set forward closes the gate until the next proof, and a wall clock that is set back
// changes nothing.
func TestGateAndTheTwoClocks(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		p := w.joined(t, "p")[0]
		require.True(t, p.fresh())
		p.shift.Store(int64(-time.Hour))
		require.True(t, p.fresh())
		p.shift.Store(int64(time.Hour))
		require.False(t, p.fresh())
		time.Sleep(testFreshness / 4)
		synctest.Wait()
		require.True(t, p.fresh())

		p.link.set(func(f *fault) { f.stopped = true })
		asleep := testFreshness * 11 / 10
		time.Sleep(asleep)
		p.asleep.Add(int64(asleep))
		require.False(t, p.fresh(), "the machine slept for longer than D")
		p.link.heal()
		time.Sleep(testFreshness / 4)
		require.True(t, p.fresh())
		require.EqualValues(t, 1, p.c.Stats().Memberships)
	})
}

// The contexts end when the gate closes, without a call of Fresh.
func TestContextsEndWhenTheGateCloses(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		p := w.joined(t, "p")[0]
		require.NoError(t, p.change(t.Context(), "ka"))
		bound, err := p.admit(t.Context(), "ka", true)
		require.NoError(t, err)
		p.link.set(func(f *fault) { f.dropReply = true })
		time.Sleep(testFreshness)
		synctest.Wait()
		require.True(t, bound.ended)
		require.EqualValues(t, 1, p.c.Stats().Closings)
	})
}

// A pending stamp at or below the watermark delays Watermark, in every process.
func TestWatermarkWaitsForPendingStamps(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b")
		for _, p := range all {
			stamp := p.stamps.begin(p.clock().Wall)
			done := make(chan int64)
			go func() {
				last, err := all[0].c.Watermark(t.Context())
				if err != nil {
					t.Error(err)
				}
				done <- last
			}()
			time.Sleep(20 * testFreshness)
			select {
			case <-done:
				require.Fail(t, "a stamp is pending")
			default:
			}
			p.stamps.end(stamp)
			p.c.StampsMoved()
			require.Zero(t, took(func() { require.GreaterOrEqual(t, <-done, stamp) }))
			later := p.stamps.begin(0)
			require.Greater(t, later, stamp, "no stamp below the floor")
			p.stamps.end(later)
		}
		ctx, cancel := context.WithTimeout(t.Context(), testFreshness)
		defer cancel()
		all[1].stamps.begin(all[1].clock().Wall)
		_, err := all[0].c.Watermark(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// Watermark includes the events of a process whose clock is ahead, also after the process has left.
func TestWatermarkOfAClockThatIsAhead(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b")
		a, b := all[0], all[1]
		event := func() (stamp int64) {
			stamp = b.stamps.begin(max(b.stamps.newest(), b.clock().Wall) + int64(time.Hour))
			b.stamps.end(stamp)
			return stamp
		}
		stamp := event()
		last, err := a.c.Watermark(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, last, stamp)

		// The record of b shows a watermark above the clock of a already, and b answers late.
		b.link.set(func(f *fault) { f.delay = testFreshness / 40 })
		stamp = event()
		last, err = a.c.Watermark(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, last, stamp)

		stamp = event()
		b.c.Close()
		last, err = a.c.Watermark(t.Context())
		require.NoError(t, err)
		require.GreaterOrEqual(t, last, stamp)
		require.Greater(t, a.stamps.begin(0), stamp)
	})
}

// A process is first if no member has a lower ID.
func TestFirst(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b", "c")
		first := func() (n int) {
			for _, p := range all {
				if p.c.First() {
					n++
				}
			}
			return n
		}
		synctest.Wait()
		require.Equal(t, 1, first())
		for range 2 {
			for i, p := range all {
				if p.c.First() {
					p.c.Close()
					all = append(all[:i:i], all[i+1:]...)
					break
				}
			}
			synctest.Wait()
			require.Equal(t, 1, first())
		}
	})
}

// A member that is silent delays Watermark until the member is evicted. Then no stamp of the member
// is pending any more, because of the guard entry.
func TestWatermarkEndsWithAnEviction(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b")
		all[1].link.set(func(f *fault) { f.dropCalls = true })
		wait := took(func() { require.NoError(t, all[0].readEvents(t.Context())) })
		require.Greater(t, wait, 2*testFreshness)
		require.Less(t, wait, 3*testFreshness)
		// The feed delivers the eviction before the process that evicts has counted the eviction.
		synctest.Wait()
		require.EqualValues(t, 1, all[0].c.Stats().Evictions)
	})
}

// A member whose record is damaged has acked nothing, until its next heartbeat.
func TestDamagedMemberRecord(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		all := w.joined(t, "a", "b")
		guard, err := all[1].c.Guard()
		require.NoError(t, err)
		w.write(t, append([]byte{memberSpace}, guard.Key[1:]...), []byte("damage"))
		require.NoError(t, all[0].change(t.Context(), "ka"))
		time.Sleep(testFreshness)
		require.Zero(t, took(func() { require.NoError(t, all[0].change(t.Context(), "ka")) }))
		require.EqualValues(t, 1, all[1].c.Stats().Memberships)
	})
}

// A floor that no clock can have is damage: no process takes over the floor. With the floor in the
// header, every Watermark would wait for good, also after all processes have started again.
func TestFloorBeyondAllStamps(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		start := func() *Cluster {
			var stamps sequencer.Sequencer
			c, err := Start(t.Context(), Config{
				Backend: w.engine.Open(), Freshness: testFreshness, Stamps: stamps.Raise,
				Changed: func([]backend.Entry) {}, Flush: func() {}, EndAll: func(error) {},
			})
			require.NoError(t, err)
			return c
		}
		value, err := record.EncodeMember(&record.Member{Heartbeat: 1, Floor: record.MaxStamp + 1})
		require.NoError(t, err)
		key := append([]byte{memberSpace}, make([]byte, 16)...)
		require.NoError(t, w.engine.Open().Apply(t.Context(),
			backend.Change{Key: key, Value: value}, backend.Change{Key: guardKeyOf(key)}))
		c := start()
		time.Sleep(10 * testFreshness)
		require.Equal(t, 1, c.Stats().Processes, "the damaged member was not evicted")
		c.Close()
		c = start()
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err = c.Watermark(ctx)
		require.NoError(t, err)
	})
}

// A member whose clock is ahead is reported once an hour.
func TestClockThatIsAheadIsReported(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		var lines bytes.Buffer
		c, err := Start(t.Context(), Config{
			Backend: w.engine.Open(), Freshness: testFreshness,
			Changed: func([]backend.Entry) {}, Flush: func() {}, EndAll: func(error) {},
			Log: slog.New(slog.NewTextHandler(&lines, nil)),
		})
		require.NoError(t, err)
		p := w.add("ahead", 1)
		p.shift.Store(int64(time.Minute))
		w.joinAndClose(t, p)
		time.Sleep(20 * time.Minute)
		c.Close()
		require.Equal(t, 1, bytes.Count(lines.Bytes(), []byte("process=ahead difference=1m0s")),
			lines.String())
		require.Contains(t, lines.String(), "NTP")
	})
}

// A lockHandler counts the records that arrive while the lock is free. Another goroutine may hold
// the lock for a moment, and does not hold the lock while the handler sleeps.
type lockHandler struct {
	slog.Handler
	locked func() bool
	calls  *atomic.Int64
}

func (h lockHandler) Handle(context.Context, slog.Record) error {
	for range 100 {
		if !h.locked() {
			h.calls.Add(1)
			break
		}
		time.Sleep(time.Nanosecond)
	}
	return nil
}

// The Cluster holds no lock while a logger runs.
func TestALoggerMayCallTheCluster(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		var c *Cluster
		var calls atomic.Int64
		locked := func() bool {
			free := c.mu.TryLock()
			if free {
				c.mu.Unlock()
			}
			return !free
		}
		c, err := Start(t.Context(), Config{
			Backend: w.engine.Open(), Freshness: testFreshness,
			Changed: func([]backend.Entry) {}, Flush: func() {}, EndAll: func(error) {},
			Log: slog.New(lockHandler{slog.NewTextHandler(io.Discard, nil), locked, &calls}),
		})
		require.NoError(t, err)
		p := w.add("ahead", 1)
		p.shift.Store(int64(time.Minute))
		w.joinAndClose(t, p)
		time.Sleep(testFreshness)
		c.Close()
		require.EqualValues(t, 1, calls.Load())
	})
}

func TestFreshDoesNotAllocate(t *testing.T) {
	c := startAlone(t)
	require.Zero(t, testing.AllocsPerRun(1000, func() { require.True(t, c.Fresh()) }))
}

func startAlone(t testing.TB) *Cluster {
	c, err := Start(t.Context(), Config{
		Backend: backendtest.NewShared().Open(),
		Changed: func([]backend.Entry) {}, Flush: func() {}, EndAll: func(error) {},
	})
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

// BenchmarkFresh measures the gate, beside the two clocks that the gate reads.
func BenchmarkFresh(b *testing.B) {
	c := startAlone(b)
	b.Run("fresh", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if !c.Fresh() {
				b.Fatal("closed")
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if !c.Fresh() {
					b.Error("closed")
				}
			}
		})
	})
	origin := time.Now()
	var sum int64
	b.Run("time.Now", func(b *testing.B) {
		for b.Loop() {
			sum += time.Now().UnixNano()
		}
	})
	b.Run("time.Since", func(b *testing.B) {
		for b.Loop() {
			sum += int64(time.Since(origin))
		}
	})
}
