package work

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The sizes workload measures the costs of stores of several sizes: time to open, memory, disk,
// goroutines, and time for a miss. See Stores for the stores.
//
// Each opening is a separate process (see child.go). The process opens the store once, uses the
// store, and reports the costs. Memory is the memory that the operating system has given to the
// process. Anonymous memory belongs to the process alone. Memory that is mapped from files can be
// reclaimed by the kernel at any time. The reference for an opening is the checksum of all tables,
// because an opening verifies the checksums. The process measures this reference just before the
// opening: it reads the same files.
var sizesWork = Workload{
	Name:  "sizes",
	Title: "Stores of 0 to 10,000,000 keys",
	About: "Each opening is a separate process, with the files in the page cache. `Open` " +
		"verifies the checksums of all tables, so the duration of CRC-32C over the same files is " +
		"measured too. Memory is from `/proc/self/smaps_rollup`, minus the memory of the process " +
		"before `Open`. Anonymous memory is measured after `Open`, with the default cache filled " +
		"by 65,536 random keys, and after a garbage collection that returns free memory. Disk is " +
		"the space that is allocated for the closed store. Each owner has 10 keys.",
	Goals: []Goal{
		{
			ID: "open-1m", Work: "1 M keys: open / (open of an empty store + checksumming)",
			Bound: atMost(1.3, Times),
		},
		{
			ID: "memory-1m", Work: "1 M keys: anonymous memory of the store, default cache full",
			Bound: atMost(64<<20, Bytes),
		},
		{
			ID: "disk-1m", Work: "1 M keys: disk, with events and indexes",
			Bound: atMost(330, PerKey),
		},
		{ID: "disk-10m", Work: "disk, 10 M keys / 1 M", Bound: atMost(10, Times)},
		{ID: "memory-10m", Work: "anonymous memory, 10 M keys / 1 M", Bound: atMost(2, Times)},
		{ID: "miss-10m", Work: "Verify miss, 10 M keys / 1 M", Bound: atMost(2, Times)},
		{ID: "empty-goroutines", Work: "empty store: goroutines", Bound: atMost(16, Count)},
		{
			ID: "empty-disk", Work: "empty store: apparent disk while open",
			Bound: atMost(20<<20, Bytes),
		},
		{ID: "empty-heap", Work: "empty store: heap", Bound: atMost(16<<20, Bytes)},
	},
}

func init() { sizesWork.Run = runSizes }

const (
	million    = 1_000_000
	tenMillion = 10_000_000
)

func runSizes(ctx context.Context, e *Env) (o *Outcome, err error) {
	counts := []int{0, 10_000, 100_000, million, tenMillion}
	if e.Quick {
		counts = []int{0, 2000, 20_000}
	}
	o = &Outcome{}
	var stores []*sized
	by := make(map[int]*sized)
	for _, n := range counts {
		if n > e.Keys {
			continue
		}
		s, err := e.sized(ctx, n)
		if err != nil {
			return nil, err
		}
		stores = append(stores, s)
		by[n] = s
	}
	var contestants []measure.Contestant
	for _, s := range stores {
		sample := func(ctx context.Context) (float64, error) {
			opened, err := openInChild(ctx, s.dir, s.tokens)
			if err != nil {
				return 0, err
			}
			s.opened = append(s.opened, *opened)
			return opened.Open, nil
		}
		contestants = append(contestants, measure.Contestant{Name: s.name(), Sample: sample})
	}
	_, err = measure.Rounds(ctx, e.rounds(11), e.progress("opening"), contestants...)
	if err != nil {
		return nil, err
	}
	for _, s := range stores {
		s.opened = s.opened[1:] // without the round that warms up
	}
	misses, err := missesBySize(ctx, e, stores)
	if err != nil {
		return nil, err
	}
	judgeSizes(o, by, misses)
	for _, s := range stores {
		of := func(what string, u Unit, get func(*opening) float64) {
			o.figure(s.name()+": "+what, u, s.of(get))
		}
		of("open", Nanos, func(p *opening) float64 { return p.Open })
		of("CRC-32C of the tables", Nanos, func(p *opening) float64 { return p.Checksum })
		of("goroutines", Count, func(p *opening) float64 { return p.Goroutines })
		of("heap after opening", Bytes, func(p *opening) float64 { return p.Heap })
		if runtime.GOOS == "linux" {
			of("anonymous memory after opening", Bytes,
				func(p *opening) float64 { return p.AnonOpen })
			of("anonymous memory, cache full, before a garbage collection", Bytes,
				func(p *opening) float64 { return p.AnonFull })
			of("anonymous memory, cache full, after a garbage collection", Bytes,
				func(p *opening) float64 { return p.AnonSettled })
			of("mapped from files, cache full", Bytes,
				func(p *opening) float64 { return p.Mapped })
		}
		of("apparent disk while open", Bytes, func(p *opening) float64 { return p.Apparent })
		o.figure(s.name()+": disk when closed", Bytes, []float64{s.disk})
		if s.keys > 0 {
			o.figure(s.name()+": disk for each key", PerKey, []float64{s.disk / float64(s.keys)})
			o.figure(s.name()+": time to create", Nanos, []float64{float64(s.took.Nanoseconds())})
			o.figure(s.name()+": Verify, miss, at random", Nanos, misses[s.name()])
		}
	}
	o.Charts = append(o.Charts, sizesChart(stores, misses))
	return o, nil
}

// sizesChart draws the durations by the size of the store.
func sizesChart(stores []*sized, misses measure.Samples) chart.Chart {
	lines := &chart.Lines{
		Name: "sizes", Title: "Opening and reading stores of several sizes",
		Note: "time by the number of keys in the store; less is better", X: digits, Y: duration,
	}
	draw := func(label string, ours bool, samples func(*sized) []float64) {
		var points []chart.Point
		for _, s := range stores {
			if s.keys > 0 { // a logarithmic axis has no zero
				points = append(points, chart.Point{
					X: float64(s.keys), Y: measure.Median(samples(s)),
				})
			}
		}
		lines.Add(label, ours, points...)
	}
	draw("Open", true, func(s *sized) []float64 {
		return s.of(func(p *opening) float64 { return p.Open })
	})
	draw("CRC-32C of the tables", false, func(s *sized) []float64 {
		return s.of(func(p *opening) float64 { return p.Checksum })
	})
	draw("Verify, miss", true, func(s *sized) []float64 { return misses[s.name()] })
	return lines
}

func judgeSizes(o *Outcome, by map[int]*sized, misses measure.Samples) {
	w := &sizesWork
	empty, one, ten := by[0], by[million], by[tenMillion]
	o.judge(w, "empty-goroutines", empty.of(func(p *opening) float64 { return p.Goroutines }))
	o.judge(w, "empty-disk", empty.of(func(p *opening) float64 { return p.Apparent }))
	o.judge(w, "empty-heap", empty.of(func(p *opening) float64 { return p.Heap }))
	settled := func(p *opening) float64 { return p.AnonSettled }
	memory := func(id string, judge func()) {
		if runtime.GOOS == "linux" {
			judge()
		} else {
			o.skip(w, id, "only Linux reports anonymous memory")
		}
	}
	if one == nil {
		for _, id := range []string{"open-1m", "memory-1m", "disk-1m"} {
			o.skip(w, id, "this measurement needs -keys 1000000, without -quick")
		}
	} else {
		opened := func(p *opening) float64 { return p.Open }
		var allowed []float64
		for i, p := range one.opened {
			allowed = append(allowed, empty.opened[i].Open+p.Checksum)
		}
		o.judge(w, "open-1m", measure.Ratios(one.of(opened), allowed))
		memory("memory-1m", func() { o.judge(w, "memory-1m", one.of(settled)) })
		o.judge(w, "disk-1m", []float64{one.disk / million})
	}
	if one == nil || ten == nil {
		for _, id := range []string{"disk-10m", "memory-10m", "miss-10m"} {
			o.skip(w, id, "this measurement needs -keys 10000000, "+
				"some 3 GB of disk, and 15 more minutes")
		}
		return
	}
	o.judge(w, "disk-10m", []float64{ten.disk / one.disk})
	memory("memory-10m", func() {
		o.judge(w, "memory-10m", measure.Ratios(ten.of(settled), one.of(settled)))
	})
	o.judge(w, "miss-10m", measure.Ratios(misses[ten.name()], misses[one.name()]))
}

// missesBySize measures Verify without a cache in each of the stores, in turns.
func missesBySize(ctx context.Context, e *Env, stores []*sized) (s measure.Samples, err error) {
	var end closer
	defer end.into(&err)
	var cases []measure.Case
	for _, s := range stores {
		if s.keys == 0 {
			continue
		}
		store, err := keystore.Open(s.dir, peers.Options(-1))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.name(), err)
		}
		end.add(store.Close)
		random := rand.New(rand.NewPCG(9, 10))
		cases = append(cases, measure.Case{Name: s.name(), Do: func(n int) error {
			for range n {
				if _, err := store.Verify(ctx, s.tokens[random.IntN(len(s.tokens))]); err != nil {
					return err
				}
			}
			return nil
		}})
	}
	timed, err := measure.AllTimed(cases, 2*time.Millisecond)
	if err != nil {
		return nil, err
	}
	return measure.Rounds(ctx, e.rounds(101), e.progress("missing in all sizes"), timed...)
}
