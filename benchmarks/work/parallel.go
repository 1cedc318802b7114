package work

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
)

// The parallel workload measures the verification of credentials by several goroutines at the same
// time. The result shows the effect of the locks of the store and of the caches of the processor.
// SHA-256 is the reference: goroutines that hash share no data, so SHA-256 shows the best possible
// result of the machine. Two hardware threads of one core are not twice as fast as one thread.
var parallelWork = Workload{
	Name:  "parallel",
	Title: "Verification by several goroutines",
	About: "The same as above, with 1, 2 and 8 goroutines. SHA-256 shares no data between " +
		"goroutines, and so shows the best possible result of the machine.",
	Goals: []Goal{
		{
			ID: "scale-hot", Work: "Verify hit, one key: throughput of 2 goroutines / 1",
			Bound: atLeast(1.8, Times),
		},
		{
			ID:    "scale-random",
			Work:  "Verify hit, 65,536 keys at random: throughput of 2 goroutines / 1",
			Bound: atLeast(1.8, Times),
		},
	},
}

func init() { parallelWork.Run = runParallel }

type parallelOp struct {
	name string
	op   func(goroutine int) func() error
}

func parallelOps(ctx context.Context, hot *hotStore) []parallelOp {
	return []parallelOp{
		{caseSHA256, func(int) func() error {
			plain := []byte(hot.tokens[0])
			return func() error {
				sha256.Sum256(plain)
				return nil
			}
		}},
		{caseHot, func(int) func() error {
			return func() error {
				_, err := hot.Verify(ctx, hot.tokens[0])
				return err
			}
		}},
		{caseRandom, func(g int) func() error {
			random := rand.New(rand.NewPCG(5, uint64(g)))
			mask := uint64(len(hot.tokens) - 1)
			return func() error {
				_, err := hot.Verify(ctx, hot.tokens[random.Uint64()&mask])
				return err
			}
		}},
	}
}

func runParallel(ctx context.Context, e *Env) (o *Outcome, err error) {
	hot, err := newHotStore(ctx, e, e.hotSize())
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, hot.Close()) }()
	ops := parallelOps(ctx, hot)
	counts := []int{1, 2, 8}
	name := func(op string, goroutines int) string {
		return fmt.Sprintf("%s: goroutines: %d", op, goroutines)
	}
	var contestants []measure.Contestant
	for _, op := range ops {
		for _, n := range counts {
			sample := func(context.Context) (float64, error) {
				return measure.Throughput(n, 100, e.turn(40*time.Millisecond), op.op)
			}
			contestants = append(contestants, measure.Contestant{Name: name(op.name, n), Sample: sample})
		}
	}
	progress := e.progress("verifying in parallel")
	s, err := measure.Rounds(ctx, e.rounds(101), progress, contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	for id, op := range map[string]string{"scale-hot": caseHot, "scale-random": caseRandom} {
		if runtime.GOMAXPROCS(0) < 2 {
			o.skip(&parallelWork, id, "this measurement needs two cores")
			continue
		}
		o.judge(&parallelWork, id, measure.Ratios(s[name(op, 2)], s[name(op, 1)]))
	}
	o.figure(caseSHA256+": 2 goroutines / 1", Times,
		measure.Ratios(s[name(caseSHA256, 2)], s[name(caseSHA256, 1)]))
	for _, c := range contestants {
		o.figure(c.Name, Rate, s[c.Name])
	}
	return o, nil
}
