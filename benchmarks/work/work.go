// Package work defines the workloads, one file for each kind of work. Each file starts with a
// comment about what the workload measures and how.
//
// A [Workload] measures several contestants in turns. The workload judges its goals by ratios or
// differences of samples from the same round. The report also contains the figures of the workload.
package work

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// A Workload is one kind of work.
type Workload struct {
	Name  string // on the command line
	Title string // in the report
	About string // what the workload measures and how, for the report
	Goals []Goal
	Run   func(context.Context, *Env) (*Outcome, error)
}

// Place returns the index of a goal in the goals of the workload.
func (w *Workload) Place(id string) int {
	return slices.IndexFunc(w.Goals, func(g Goal) bool { return g.ID == id })
}

// All returns the workloads of a store in a directory, in the order of the report.
func All() []Workload {
	return []Workload{
		verifyWork, parallelWork, readsWork, unaryWork, cpuWork, streamWork,
		floodWork, writesWork, durableWork, beforeWork, revokeWork, sizesWork, ownersWork,
		maintenanceWork,
	}
}

// A Goal is a bound for the median of a measurement.
type Goal struct {
	ID   string // on the command line, and in reasons.go
	Work string // what is compared with what
	Bound
	Or *Bound // an alternative bound, which is good enough too
}

// A Bound is an upper or lower limit.
type Bound struct {
	AtMost bool // whether Value is the upper limit, or else the lower limit
	Value  float64
	Unit   Unit
}

func atMost(v float64, u Unit) Bound  { return Bound{true, v, u} }
func atLeast(v float64, u Unit) Bound { return Bound{false, v, u} }

// Reached reports whether a value is within the bound.
func (b Bound) Reached(v float64) bool {
	if b.AtMost {
		return v <= b.Value
	}
	return v >= b.Value
}

func (b Bound) String() string {
	if b.AtMost {
		return "≤ " + b.Unit.Format(b.Value)
	}
	return "≥ " + b.Unit.Format(b.Value)
}

// String returns the text of the bound or of both bounds.
func (g Goal) String() string {
	if g.Or != nil {
		return g.Bound.String() + ", or " + g.Or.String()
	}
	return g.Bound.String()
}

// A Verdict tells whether a goal was reached. Samples contains the samples of all rounds. If the
// goal was not measured, Samples is empty and Skipped contains the reason.
type Verdict struct {
	Goal    Goal
	Bound   Bound // the bound of the goal that decided
	Samples []float64
	Reached bool
	Skipped string
}

// A Figure contains the measurements of one contestant.
type Figure struct {
	Name    string
	Unit    Unit
	Samples []float64
}

// An Outcome contains the results of a workload.
type Outcome struct {
	Verdicts []Verdict
	Figures  []Figure
	Notes    []string // remarks about this run, for the reader of the report
	Skipped  []peers.Skipped
	Charts   []chart.Chart
}

// judge adds a verdict about a goal of the workload, by the median of the samples.
func (o *Outcome) judge(w *Workload, id string, samples []float64) {
	g := w.Goals[w.Place(id)]
	o.Verdicts = append(o.Verdicts, Verdict{
		Goal: g, Bound: g.Bound, Samples: samples, Reached: g.Reached(measure.Median(samples)),
	})
}

// judgeEither is like judge, for a goal with two bounds. The second bound counts if the first bound
// is not reached.
func (o *Outcome) judgeEither(w *Workload, id string, samples, or []float64) {
	o.judge(w, id, samples)
	v := &o.Verdicts[len(o.Verdicts)-1]
	if !v.Reached {
		v.Bound, v.Samples, v.Reached = *v.Goal.Or, or, v.Goal.Or.Reached(measure.Median(or))
	}
}

// skip adds a verdict with the reason why a goal was not measured.
func (o *Outcome) skip(w *Workload, id, why string) {
	g := w.Goals[w.Place(id)]
	o.Verdicts = append(o.Verdicts, Verdict{Goal: g, Bound: g.Bound, Skipped: why})
}

// Failed returns the outcome of a workload that ended with an error. All goals count as not
// measured.
func Failed(w Workload) *Outcome {
	o := &Outcome{Notes: []string{"This workload ended with an error, and has no results."}}
	for _, g := range w.Goals {
		o.skip(&w, g.ID, "the workload ended with an error")
	}
	return o
}

func (o *Outcome) figure(name string, u Unit, samples []float64) {
	if len(samples) > 0 {
		o.Figures = append(o.Figures, Figure{name, u, samples})
	}
}

func (o *Outcome) note(format string, args ...any) {
	o.Notes = append(o.Notes, fmt.Sprintf(format, args...))
}

// An Env contains the settings of one run for the workloads.
type Env struct {
	Dir      string // the directory for stores; the creator of Dir removes it
	Quick    bool   // whether the run only checks that everything works
	Keys     int    // the largest number of keys in a store
	Before   string // the commit for the before workload; empty means BeforeIndexes
	Engine   string // the name of the engine, for the workloads of Shared
	Stores   *Stores
	Progress func(doing string, done, of int)
}

// rounds returns the number of rounds: 3 in a quick run, and otherwise n. A reliable result needs
// at least 10 rounds.
func (e *Env) rounds(n int) int {
	if e.Quick {
		return 3
	}
	return n
}

// turn returns the duration of one turn.
func (e *Env) turn(d time.Duration) time.Duration {
	if e.Quick {
		return d / 8
	}
	return d
}

// size returns a number of keys or streams: n, or fewer in a quick run.
func (e *Env) size(n int) int {
	if e.Quick {
		return min(n, 2000)
	}
	return min(n, e.Keys)
}

func (e *Env) progress(doing string) func(done, of int) {
	return func(done, of int) {
		if e.Progress != nil {
			e.Progress(doing, done, of)
		}
	}
}

// A closer collects functions that release resources, and calls the functions in reverse order.
type closer []func() error

func (c *closer) add(f func() error) { *c = append(*c, f) }

// into calls the functions, and joins their errors to *err.
func (c *closer) into(err *error) {
	for _, f := range slices.Backward(*c) {
		*err = errors.Join(*err, f())
	}
}

func (e *Env) temp() (string, error) { return os.MkdirTemp(e.Dir, "work") }

// Select returns the workloads with a name or the ID of a goal that the expression matches.
func Select(all []Workload, only *regexp.Regexp) []Workload {
	if only == nil {
		return all
	}
	var selected []Workload
	for _, w := range all {
		matches := only.MatchString(w.Name)
		for _, g := range w.Goals {
			matches = matches || only.MatchString(g.ID)
		}
		if matches {
			selected = append(selected, w)
		}
	}
	return selected
}
