// Package measure takes samples of things that are compared, in turns.
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

// A Contestant is one of the things that are compared. Sample measures it once.
type Contestant struct {
	Name   string
	Sample func(ctx context.Context) (float64, error)
}

// Samples are what the rounds measured, by the contestant's name: the i-th of each are from one round.
type Samples map[string][]float64

// Rounds has each contestant sampled once in each of n rounds, in an order that is drawn anew for each. A round before the
// first warms up, and is not kept. Progress, unless it is nil, is told of each round that begins.
func Rounds(ctx context.Context, n int, progress func(done, of int), contestants ...Contestant) (Samples, error) {
	samples := make(Samples)
	order := slices.Clone(contestants)
	draw := rand.New(rand.NewPCG(1, 2)) // the same orders in each run
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

// A Case is an operation that is too quick to be timed alone.
type Case struct {
	Name string
	Do   func(n int) error // does it n times
}

// Timed makes a contestant of a case: nanoseconds of one operation, from batches that take about so long. A batch should be
// shorter than what the scheduler gives a thread, so that most of them run undisturbed.
func Timed(c Case, batch time.Duration) (Contestant, error) {
	n := 1
	for {
		// The best of a few, or one that was disturbed would make the batches too short to be timed.
		best := time.Duration(math.MaxInt64)
		for range 5 {
			begin := time.Now()
			if err := c.Do(n); err != nil {
				return Contestant{}, fmt.Errorf("%s: %w", c.Name, err)
			}
			best = min(best, time.Since(begin))
			if best < batch/2 {
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

// AllTimed is Timed for many.
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

// Throughput runs an operation in so many goroutines for about d, and returns how often it was done in a second, by all of
// them, from the start of the first to the end of the last. Each goroutine looks at the clock after every batch of
// operations: 1 for slow ones. An error of one is that of all.
func Throughput(goroutines, batch int, d time.Duration, op func(goroutine int) func() error) (float64, error) {
	var (
		wg    sync.WaitGroup
		total atomic.Int64
		first atomic.Pointer[error]
		start = make(chan struct{})
		begin time.Time // before start is closed
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
