package work

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The writes workload measures creates and revocations, by 1, 8 and 64 writers that write as fast
// as possible. Each write is durable when the call returns. The revocations revoke the keys that
// the creates have created.
var writesWork = Workload{
	Name:  "writes",
	Title: "Creates and revocations",
	About: "1, 8 and 64 goroutines on one store. Each call returns once the change is on disk. " +
		"So the sync of the disk limits one writer, and many writers share one sync.",
	Goals: []Goal{
		{ID: "creates", Work: "creates, 64 writers / 1 writer", Bound: atLeast(15, Times)},
	},
}

func init() { writesWork.Run = runWrites }

func runWrites(ctx context.Context, e *Env) (o *Outcome, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	store, err := keystore.Open(filepath.Join(dir, "store"), peers.Options(0))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()

	var mu sync.Mutex
	var created []string // the IDs of keys that are not revoked
	create := func(int) func() error {
		return func() error {
			issued, err := store.Create(ctx, peers.Spec())
			if err != nil {
				return err
			}
			mu.Lock()
			created = append(created, issued.Key.ID)
			mu.Unlock()
			return nil
		}
	}
	revoke := func(int) func() error {
		return func() error {
			mu.Lock()
			if len(created) == 0 {
				mu.Unlock()
				return errors.New("there are no more keys to revoke")
			}
			id := created[len(created)-1]
			created = created[:len(created)-1]
			mu.Unlock()
			return store.Revoke(ctx, id, "measured")
		}
	}
	turn := e.turn(400 * time.Millisecond)
	name := func(what string, writers int) string {
		return fmt.Sprintf("%s, writers: %d", what, writers)
	}
	// Create enough keys, so that no turn of revocations runs out of keys, even if revocations are
	// much faster than creates.
	if _, err := measure.Throughput(256, 1, 8*turn, create); err != nil {
		return nil, err
	}
	var contestants []measure.Contestant
	for what, op := range map[string]func(int) func() error{"creates": create, "revocations": revoke} {
		for _, n := range []int{1, 8, 64} {
			sample := func(context.Context) (float64, error) {
				return measure.Throughput(n, 1, turn, op)
			}
			contestants = append(contestants, measure.Contestant{Name: name(what, n), Sample: sample})
		}
	}
	s, err := measure.Rounds(ctx, e.rounds(24), e.progress("writing"), contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	o.judge(&writesWork, "creates", measure.Ratios(s[name("creates", 64)], s[name("creates", 1)]))
	bars := chart.Bars{
		Name: "writes", Title: "Durable writes per second",
		Note: "more is better; logarithmic", Log: true,
	}
	for _, what := range []string{"creates", "revocations"} {
		for _, n := range []int{1, 8, 64} {
			rates := s[name(what, n)]
			o.figure(name(what, n), Rate, rates)
			median := measure.Median(rates)
			bars.Add(name(what, n), median, Rate.Format(median), true)
		}
		o.figure(what+", 64 writers / 1 writer", Times,
			measure.Ratios(s[name(what, 64)], s[name(what, 1)]))
	}
	o.Charts = append(o.Charts, &bars)
	return o, nil
}
