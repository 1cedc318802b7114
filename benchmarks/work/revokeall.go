package work

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	memorybackend "github.com/grpc-api-key/grpc-api-key/internal/memory"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The shared-revokeall workload measures RevokeAll, in one of three processes. The same commits are
// then made again, without a store, a feed or another process, on a copy of the entries: as many at
// the same time as RevokeAll makes.
var revokeAllWork = Workload{
	Name:  "shared-revokeall",
	Title: "RevokeAll, in three processes",
	About: "RevokeAll reads the keys, revokes the keys in batches, and waits for the other " +
		"processes once, at the end. \"The commits alone\" are the same batches of the same " +
		"changes on a copy of the same entries: eight batches at the same time, without a store, " +
		"and without processes that read the changes. The processes and the engine share the machine.",
	Goals: []Goal{
		{
			ID: "shared-revokeall", Work: "RevokeAll of 100,000 keys / its commits alone",
			Bound: atMost(1.2, Times),
		},
	},
}

func init() { revokeAllWork.Run = runRevokeAll }

// revokeAllCommits is how many commits RevokeAll makes at the same time.
const revokeAllCommits = 8

func runRevokeAll(ctx context.Context, e *Env) (o *Outcome, err error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(n.close)
	o = &Outcome{}
	for _, r := range []*revokingAll{
		{what: "all keys", keys: e.size(100_000), opts: &keystore.RevokeAllOptions{All: true}},
		{
			what: "the keys of an owner", keys: e.size(10_000),
			query: keystore.Query{Owner: peers.Spec().Owner},
		},
	} {
		if err := r.fill(ctx); err != nil {
			return nil, err
		}
		end.add(r.seed.Close)
		rounds := e.rounds(3)
		progress := e.progress("revoking " + r.what)
		for round := range rounds {
			progress(round, rounds)
			if err := r.sample(ctx, n, fmt.Sprint(r.what, round)); err != nil {
				return nil, err
			}
		}
		ratios := measure.Ratios(r.all, r.alone)
		if r.opts != nil {
			o.judge(&revokeAllWork, "shared-revokeall", ratios)
		}
		o.figure(fmt.Sprintf("RevokeAll of %d keys: %s", r.keys, r.what), Nanos, r.all)
		o.figure("the commits alone: "+r.what, Nanos, r.alone)
		o.figure("RevokeAll / the commits alone: "+r.what, Times, ratios)
		o.note("%d keys: %s, in %d commits, and one barrier.", r.keys, r.what, r.commits)
	}
	return o, nil
}

// A revokingAll is one kind of RevokeAll.
type revokingAll struct {
	what  string
	keys  int
	query keystore.Query
	opts  *keystore.RevokeAllOptions

	seed       backend.Backend // the entries of a store with the keys
	all, alone []float64       // nanoseconds
	commits    int             // of each RevokeAll
}

// fill makes the entries of a store with the keys.
func (r *revokingAll) fill(ctx context.Context) error {
	r.seed = memorybackend.New()
	store, err := keystore.New(unclosed{r.seed}, peers.Options(0))
	if err != nil {
		return err
	}
	_, err = peers.Create(ctx, store, r.keys, 0, nil)
	return errors.Join(err, store.Close())
}

// An unclosed is a backend that stays open after its store.
type unclosed struct{ backend.Backend }

func (unclosed) Close() error { return nil }

// sample measures one RevokeAll, and then its commits on a copy.
func (r *revokingAll) sample(ctx context.Context, n *engine, name string) (err error) {
	var end closer
	defer end.into(&err)
	var plain [2]backend.Feeder // the entries of the store, and the copy
	for i, name := range []string{name, name + ", copy"} {
		b, disconnect, err := n.open(ctx, name)
		if err != nil {
			return err
		}
		end.add(func() error { return errors.Join(b.Close(), disconnect()) })
		if err := copyEntries(ctx, b, r.seed, nil, nil); err != nil {
			return err
		}
		plain[i] = b
	}
	var rec recorder
	store, closeStore, err := n.openStoreOn(ctx, name, sharedOptions(),
		func(b backend.Feeder) backend.Feeder { rec.Feeder = b; return &rec })
	if err != nil {
		return err
	}
	end.add(closeStore)
	if _, err := n.openStores(ctx, sharing-1, name, sharedOptions(), &end); err != nil {
		return err
	}
	// Each commit checks the guard entry of its process.
	err = copyEntries(ctx, plain[1], plain[0], []byte{guardSpace}, []byte{guardSpace + 1})
	if err != nil {
		return err
	}

	rec.start()
	done := 0
	all, err := timed(func() (err error) {
		done, err = store.RevokeAll(ctx, r.query, "measured", r.opts)
		return err
	})
	if err != nil {
		return err
	}
	if done != r.keys {
		return fmt.Errorf("RevokeAll has revoked %d of %d keys", done, r.keys)
	}
	batches := rec.stop()
	alone, err := timed(func() error {
		return applyAll(slices.Values(batches), func(b []backend.Change) error {
			return plain[1].Apply(ctx, b...)
		})
	})
	r.all, r.alone, r.commits = append(r.all, all), append(r.alone, alone), len(batches)
	return err
}

// memberSpace begins the keys of member records, and guardSpace the keys of guard entries.
const (
	memberSpace = 'm'
	guardSpace  = 'n'
)

// A recorder notes the commits of a store that have an event.
type recorder struct {
	backend.Feeder

	mu      sync.Mutex
	notes   bool
	batches [][]backend.Change
}

func (r *recorder) start() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notes = true
}

func (r *recorder) stop() [][]backend.Change {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notes = false
	return r.batches
}

// Apply implements backend.Backend.
func (r *recorder) Apply(ctx context.Context, changes ...backend.Change) error {
	if changes[0].Key[0] != memberSpace {
		kept := make([]backend.Change, len(changes))
		for i, c := range changes {
			c.Key, c.Value = bytes.Clone(c.Key), bytes.Clone(c.Value)
			kept[i] = c
		}
		r.mu.Lock()
		if r.notes {
			r.batches = append(r.batches, kept)
		}
		r.mu.Unlock()
	}
	return r.Feeder.Apply(ctx, changes...)
}

// GetAll implements backend.AllGetter.
func (r *recorder) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	return r.Feeder.(backend.AllGetter).GetAll(ctx, keys)
}

// copyEntries copies the entries of a range with their revisions.
func copyEntries(ctx context.Context, to, from backend.Backend, first, end []byte) error {
	var failed error
	batches := func(yield func([]backend.Change) bool) {
		var batch []backend.Change
		size := 0
		for e, err := range from.Snapshot(ctx, first, end) {
			if err != nil {
				failed = err
				return
			}
			size += len(e.Key) + len(e.Value)
			if len(batch) == backend.MaxChanges || size > backend.MaxApplySize {
				if !yield(batch) {
					return
				}
				batch, size = nil, len(e.Key)+len(e.Value)
			}
			batch = append(batch, backend.Change{Key: e.Key, Value: e.Value, Revision: e.Revision})
		}
		if len(batch) > 0 {
			yield(batch)
		}
	}
	err := applyAll(batches, func(b []backend.Change) error { return to.Apply(ctx, b...) })
	return errors.Join(failed, err)
}

// applyAll calls apply for each batch, as many at the same time as RevokeAll does.
func applyAll(
	batches func(yield func([]backend.Change) bool), apply func([]backend.Change) error,
) error {
	var wg sync.WaitGroup
	failed := make(chan error, 1)
	free := make(chan struct{}, revokeAllCommits)
	for b := range batches {
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			if err := apply(b); err != nil {
				select {
				case failed <- err:
				default:
				}
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// The shared-rest workload measures what processes cost the engine that serve no call.
var restWork = Workload{
	Name:  "shared-rest",
	Title: "What processes at rest cost the engine",
	About: "0, 3, 10 and 30 processes have a store open, and no call comes. D is " +
		"`Options.Freshness`. Each process writes a heartbeat every quarter of D, and reads the " +
		"heartbeats of all. Bytes are those from and to clients of all servers, and those that " +
		"all servers write to their logs. The processor time is that of all servers, in percent " +
		"of one core.",
	Goals: []Goal{
		{
			ID: "shared-rest", Work: "writes at rest / (4 × processes / D)", Bound: atMost(1.1, Times),
		},
	},
}

func init() { restWork.Run = runRest }

// A resting is a number of processes with a freshness.
type resting struct {
	processes int
	freshness time.Duration
}

func (r resting) String() string {
	if r.processes == 0 {
		return "no process"
	}
	return fmt.Sprintf("%d processes, D = %v", r.processes, r.freshness)
}

func runRest(ctx context.Context, e *Env) (o *Outcome, err error) {
	n, err := e.startEngine(ctx)
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	end.add(n.close)
	all := []resting{{0, 0}}
	for _, d := range []time.Duration{time.Second, 3 * time.Second, 10 * time.Second} {
		for _, processes := range []int{3, 10, 30} {
			all = append(all, resting{processes, d})
		}
	}
	if e.Quick {
		all = all[:2]
	}
	rounds := e.rounds(3)
	costs := make(map[resting]*restCosts)
	progress := e.progress("resting")
	for round := range rounds {
		for i, r := range all {
			progress(round*len(all)+i, rounds*len(all))
			if costs[r] == nil {
				costs[r] = &restCosts{}
			}
			if err := costs[r].add(ctx, n, r, e.turn(6*time.Second)); err != nil {
				return nil, fmt.Errorf("%v: %w", r, err)
			}
		}
	}
	o = &Outcome{}
	var ratios []float64
	for _, r := range all {
		c := costs[r]
		o.figure(r.String()+": writes", Writes, c.writes)
		o.figure(r.String()+": bytes from and to clients", BytesPerSecond, c.client)
		o.figure(r.String()+": bytes to the logs", BytesPerSecond, c.log)
		o.figure(r.String()+": processor time", OfACore, c.cpu)
		if r.processes > 0 {
			expected := 4 * float64(r.processes) / r.freshness.Seconds()
			ratios = append(ratios, measure.Scaled(c.writes, 1/expected)...)
		}
	}
	o.judge(&restWork, "shared-rest", ratios)
	return o, nil
}

// restCosts are the samples of a resting, for each second.
type restCosts struct{ writes, client, log, cpu []float64 }

func (c *restCosts) add(
	ctx context.Context, n *engine, r resting, window time.Duration,
) (err error) {
	var end closer
	defer end.into(&err)
	opts := sharedOptions()
	opts.Freshness = r.freshness
	if _, err := n.openStores(ctx, r.processes, fmt.Sprint("rest", r.freshness), opts,
		&end); err != nil {
		return err
	}
	time.Sleep(window / 4) // the work of the start is over
	begin := time.Now()
	before, err := n.work(ctx)
	if err != nil {
		return err
	}
	cpuBefore, _ := n.cpu()
	time.Sleep(window)
	cpu, ok := n.cpu()
	took := time.Since(begin).Seconds()
	after, err := n.work(ctx)
	if err != nil {
		return err
	}
	c.writes = append(c.writes, (after.Writes-before.Writes)/took)
	c.client = append(c.client, (after.Client-before.Client)/took)
	c.log = append(c.log, (after.Log-before.Log)/took)
	if ok {
		c.cpu = append(c.cpu, 100*(cpu-cpuBefore)/took)
	}
	return nil
}
