package work

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// startSharedPeers starts the peers that share their credentials: the store, a look-up for each
// call, and a cache before the look-up. end ends everything that was started.
func startSharedPeers(ctx context.Context, e *Env, end *closer) ([]*peers.SharedPeer, error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	end.add(n.close)
	stores, err := n.openStores(ctx, sharing, "peers", sharedOptions(), end)
	if err != nil {
		return nil, err
	}
	own, err := peers.StartShared(ctx, stores[0], stores[1])
	if err != nil {
		return nil, err
	}
	lookUps, err := n.lookUps(ctx)
	if err != nil {
		return nil, err
	}
	return append([]*peers.SharedPeer{own}, lookUps...), nil
}

// The shared-verify workload measures the check of one credential by one goroutine, without gRPC.
var sharedVerifyWork = Workload{
	Name:  "shared-verify",
	Title: "Verification of one credential, shared by three processes",
	About: "One goroutine, without gRPC, with one credential. The check of grpc-api-key hits the " +
		"cache of the process, and asks whether the process is in contact with the others.",
}

func init() { sharedVerifyWork.Run = runSharedVerify }

func runSharedVerify(ctx context.Context, e *Env) (o *Outcome, err error) {
	var end closer
	defer end.into(&err)
	all, err := startSharedPeers(ctx, e, &end)
	if err != nil {
		return nil, err
	}
	var cases []measure.Case
	for _, p := range all {
		cases = append(cases, measure.Case{Name: p.Name, Do: func(n int) error {
			for range n {
				if err := p.Check(ctx, p.Good[0]); err != nil {
					return err
				}
			}
			return nil
		}})
	}
	contestants, err := measure.AllTimed(cases, e.turn(4*time.Millisecond))
	if err != nil {
		return nil, err
	}
	s, err := measure.Rounds(ctx, e.rounds(101), e.progress("verifying"), contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	for _, p := range all {
		o.figure(p.Name, Nanos, s[p.Name])
	}
	for _, p := range all {
		o.note("%s: %s.", p.Name, p.How)
	}
	return o, nil
}

// The shared-miss workload measures a Verify that reads the engine, because the key is not in the
// cache, and a look-up of the engine.
var missWork = Workload{
	Name:  "shared-miss",
	Title: "Verification of a key that is not in the cache",
	About: "One goroutine, without gRPC, and a store without a cache. The look-up is that of a " +
		"service without a store: one read of the same engine, by the SHA-256 of the credential. " +
		"Each call has a deadline.",
	Goals: []Goal{
		{
			ID: "shared-miss", Work: "Verify of a key that is not in the cache / a look-up",
			Bound: atMost(1.3, Times),
		},
	},
}

func init() { missWork.Run = runMiss }

func runMiss(ctx context.Context, e *Env) (o *Outcome, err error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(n.close)
	opts := sharedOptions()
	opts.CacheSize = -1
	store, closeStore, err := n.openStore(ctx, "miss", opts)
	if err != nil {
		return nil, err
	}
	end.add(closeStore)
	issued, err := store.Create(ctx, peers.Spec())
	if err != nil {
		return nil, err
	}
	token := issued.Secret.Reveal()
	lookUps, err := n.lookUps(ctx)
	if err != nil {
		return nil, err
	}
	const miss = "Verify of a key that is not in the cache"
	each := lookUps[0]
	contestant := func(name string, call func(context.Context) error) measure.Contestant {
		return measure.Contestant{Name: name, Sample: func(ctx context.Context) (float64, error) {
			ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			return timed(func() error { return call(ctx) })
		}}
	}
	s, err := measure.Rounds(ctx, e.rounds(2000), e.progress("verifying"),
		contestant(miss, func(ctx context.Context) error {
			_, err := store.Verify(ctx, token)
			return err
		}),
		contestant(each.Name, func(ctx context.Context) error {
			return each.Check(ctx, each.Good[0])
		}))
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	o.judge(&missWork, "shared-miss", measure.Ratios(s[miss], s[each.Name]))
	o.figure(miss, Nanos, s[miss])
	o.figure(each.Name, Nanos, s[each.Name])
	o.note("%s: %s.", each.Name, each.How)
	return o, nil
}

// The shared-unary workload measures unary calls over a real socket.
var sharedUnaryWork = Workload{
	Name:  "shared-unary",
	Title: "Unary calls, end to end, with shared credentials",
	About: "8 connections over loopback, each with another credential and 4 concurrent calls, and " +
		"64 bytes in each direction. Servers, callers and the engine share the machine. A real " +
		"network would slow down only the peer that reads for each call.",
	Goals: []Goal{
		{
			ID: "shared-unary", Work: "calls with grpc-api-key / calls with a look-up each",
			Bound: atLeast(1.5, Times),
		},
	},
}

func init() { sharedUnaryWork.Run = runSharedUnary }

func runSharedUnary(ctx context.Context, e *Env) (o *Outcome, err error) {
	var end closer
	defer end.into(&err)
	all, err := startSharedPeers(ctx, e, &end)
	if err != nil {
		return nil, err
	}
	var contestants []measure.Contestant
	for _, p := range all {
		rig, err := peers.NewRig(&peers.Service{}, p.Good, p.Options...)
		if err != nil {
			return nil, err
		}
		end.add(rig.Close)
		contestants = append(contestants, measure.Contestant{Name: p.Name,
			Sample: func(context.Context) (float64, error) {
				call := func(g int) func() error { return rig.Call(ctx, g) }
				return measure.Throughput(callsAtOnce*len(p.Good), 1,
					e.turn(300*time.Millisecond), call)
			}})
	}
	s, err := measure.Rounds(ctx, e.rounds(21), e.progress("calling"), contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	o.judge(&sharedUnaryWork, "shared-unary", measure.Ratios(s[peers.Shared], s[all[1].Name]))
	for _, p := range all {
		o.figure(p.Name, Rate, s[p.Name])
	}
	return o, nil
}

// The shared-stale workload measures how long a revoked credential is admitted in another process
// after the revocation has returned.
var staleWork = Workload{
	Name:  "shared-stale",
	Title: "Admitted after the revocation has returned",
	About: "A caller uses a new credential in one process, one call after the other, for a random " +
		"part of the TTL. Then another process revokes the credential. The figure is the time from " +
		"the return of the revocation to the last call that began afterwards and was admitted, or " +
		"0.",
	Goals: []Goal{
		{
			ID: "shared-stale", Work: "grpc-api-key: admitted after the revocation has returned",
			Bound: atMost(0, Nanos),
		},
	},
}

func init() { staleWork.Run = runStale }

func runStale(ctx context.Context, e *Env) (o *Outcome, err error) {
	var end closer
	defer end.into(&err)
	all, err := startSharedPeers(ctx, e, &end)
	if err != nil {
		return nil, err
	}
	var contestants []measure.Contestant
	for _, p := range all {
		contestants = append(contestants, measure.Contestant{Name: p.Name,
			Sample: func(ctx context.Context) (float64, error) { return staleFor(ctx, p) }})
	}
	s, err := measure.Rounds(ctx, e.rounds(25), e.progress("revoking"), contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	o.judge(&staleWork, "shared-stale", s[peers.Shared])
	for _, p := range all {
		o.figure(p.Name, Nanos, s[p.Name])
		o.note("%s: at most %s", p.Name, Nanos.Format(measure.Quantile(s[p.Name], 1)))
	}
	return o, nil
}

// staleFor returns for how long a peer admits a credential after the revocation has returned.
func staleFor(ctx context.Context, p *peers.SharedPeer) (float64, error) {
	id, credential, err := p.Issue(ctx)
	if err != nil {
		return 0, err
	}
	if err := p.Check(ctx, credential); err != nil {
		return 0, err
	}
	time.Sleep(rand.N(peers.TTL))
	if err := p.Check(ctx, credential); err != nil {
		return 0, err
	}
	if err := p.Revoke(ctx, id); err != nil {
		return 0, err
	}
	returned := time.Now()
	stale := time.Duration(0)
	for time.Since(returned) < 2*peers.TTL {
		began := time.Now()
		if err := p.Check(ctx, credential); err != nil {
			return float64(stale.Nanoseconds()), nil
		}
		stale = began.Sub(returned)
		time.Sleep(time.Millisecond)
	}
	return 0, fmt.Errorf("%s admits a revoked credential for longer than twice the TTL", p.Name)
}
