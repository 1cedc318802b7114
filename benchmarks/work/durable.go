package work

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The durable workload compares creates and revocations with other ways to keep keys durably. There
// are 64 writers, and each server has 64 connections. Each peer writes the least that is possible:
// one record for each key, without an event of the change and without an index. The store always
// writes its event and its indexes.
//
// The processor time is the time of this process, which includes the client of the database, plus
// the time of the server processes.
var durableWork = Workload{
	Name:  "durable",
	Title: "Durable writes beside databases",
	About: "64 writers that write as fast as possible. Each call returns once the change is on " +
		"disk. grpc-api-key writes a record, an event and the indexes. Each peer writes one " +
		"record, and neither an event nor an index. The processor time is the time of this " +
		"process, which includes the client of a database, plus the time of the server " +
		"processes.",
	Goals: []Goal{
		{
			ID: "creates-badger", Work: "creates, 64 writers / bare Badger, one transaction each",
			Bound: atLeast(10, Times),
		},
		{
			ID: "creates-postgres", Work: "creates, 64 writers / PostgreSQL INSERT, 64 connections",
			Bound: atLeast(4, Times),
		},
		{
			ID: "creates-redis", Work: "creates, 64 writers / Redis HSET, appendfsync always",
			Bound: atLeast(1, Times),
		},
	},
}

func init() { durableWork.Run = runDurable }

const durableWriters = 64

// A durable is one way to keep keys durably.
type durable struct {
	name   string
	create func(ctx context.Context) (id string, err error)
	revoke func(ctx context.Context, id string) error
	server func() (time.Duration, error) // the processor time of other processes, or nil

	mu      sync.Mutex
	created []string // the IDs of keys that are not revoked
	most    int      // the largest number of revocations in one turn
	cpu     map[string][]float64
}

// run runs an operation for one turn, and returns the number of operations per second. run appends
// the processor time of one operation, in nanoseconds, to cpu[what].
func (d *durable) run(turn time.Duration, what string, op func() error) (float64, error) {
	spent := func() (total time.Duration, err error) {
		if total, err = processCPU(); err != nil || d.server == nil {
			return total, err
		}
		server, err := d.server()
		return total + server, err
	}
	before, cpuErr := spent()
	begin := time.Now()
	rate, err := measure.Throughput(durableWriters, 1, turn, func(int) func() error { return op })
	if err != nil || cpuErr != nil { // without processor times on this system
		return rate, err
	}
	took := time.Since(begin)
	after, cpuErr := spent()
	if cpuErr == nil {
		used := float64((after - before).Nanoseconds())
		d.cpu[what] = append(d.cpu[what], used/(rate*took.Seconds()))
	}
	return rate, nil
}

// used returns the processor times of the operations, without the round that warms up.
func (d *durable) used(what string) []float64 { return d.cpu[what][min(1, len(d.cpu[what])):] }

func (d *durable) createOne(ctx context.Context) error {
	id, err := d.create(ctx)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.created = append(d.created, id)
	return nil
}

var errNoKeys = errors.New("there are no more keys to revoke")

func (d *durable) revokeOne(ctx context.Context) error {
	d.mu.Lock()
	if len(d.created) == 0 {
		d.mu.Unlock()
		return errNoKeys
	}
	id := d.created[len(d.created)-1]
	d.created = d.created[:len(d.created)-1]
	d.mu.Unlock()
	return d.revoke(ctx, id)
}

// prepare creates keys until a turn of revocations will probably not run out of keys.
func (d *durable) prepare(ctx context.Context, turn time.Duration) error {
	for len(d.created) < max(1, 2*d.most) {
		_, err := measure.Throughput(durableWriters, 1, 2*turn, func(int) func() error {
			return func() error { return d.createOne(ctx) }
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// revocations measures a turn of revocations. If the turn runs out of keys, revocations prepares
// more keys and repeats the turn.
func (d *durable) revocations(ctx context.Context, turn time.Duration) (float64, error) {
	for {
		if err := d.prepare(ctx, turn); err != nil {
			return 0, err
		}
		before := len(d.created)
		rate, err := d.run(turn, "revocations", func() error { return d.revokeOne(ctx) })
		d.most = max(d.most, before-len(d.created))
		if !errors.Is(err, errNoKeys) {
			return rate, err
		}
	}
}

func (d *durable) contestants(e *Env) []measure.Contestant {
	turn := e.turn(500 * time.Millisecond)
	return []measure.Contestant{
		{Name: "creates, " + d.name, Sample: func(ctx context.Context) (float64, error) {
			return d.run(turn, "creates", func() error { return d.createOne(ctx) })
		}},
		{Name: "revocations, " + d.name, Sample: func(ctx context.Context) (float64, error) {
			return d.revocations(ctx, turn)
		}},
	}
}

func runDurable(ctx context.Context, e *Env) (o *Outcome, err error) {
	dir, err := e.temp()
	if err != nil {
		return nil, err
	}
	var end closer
	defer end.into(&err)
	store, err := keystore.Open(filepath.Join(dir, "store"), peers.Options(0))
	if err != nil {
		return nil, err
	}
	end.add(store.Close)
	tables, skipped, err := peers.StartTables(ctx, dir, durableWriters, false,
		peers.BareBadger, peers.RedisAlways, peers.PostgreSQLTable)
	if err != nil {
		return nil, err
	}
	end.add(func() error { return peers.CloseTables(tables) })

	all := []*durable{{
		name: peers.APIKey,
		create: func(ctx context.Context) (string, error) {
			issued, err := store.Create(ctx, peers.Spec())
			if err != nil {
				return "", err
			}
			return issued.Key.ID, nil
		},
		revoke: func(ctx context.Context, id string) error {
			return store.Revoke(ctx, id, "measured")
		},
	}}
	o = &Outcome{Skipped: skipped}
	for _, t := range tables {
		o.note("%s: %s.", t.Name, t.How)
		owner := peers.Spec().Owner
		all = append(all, &durable{
			name:   t.Name,
			create: func(ctx context.Context) (string, error) { return t.Create(ctx, owner) },
			revoke: t.Revoke,
			server: t.CPU,
		})
	}
	var contestants []measure.Contestant
	for _, d := range all {
		d.cpu = make(map[string][]float64)
		contestants = append(contestants, d.contestants(e)...)
	}
	s, err := measure.Rounds(ctx, e.rounds(24), e.progress("writing durably"), contestants...)
	if err != nil {
		return nil, err
	}

	ours := s["creates, "+peers.APIKey]
	for id, peer := range map[string]string{
		"creates-badger": peers.BareBadger, "creates-redis": peers.RedisAlways,
		"creates-postgres": peers.PostgreSQLTable,
	} {
		if theirs := s["creates, "+peer]; theirs != nil {
			o.judge(&durableWork, id, measure.Ratios(ours, theirs))
		} else {
			o.skip(&durableWork, id, peer+" is not installed")
		}
	}
	for _, what := range []string{"creates", "revocations"} {
		bars := chart.Bars{
			Name:  "durable-" + what,
			Title: fmt.Sprintf("Durable %s per second, %d writers", what, durableWriters),
			Note:  "more is better; logarithmic", Log: true,
		}
		for _, d := range all {
			name := what + ", " + d.name
			o.figure(name, Rate, s[name])
			o.figure(name+": processor time of each", Nanos, d.used(what))
			median := measure.Median(s[name])
			bars.Add(d.name, median, Rate.Format(median), d.name == peers.APIKey)
		}
		for _, d := range all[1:] {
			o.figure(fmt.Sprintf("%s, %s / %s", what, peers.APIKey, d.name), Times,
				measure.Ratios(s[what+", "+peers.APIKey], s[what+", "+d.name]))
		}
		for _, d := range all[1:] {
			o.figure(fmt.Sprintf("%s: processor time, %s / %s", what, d.name, peers.APIKey), Times,
				measure.Ratios(d.used(what), all[0].used(what)))
		}
		bars.Sort(true)
		o.Charts = append(o.Charts, &bars)
	}
	if runtime.GOOS != "linux" {
		o.note("Only Linux reports the processor time of the servers.")
	}
	slices.Sort(o.Notes)
	return o, nil
}
