package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/work"
)

// A report is one run.
type report struct {
	Quick   bool
	Begun   time.Time
	Took    time.Duration
	Machine []fact
	Command string
	Parts   []part
}

// A part is what one workload gave.
type part struct {
	workload work.Workload
	outcome  *work.Outcome
	took     time.Duration
}

func (r *report) markdown() string {
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("# Results\n")
	line("Written by `%s` in `benchmarks`, on %s UTC, in %s. Do not edit it: run that again.\n",
		r.Command, r.Begun.UTC().Format("2006-01-02 15:04"), r.Took.Round(time.Second))
	if r.Quick {
		line("**This was `-quick`: it shows that everything works. The figures say little.**\n")
	}
	line("Things that are compared take turns, in an order that is drawn anew for each round. A ratio, or a difference, is that of " +
		"the two turns of one round; what is given is the median over all rounds, with the middle half of them (quartiles) and the " +
		"number of rounds. What is counted and does not vary is measured once.\n")
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

// goals is the table that the run is for, and the reasons of what is not reached.
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
			line("| %s | %s | %s | %s | %s |", v.Goal.Work, v.Goal, v.Bound.Unit.Format(measure.Median(v.Samples)), spread(v.Bound.Unit, v.Samples), reached)
		}
	}
	line("")
	if len(missed) == 0 {
		return
	}
	line("Not reached:\n")
	for _, v := range missed {
		reason := work.Reasons[v.Goal.ID]
		if reason == "" {
			reason = "not explained yet."
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
	line("Skipped:\n")
	for _, s := range all {
		line("* **%s**: %s", s.Name, s.Why)
	}
	line("")
}

func (p *part) section(line writer) {
	line("## %s\n", p.workload.Title)
	line("%s\n", p.workload.About)
	for _, c := range p.outcome.Charts {
		line("![%s](charts/%s.svg)\n", c.Title, c.Name)
	}
	if len(p.outcome.Figures) > 0 {
		line("| | median | middle half | rounds |\n|---|--:|---|--:|")
	}
	for _, f := range p.outcome.Figures {
		line("| %s | %s | %s |", f.Name, f.Unit.Format(measure.Median(f.Samples)), spread(f.Unit, f.Samples))
	}
	line("")
	for _, n := range p.outcome.Notes {
		line("* %s", n)
	}
	if len(p.outcome.Notes) > 0 {
		line("")
	}
}

// spread is two cells: the quartiles, and how many samples there are.
func spread(u work.Unit, samples []float64) string {
	if len(samples) == 1 {
		return " | once"
	}
	return fmt.Sprintf("%s | %d", u.Spread(measure.Quantile(samples, 0.25), measure.Quantile(samples, 0.75)), len(samples))
}
