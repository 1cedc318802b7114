// Package work is what is measured: a file for each kind of work, which says at its head what is measured and how.
//
// A [Workload] measures several things in turns, and judges the goals that it has by the ratios, or differences, of what one
// round gave. Its figures go into the report besides.
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
	About string // what is measured and how, for the report
	Goals []Goal
	Run   func(context.Context, *Env) (*Outcome, error)
}

// Place returns the place of a goal among the workload's.
func (w *Workload) Place(id string) int {
	return slices.IndexFunc(w.Goals, func(g Goal) bool { return g.ID == id })
}

// All are the workloads, in the order of the report.
func All() []Workload {
	return []Workload{verifyWork, parallelWork, readsWork, unaryWork, streamWork, floodWork, writesWork, revokeWork, sizesWork}
}

// A Goal is a line of what is to be reached.
type Goal struct {
	ID   string // on the command line, and in reasons.go
	Work string // what is set in relation to what
	Bound
	Or *Bound // reaching this will do, too
}

// A Bound is a value that is not to be passed.
type Bound struct {
	AtMost bool // or else at least
	Value  float64
	Unit   Unit
}

func atMost(v float64, u Unit) Bound  { return Bound{true, v, u} }
func atLeast(v float64, u Unit) Bound { return Bound{false, v, u} }

// Reached says whether a value is within the bound.
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

// String returns what is to be reached.
func (g Goal) String() string {
	if g.Or != nil {
		return g.Bound.String() + ", or " + g.Or.String()
	}
	return g.Bound.String()
}

// A Verdict is how a goal was met. Samples are of all rounds; there are none if it was not measured, and Skipped says why.
type Verdict struct {
	Goal    Goal
	Bound   Bound // which of the goal's was judged by
	Samples []float64
	Reached bool
	Skipped string
}

// A Figure is what was measured of one thing.
type Figure struct {
	Name    string
	Unit    Unit
	Samples []float64
}

// An Outcome is what a workload has measured.
type Outcome struct {
	Verdicts []Verdict
	Figures  []Figure
	Notes    []string // what a reader must know of this run
	Skipped  []peers.Skipped
	Charts   []chart.Bars
}

// judge decides about a goal of the workload, by the median of the samples.
func (o *Outcome) judge(w *Workload, id string, samples []float64) {
	g := w.Goals[w.Place(id)]
	o.Verdicts = append(o.Verdicts, Verdict{Goal: g, Bound: g.Bound, Samples: samples, Reached: g.Reached(measure.Median(samples))})
}

// judgeEither is judge for a goal that has two bounds: the second counts if the first is not reached.
func (o *Outcome) judgeEither(w *Workload, id string, samples, or []float64) {
	o.judge(w, id, samples)
	v := &o.Verdicts[len(o.Verdicts)-1]
	if !v.Reached {
		v.Bound, v.Samples, v.Reached = *v.Goal.Or, or, v.Goal.Or.Reached(measure.Median(or))
	}
}

// skip says why a goal was not measured.
func (o *Outcome) skip(w *Workload, id, why string) {
	g := w.Goals[w.Place(id)]
	o.Verdicts = append(o.Verdicts, Verdict{Goal: g, Bound: g.Bound, Skipped: why})
}

// Failed is the outcome of a workload that ended with an error: none of its goals was measured.
func Failed(w Workload) *Outcome {
	o := &Outcome{Notes: []string{"It ended with an error, and was not measured."}}
	for _, g := range w.Goals {
		o.skip(&w, g.ID, "the work ended with an error")
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

// An Env is what the workloads of one run are given.
type Env struct {
	Dir      string // for stores; whoever made it removes it
	Quick    bool   // only try that everything works
	Keys     int    // the most keys that a store may have
	Progress func(doing string, done, of int)
}

// rounds is how often something is measured: never fewer than 10 times if it is to be believed.
func (e *Env) rounds(n int) int {
	if e.Quick {
		return 3
	}
	return n
}

// turn is how long a thing is measured at once.
func (e *Env) turn(d time.Duration) time.Duration {
	if e.Quick {
		return d / 8
	}
	return d
}

// size is a number of keys or streams.
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

// A closer collects what is to be undone, last first.
type closer []func() error

func (c *closer) add(f func() error) { *c = append(*c, f) }

// into undoes it, and adds what goes wrong to *err.
func (c *closer) into(err *error) {
	for _, f := range slices.Backward(*c) {
		*err = errors.Join(*err, f())
	}
}

func (e *Env) temp() (string, error) { return os.MkdirTemp(e.Dir, "work") }

// Select returns the workloads whose name, or one of whose goals' IDs, the expression matches.
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
