package work

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A flood of keys that nobody issued, well-formed and each another one, beside callers with good keys. All of them call as
// fast as they are answered, over their own connections. The measure is the same with good keys in the place of the flood's:
// what it takes from the others should be no more than what so many good callers would. The cache is as large as the good
// keys are many, so that each thing that the flood put into it would push one of them out.
var floodWork = Workload{
	Name:  "flood",
	Title: "A flood of unknown keys beside good traffic",
	About: "4 connections with good keys and 4 of the flood, 4 calls at once on each, as fast as they are answered. The flood's " +
		"keys are well-formed, and each is another one; the measure is the same load with good keys. No failure limit is set. " +
		"The cache holds the good keys and no more.",
	Goals: []Goal{
		{ID: "flood-hits", Work: "hit rate of good traffic beside the flood", Bound: atLeast(99.9, Percent)},
		{ID: "flood", Work: "good traffic beside the flood / beside an equal load of valid calls", Bound: atLeast(0.9, Times)},
	},
}

func init() { floodWork.Run = runFlood }

const (
	caseFlood = "good traffic beside the flood"
	caseEqual = "good traffic beside as many more with good keys"
)

func runFlood(ctx context.Context, e *Env) (o *Outcome, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	const sides = 4 // connections of each kind
	store, err := keystore.Open(filepath.Join(dir, "store"), peers.Options(2*sides))
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(store.Close)
	good, err := peers.Create(ctx, store, 2*sides, 2*sides, nil)
	if err != nil {
		return nil, err
	}
	if _, err := peers.Create(ctx, store, e.size(10_000), 0, e.progress("creating keys")); err != nil {
		return nil, err
	}
	for _, text := range good {
		if _, err := store.Verify(ctx, text); err != nil {
			return nil, err
		}
	}
	format, err := token.NewFormat("oil", 64, keystore.ASCII62)
	if err != nil {
		return nil, err
	}
	unknown := make([]string, e.size(50_000))
	for i := range unknown {
		_, unknown[i] = format.New()
	}
	auth, err := interceptor.New(store)
	if err != nil {
		return nil, err
	}
	anonymous := make([]string, sides) // connections without a credential: each call of a rival has its own
	rig, err := peers.NewRig(&peers.Service{}, append(slices.Clone(good), anonymous...), auth.ServerOptions()...)
	if err != nil {
		return nil, err
	}
	end.add(rig.Close)
	// Both kinds of rivals call over the same connections, and send a credential with each call in the same way.
	var next atomic.Uint64
	rival := func(credentials []peers.Bearer, want codes.Code) func(g int) func() error {
		return func(g int) func() error {
			call := rig.CallWith(ctx, len(good)+g%sides)
			return func() error {
				with := credentials[next.Add(1)%uint64(len(credentials))]
				if err := call(grpc.PerRPCCredentials(with)); status.Code(err) != want {
					return fmt.Errorf("a rival's call should end with %v: %v", want, err)
				}
				return nil
			}
		}
	}
	attack := rival(bearers(unknown), codes.Unauthenticated)
	valid := rival(bearers(good[sides:]), codes.OK)
	turn := e.turn(500 * time.Millisecond)
	// beside returns the rates of the good traffic and of what goes on beside it.
	beside := func(other func(g int) func() error) (rate, rival float64, err error) {
		var wg sync.WaitGroup
		var rivalErr error
		wg.Go(func() { rival, rivalErr = measure.Throughput(sides*callsAtOnce, 1, turn, other) })
		rate, err = measure.Throughput(sides*callsAtOnce, 1, turn, func(g int) func() error { return rig.Call(ctx, g%sides) })
		wg.Wait()
		if err == nil {
			err = rivalErr
		}
		return rate, rival, err
	}
	var hits, flooded, equal []float64
	s, err := measure.Rounds(ctx, e.rounds(20), e.progress("flooding"),
		measure.Contestant{Name: caseFlood, Sample: func(context.Context) (float64, error) {
			before, sent := store.Stats(), next.Load()
			rate, rival, err := beside(attack)
			after := store.Stats()
			// Each call of the flood's is one miss and one refusal; the other misses are the good traffic's.
			attacks := next.Load() - sent
			misses := float64(after.Misses-before.Misses) - float64(attacks)
			hits = append(hits, 100*(1-misses/(misses+float64(after.Hits-before.Hits))))
			flooded = append(flooded, rival)
			return rate, err
		}},
		measure.Contestant{Name: caseEqual, Sample: func(context.Context) (float64, error) {
			rate, rival, err := beside(valid)
			equal = append(equal, rival)
			return rate, err
		}},
	)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	o.judge(&floodWork, "flood-hits", hits[1:]) // without the round that warmed up
	o.judge(&floodWork, "flood", measure.Ratios(s[caseFlood], s[caseEqual]))
	o.figure(caseFlood, Rate, s[caseFlood])
	o.figure("the flood itself", Rate, flooded[1:])
	o.figure(caseEqual, Rate, s[caseEqual])
	o.figure("those with good keys", Rate, equal[1:])
	return o, nil
}

func bearers(texts []string) []peers.Bearer {
	all := make([]peers.Bearer, len(texts))
	for i, text := range texts {
		all[i] = peers.Bearer(text)
	}
	return all
}
