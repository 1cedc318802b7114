// Package measure takes samples of the contestants of a comparison, in turns.
package measure

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// A Contestant is one side of a comparison. Sample measures the contestant once.
type Contestant struct {
	Name   string
	Sample func(ctx context.Context) (float64, error)
}

// Samples contains the measured values, by the name of the contestant. The i-th values of all
// contestants are from the same round.
type Samples map[string][]float64

// Rounds samples each contestant once in each of n rounds. Each round has another random order. The
// samples of an additional first round, which warms up, are discarded. If progress is not nil,
// Rounds calls progress at the start of each round.
func Rounds(
	ctx context.Context, n int, progress func(done, of int), contestants ...Contestant,
) (Samples, error) {
	samples := make(Samples)
	order := slices.Clone(contestants)
	draw := rand.New(rand.NewPCG(1, 2)) // the same sequence in each run
	for round := range n + 1 {
		if progress != nil {
			progress(round, n+1)
		}
		draw.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, c := range order {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			v, err := c.Sample(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", c.Name, err)
			}
			if round > 0 {
				samples[c.Name] = append(samples[c.Name], v)
			}
		}
	}
	return samples, nil
}

// A Case is an operation that is too fast to measure a single execution.
type Case struct {
	Name string
	Do   func(n int) error // runs the operation n times
}

// Timed returns a contestant for a case. A sample is the duration of one operation in nanoseconds,
// measured over a batch of operations that takes about the given duration. A batch should be
// shorter than a time slice of the scheduler, so that most batches run without interruption.
func Timed(c Case, batch time.Duration) (Contestant, error) {
	n := 1
	for {
		// Take the best of a few attempts. An attempt that was interrupted would make the batches
		// too short for a good measurement.
		best := time.Duration(math.MaxInt64)
		for attempt := range 5 {
			begin := time.Now()
			if err := c.Do(n); err != nil {
				return Contestant{}, fmt.Errorf("%s: %w", c.Name, err)
			}
			best = min(best, time.Since(begin))
			slow := n == 1 && attempt > 0 && best > 50*batch // no interruption takes as long
			if best < batch/2 || slow {
				break
			}
		}
		if best >= batch/2 || n >= 1<<24 {
			n = max(1, int(float64(n)*float64(batch)/float64(max(best, 1))))
			break
		}
		n *= 2
	}
	return Contestant{c.Name, func(context.Context) (float64, error) {
		begin := time.Now()
		err := c.Do(n)
		return float64(time.Since(begin).Nanoseconds()) / float64(n), err
	}}, nil
}

// AllTimed calls Timed for each of the cases.
func AllTimed(cases []Case, batch time.Duration) ([]Contestant, error) {
	var all []Contestant
	for _, c := range cases {
		timed, err := Timed(c, batch)
		if err != nil {
			return nil, err
		}
		all = append(all, timed)
	}
	return all, nil
}

// Throughput runs an operation in several goroutines for about d. Throughput returns the number of
// operations of all goroutines per second, from the start of the first goroutine to the end of the
// last goroutine. Each goroutine checks the clock after a batch of operations. For slow operations,
// batch should be 1. If one operation fails, Throughput stops and returns the error.
func Throughput(
	goroutines, batch int, d time.Duration, op func(goroutine int) func() error,
) (float64, error) {
	var (
		wg    sync.WaitGroup
		total atomic.Int64
		first atomic.Pointer[error]
		start = make(chan struct{})
		begin time.Time // set before start is closed
	)
	for g := range goroutines {
		do := op(g)
		wg.Go(func() {
			<-start
			done := 0
			for time.Since(begin) < d && first.Load() == nil {
				for range batch {
					if err := do(); err != nil {
						first.CompareAndSwap(nil, &err)
						return
					}
				}
				done += batch
			}
			total.Add(int64(done))
		})
	}
	begin = time.Now()
	close(start)
	wg.Wait()
	took := time.Since(begin)
	if err := first.Load(); err != nil {
		return 0, *err
	}
	return float64(total.Load()) / took.Seconds(), nil
}
