// Report compares grpc-api-key with its peers, and writes RESULTS.md and the charts.
//
//	cd benchmarks && go run ./report
//	cd benchmarks && go run ./report -shared etcd        # writes etcd/RESULTS.md
//	cd benchmarks && go run ./report -shared postgres    # writes postgres/RESULTS.md
//
// A full run takes about 20 minutes. With -quick or -only, Report prints the results, and writes
// files only if -out names a directory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/work"
)

func main() {
	work.MaybeChild()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	quick := flag.Bool("quick", false,
		"only check that everything works, in 2 minutes; the figures are not reliable")
	only := flag.String("only", "",
		"run only workloads with a name or a goal that matches the `expression`")
	out := flag.String("out", "",
		"the `directory` for RESULTS.md and charts/ "+
			"(default: the current directory, or the one named like -shared; none with -quick or "+
			"-only)")
	keys := flag.Int("keys", 1_000_000,
		"the largest number of keys in a store; 10000000 needs 15 GB of disk and 40 more minutes")
	before := flag.String("before", work.BeforeIndexes,
		"the `commit` whose creates the workload before compares with the present creates")
	shared := flag.String("shared", "", "run the workloads of a store that several processes "+
		"share, on this `engine` (etcd or postgres), instead of the workloads of a store in a directory")
	list := flag.Bool("list", false, "print the workloads and their goals, and do nothing else")
	flag.Parse()

	var expression *regexp.Regexp
	if *only != "" {
		if expression, err = regexp.Compile(*only); err != nil {
			return err
		}
	}
	all := work.All()
	if *shared != "" {
		if !slices.Contains(work.Engines(), *shared) {
			return fmt.Errorf("there is no engine %q: the engines are %q", *shared, work.Engines())
		}
		all = work.Shared()
	}
	selected := work.Select(all, expression)
	if len(selected) == 0 {
		return fmt.Errorf("no workload and no goal matches %q: see -list", *only)
	}
	if *list {
		for _, w := range selected {
			fmt.Printf("%-10s %s\n", w.Name, w.Title)
			for _, g := range w.Goals {
				fmt.Printf("    %-18s %s: %s\n", g.ID, g.Work, g)
			}
		}
		return nil
	}
	if *out == "" && !*quick && expression == nil {
		*out = filepath.Join(".", *shared)
	}

	dir, err := os.MkdirTemp("", "grpc-api-key-benchmarks-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := report{
		Quick:   *quick,
		Begun:   time.Now(),
		Machine: describe(dir),
		Command: "go run ./report" + arguments(),
		Engine:  *shared,
	}
	var failed error
	line := newProgress(os.Stderr)
	stores := work.NewStores(dir)
	for i, w := range selected {
		e := &work.Env{
			Quick: *quick, Keys: *keys, Before: *before, Engine: *shared, Stores: stores,
		}
		if e.Dir, err = os.MkdirTemp(dir, w.Name); err != nil {
			return err
		}
		e.Progress = func(doing string, done, of int) {
			line.show(fmt.Sprintf("%d/%d %s: %s, %d of %d",
				i+1, len(selected), w.Name, doing, done, of))
		}
		begin := time.Now()
		o, err := w.Run(ctx, e)
		line.clear()
		if ctx.Err() != nil {
			return errors.Join(ctx.Err(), err)
		}
		if err != nil {
			// Continue with the other workloads.
			err = fmt.Errorf("%s: %w", w.Name, err)
			failed = errors.Join(failed, err)
			o = work.Failed(w)
		}
		for _, s := range o.Skipped {
			fmt.Fprintf(os.Stderr, "report: %s: SKIPPED: %s: %s\n", w.Name, s.Name, s.Why)
		}
		// Sort the verdicts into the order of the goals.
		slices.SortStableFunc(o.Verdicts, func(a, b work.Verdict) int {
			return w.Place(a.Goal.ID) - w.Place(b.Goal.ID)
		})
		r.Parts = append(r.Parts, part{w, o, time.Since(begin)})
		if err := os.RemoveAll(e.Dir); err != nil {
			return err
		}
	}
	r.Took = time.Since(r.Begun)
	if *out == "" {
		_, err = os.Stdout.WriteString(r.markdown())
	} else {
		err = r.write(*out)
	}
	return errors.Join(err, failed)
}

// arguments returns the flags of the command line, except -out.
func arguments() (s string) {
	flag.Visit(func(f *flag.Flag) {
		if f.Name != "out" {
			s += fmt.Sprintf(" -%s=%s", f.Name, f.Value)
		}
	})
	return s
}

// write writes RESULTS.md and the charts.
func (r *report) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	charts := filepath.Join(dir, "charts")
	for _, p := range r.Parts {
		for _, c := range p.outcome.Charts {
			if err := os.MkdirAll(charts, 0o755); err != nil {
				return err
			}
			name, _ := c.Head()
			path := filepath.Join(charts, name+".svg")
			if err := os.WriteFile(path, []byte(c.SVG()), 0o644); err != nil {
				return err
			}
		}
	}
	return os.WriteFile(filepath.Join(dir, "RESULTS.md"), []byte(r.markdown()), 0o644)
}
