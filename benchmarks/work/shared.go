package work

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Shared returns the workloads of a store that several processes share, in the order of the report.
func Shared() []Workload {
	return []Workload{
		sharedRevokeWork, sharedWritesWork, revokeAllWork, startWork, restWork, missWork,
		sharedVerifyWork, sharedUnaryWork, staleWork,
	}
}

const (
	oneCommit = "one commit"
	// sharing is the number of processes, where a workload does not say otherwise.
	sharing = 3
)

// sharedOptions are the options of each process. The Timeout is long, because the machine is busy.
func sharedOptions() *keystore.Options { return &keystore.Options{Timeout: time.Minute} }

// commits returns a function that makes one small commit of the engine, without a store.
func (n *engine) commits(ctx context.Context, end *closer) (func() error, error) {
	b, disconnect, err := n.open(ctx, "commits")
	if err != nil {
		return nil, err
	}
	end.add(func() error { return errors.Join(b.Close(), disconnect()) })
	var mu sync.Mutex
	made := 0
	return func() error {
		mu.Lock()
		made++
		key := fmt.Append(nil, made)
		mu.Unlock()
		return b.Apply(ctx, backend.Change{Key: key, Value: make([]byte, 100)})
	}, nil
}

// timed returns the duration of f in nanoseconds.
func timed(f func() error) (float64, error) {
	begin := time.Now()
	err := f()
	return float64(time.Since(begin).Nanoseconds()), err
}

// The shared-revoke workload measures revocations of a key that is cached in three processes and
// bound to a session in each: until the key is refused and the session has ended in every process,
// and until Revoke returns. One commit of the same engine is measured beside.
var sharedRevokeWork = Workload{
	Name:  "shared-revoke",
	Title: "Revocation in three processes",
	About: "Three processes have the key in their caches, and one session each. The time until the " +
		"key is refused everywhere is the time until the last session has ended: from this moment " +
		"on, each process refuses the key too. One commit is one small transaction of the same " +
		"engine.",
	Goals: revokeGoals("etcd"),
}

func init() { sharedRevokeWork.Run = runSharedRevoke }

// revokeGoals returns the goals of the shared-revoke workload on an engine. A commit of etcd is
// faster than a commit of PostgreSQL that waits for a standby.
func revokeGoals(engine string) []Goal {
	bound := atMost(10, Times)
	if engine == "postgres" {
		bound = atMost(6, Times)
	}
	return []Goal{{
		ID: "shared-revoke", Work: "return of Revoke, in force in 3 processes / one commit",
		Bound: bound,
	}}
}

func runSharedRevoke(ctx context.Context, e *Env) (o *Outcome, err error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(n.close)
	stores, err := n.openStores(ctx, sharing, "revoke", sharedOptions(), &end)
	if err != nil {
		return nil, err
	}
	commit, err := n.commits(ctx, &end)
	if err != nil {
		return nil, err
	}
	var refused []float64
	round := 0
	revoke := func(context.Context) (float64, error) {
		round++
		took, everywhere, err := revokeEverywhere(ctx, stores, round)
		refused = append(refused, everywhere)
		return took, err
	}
	s, err := measure.Rounds(ctx, e.rounds(400), e.progress("revoking"),
		measure.Contestant{Name: "return of Revoke", Sample: revoke},
		measure.Contestant{Name: oneCommit, Sample: func(context.Context) (float64, error) {
			return timed(commit)
		}})
	if err != nil {
		return nil, err
	}
	refused = refused[1:] // without the warm-up
	o = &Outcome{}
	w := sharedRevokeWork
	w.Goals = revokeGoals(e.Engine)
	o.judge(&w, "shared-revoke", measure.Ratios(s["return of Revoke"], s[oneCommit]))
	for _, f := range []Figure{
		{oneCommit, Nanos, s[oneCommit]},
		{"until the key is refused in every process", Nanos, refused},
		{"return of Revoke", Nanos, s["return of Revoke"]},
	} {
		o.figure(f.Name, f.Unit, f.Samples)
		o.note("%s: p99 %s", f.Name, f.Unit.Format(measure.Quantile(f.Samples, 0.99)))
	}
	o.figure("until the key is refused in every process / one commit", Times,
		measure.Ratios(refused, s[oneCommit]))
	return o, nil
}

// revokeEverywhere revokes a new key in one of the stores. revokeEverywhere returns the time until
// Revoke returned, and until the sessions of the key had ended in all stores.
func revokeEverywhere(
	ctx context.Context, stores []*keystore.Store, round int,
) (took, everywhere float64, err error) {
	issued, err := stores[round%len(stores)].Create(ctx, peers.Spec())
	if err != nil {
		return 0, 0, err
	}
	token := issued.Secret.Reveal()
	ended := make(chan time.Time, len(stores))
	for _, s := range stores {
		if _, err := s.Verify(ctx, token); err != nil {
			return 0, 0, err
		}
		session, err := s.Bind(ctx, token)
		if err != nil {
			return 0, 0, err
		}
		defer session.Close()
		session.OnEnd(func() { ended <- time.Now() })
	}
	begin := time.Now()
	took, err = timed(func() error {
		return stores[(round+1)%len(stores)].Revoke(ctx, issued.Key.ID, "measured")
	})
	if err != nil {
		return 0, 0, err
	}
	var last time.Time
	for range stores {
		if at := <-ended; at.After(last) {
			last = at
		}
	}
	for _, s := range stores {
		if _, err := s.Verify(ctx, token); !errors.Is(err, keystore.ErrRevoked) {
			return 0, 0, fmt.Errorf("a revoked key is not refused as revoked: %w", err)
		}
	}
	return took, float64(last.Sub(begin).Nanoseconds()), nil
}

// The shared-writes workload measures creates and revocations by 1, 16 and 64 writers in one of
// three processes, and small commits of the same engine by as many writers.
var sharedWritesWork = Workload{
	Name:  "shared-writes",
	Title: "Creates and revocations, with three processes",
	About: "1, 16 and 64 goroutines in one of three processes. A create returns once the engine has " +
		"committed the key. A revocation returns once it is in force in all three processes. A " +
		"commit is a small transaction of the same engine, without a store.",
}

func init() { sharedWritesWork.Run = runSharedWrites }

func runSharedWrites(ctx context.Context, e *Env) (o *Outcome, err error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(n.close)
	stores, err := n.openStores(ctx, sharing, "writes", sharedOptions(), &end)
	if err != nil {
		return nil, err
	}
	commit, err := n.commits(ctx, &end)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var created []string // the IDs of keys that are not revoked
	create := func() error {
		issued, err := stores[0].Create(ctx, peers.Spec())
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		created = append(created, issued.Key.ID)
		return nil
	}
	revoke := func() error {
		mu.Lock()
		if len(created) == 0 {
			mu.Unlock()
			return errors.New("there are no more keys to revoke")
		}
		id := created[len(created)-1]
		created = created[:len(created)-1]
		mu.Unlock()
		return stores[0].Revoke(ctx, id, "measured")
	}
	turn := e.turn(time.Second)
	_, err = measure.Throughput(64, 1, 4*turn, func(int) func() error { return create })
	if err != nil {
		return nil, err
	}
	whats := []string{"commits", "creates", "revocations"}
	ops := []func() error{commit, create, revoke}
	writers := []int{1, 16, 64}
	name := func(what string, writers int) string {
		return fmt.Sprintf("%s, writers: %d", what, writers)
	}
	var contestants []measure.Contestant
	for i, what := range whats {
		for _, w := range writers {
			sample := func(context.Context) (float64, error) {
				return measure.Throughput(w, 1, turn, func(int) func() error { return ops[i] })
			}
			contestants = append(contestants, measure.Contestant{Name: name(what, w), Sample: sample})
		}
	}
	s, err := measure.Rounds(ctx, e.rounds(11), e.progress("writing"), contestants...)
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	for _, what := range whats {
		for _, w := range writers {
			o.figure(name(what, w), Rate, s[name(what, w)])
		}
	}
	for _, what := range whats[1:] {
		for _, w := range writers {
			o.figure(fmt.Sprintf("%s / commits, writers: %d", what, w), Times,
				measure.Ratios(s[name(what, w)], s[name("commits", w)]))
		}
	}
	return o, nil
}

// The shared-start workload measures how long a process takes from its first connection until it
// may admit callers.
var startWork = Workload{
	Name:  "shared-start",
	Title: "Start of a process",
	About: "From the first connection to the engine until the process may admit callers, without " +
		"the time for starting the program: alone, and beside two other processes.",
}

func init() { startWork.Run = runStart }

func runStart(ctx context.Context, e *Env) (o *Outcome, err error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(n.close)
	if _, err := n.openStores(ctx, sharing-1, "others", sharedOptions(), &end); err != nil {
		return nil, err
	}
	commit, err := n.commits(ctx, &end)
	if err != nil {
		return nil, err
	}
	start := func(name string) func(context.Context) (float64, error) {
		return func(context.Context) (took float64, err error) {
			var closeStore func() error
			took, err = timed(func() error {
				_, closeStore, err = n.openStore(ctx, name, sharedOptions())
				return err
			})
			if err != nil {
				return 0, err
			}
			return took, closeStore()
		}
	}
	const alone, beside = "a process alone", "a process beside two others"
	s, err := measure.Rounds(ctx, e.rounds(25), e.progress("starting"),
		measure.Contestant{Name: alone, Sample: start("alone")},
		measure.Contestant{Name: beside, Sample: start("others")},
		measure.Contestant{Name: oneCommit, Sample: func(context.Context) (float64, error) {
			return timed(commit)
		}})
	if err != nil {
		return nil, err
	}
	o = &Outcome{}
	for _, name := range []string{alone, beside, oneCommit} {
		o.figure(name, Nanos, s[name])
	}
	o.figure(beside+" / one commit", Times, measure.Ratios(s[beside], s[oneCommit]))
	return o, nil
}
