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

// The flood workload measures good traffic during an attack. The attack is a flood of calls with
// well-formed keys that were never issued, a different key in each call. The good callers have
// valid keys. All callers call as fast as the server answers, each side over its own connections.
// The reference is the same load with valid keys in place of the flood: the flood should slow the
// good callers down no more than other good callers would. The cache is exactly large enough for
// the valid keys, so that each entry that the flood added to the cache would evict a valid key.
var floodWork = Workload{
	Name:  "flood",
	Title: "A flood of unknown keys beside good traffic",
	About: "4 connections with valid keys and 4 connections of the flood, with 4 concurrent " +
		"calls on each connection, as fast as the server answers. The keys of the flood are " +
		"well-formed, and each call has a different key. The reference is the same load with " +
		"valid keys. There is no failure limit. The cache has space for the valid keys and no " +
		"more.",
	Goals: []Goal{
		{
			ID: "flood-hits", Work: "hit rate of good traffic beside the flood",
			Bound: atLeast(99.9, Percent),
		},
		{
			ID: "flood", Work: "good traffic beside the flood / beside an equal load of valid calls",
			Bound: atLeast(0.9, Times),
		},
	},
}

func init() { floodWork.Run = runFlood }

const (
	caseFlood = "good traffic beside the flood"
	caseEqual = "good traffic beside an equal load of valid calls"
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
	// These connections have no credential, because each call of a rival has its own credential.
	anonymous := make([]string, sides)
	rig, err := peers.NewRig(&peers.Service{},
		append(slices.Clone(good), anonymous...), auth.ServerOptions()...)
	if err != nil {
		return nil, err
	}
	end.add(rig.Close)
	// The flood and the valid rivals use the same connections, and send their credentials in the
	// same way.
	var next atomic.Uint64
	rival := func(credentials []peers.Bearer, want codes.Code) func(g int) func() error {
		return func(g int) func() error {
			call := rig.CallWith(ctx, len(good)+g%sides)
			return func() error {
				with := credentials[next.Add(1)%uint64(len(credentials))]
				if err := call(grpc.PerRPCCredentials(with)); status.Code(err) != want {
					return fmt.Errorf("the call of a rival must end with %v, but ended with: %v", want, err)
				}
				return nil
			}
		}
	}
	attack := rival(bearers(unknown), codes.Unauthenticated)
	valid := rival(bearers(good[sides:]), codes.OK)
	turn := e.turn(500 * time.Millisecond)
	// beside returns the rate of the good traffic and the rate of the rival.
	beside := func(other func(g int) func() error) (rate, rival float64, err error) {
		var wg sync.WaitGroup
		var rivalErr error
		wg.Go(func() { rival, rivalErr = measure.Throughput(sides*callsAtOnce, 1, turn, other) })
		rate, err = measure.Throughput(sides*callsAtOnce, 1, turn, func(g int) func() error {
			return rig.Call(ctx, g%sides)
		})
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
			// Each call of the flood is one miss. The remaining misses belong to the good traffic.
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
	o.judge(&floodWork, "flood-hits", hits[1:]) // without the round that warms up
	o.judge(&floodWork, "flood", measure.Ratios(s[caseFlood], s[caseEqual]))
	o.figure(caseFlood, Rate, s[caseFlood])
	o.figure("the flood itself", Rate, flooded[1:])
	o.figure(caseEqual, Rate, s[caseEqual])
	o.figure("the equal load of valid calls", Rate, equal[1:])
	return o, nil
}

func bearers(texts []string) []peers.Bearer {
	all := make([]peers.Bearer, len(texts))
	for i, text := range texts {
		all[i] = peers.Bearer(text)
	}
	return all
}
