package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/work"
)

// A report contains the results of one run.
type report struct {
	Quick   bool
	Begun   time.Time
	Took    time.Duration
	Machine []fact
	Command string
	Engine  string // -shared
	Parts   []part
}

// A part contains the results of one workload.
type part struct {
	workload work.Workload
	outcome  *work.Outcome
	took     time.Duration
}

func (r *report) markdown() string {
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("# Results\n")
	line("`%s` in `benchmarks` wrote this file on %s UTC, in %s. To change the file, run the command "+
		"again.\n", r.Command, r.Begun.UTC().Format("2006-01-02 15:04"), r.Took.Round(time.Second))
	if r.Quick {
		line("**This run used `-quick` to check that everything works. The figures mean little.**\n")
	}
	line("The contestants of a comparison take turns in each round. The order is random and differs " +
		"between rounds. A ratio or a difference is computed from two turns of the same round. The " +
		"tables contain the median over all rounds, the middle half of the rounds (quartiles), and the " +
		"number of rounds. A count that does not vary is measured once.\n")
	r.goals(line)
	r.skipped(line)
	for _, p := range r.Parts {
		p.section(line)
	}
	line("## The machine\n")
	line("| | |\n|---|---|")
	for _, f := range r.Machine {
		line("| %s | %s |", f.what, f.is)
	}
	return s.String()
}

type writer = func(format string, args ...any)

// goals writes the table of goals, and the reasons for the goals that were missed.
func (r *report) goals(line writer) {
	line("## Goals\n")
	line("| work | goal | measured | middle half | rounds | reached |\n|---|---|--:|---|--:|---|")
	var missed []work.Verdict
	for _, p := range r.Parts {
		for _, v := range p.outcome.Verdicts {
			if v.Skipped != "" {
				line("| %s | %s | – | | | not measured: %s |", v.Goal.Work, v.Goal, v.Skipped)
				continue
			}
			reached := "yes"
			if !v.Reached {
				reached = "**no**"
				missed = append(missed, v)
			}
			line("| %s | %s | %s | %s | %s |", v.Goal.Work, v.Goal,
				v.Bound.Unit.Format(measure.Median(v.Samples)),
				spread(v.Bound.Unit, v.Samples), reached)
		}
	}
	line("")
	if len(missed) == 0 {
		return
	}
	line("The run missed these goals:\n")
	for _, v := range missed {
		reason := cmp.Or(work.Reasons[r.Engine+"/"+v.Goal.ID], work.Reasons[v.Goal.ID])
		if reason == "" {
			reason = "the reason is not known yet."
		}
		line("* **%s**: %s", v.Goal.Work, reason)
	}
	line("")
}

func (r *report) skipped(line writer) {
	var all []peers.Skipped
	for _, p := range r.Parts {
		for _, s := range p.outcome.Skipped {
			if !slices.Contains(all, s) {
				all = append(all, s)
			}
		}
	}
	if len(all) == 0 {
		return
	}
	line("The run skipped these peers:\n")
	for _, s := range all {
		line("* **%s**: %s", s.Name, s.Why)
	}
	line("")
}

func (p *part) section(line writer) {
	line("## %s\n", p.workload.Title)
	line("%s\n", p.workload.About)
	for _, c := range p.outcome.Charts {
		name, title := c.Head()
		line("![%s](charts/%s.svg)\n", title, name)
	}
	if len(p.outcome.Figures) > 0 {
		line("| | median | middle half | rounds |\n|---|--:|---|--:|")
	}
	for _, f := range p.outcome.Figures {
		line("| %s | %s | %s |", f.Name, f.Unit.Format(measure.Median(f.Samples)),
			spread(f.Unit, f.Samples))
	}
	line("")
	for _, n := range p.outcome.Notes {
		line("* %s", n)
	}
	if len(p.outcome.Notes) > 0 {
		line("")
	}
}

// spread returns two cells of a table: the quartiles, and the number of samples.
func spread(u work.Unit, samples []float64) string {
	if len(samples) == 1 {
		return " | once"
	}
	low, high := measure.Quantile(samples, 0.25), measure.Quantile(samples, 0.75)
	return fmt.Sprintf("%s | %d", u.Spread(low, high), len(samples))
}
