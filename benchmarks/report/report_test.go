package main

import (
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
	"github.com/grpc-api-key/grpc-api-key/benchmarks/work"
)

func sample() *report {
	goal := func(id, of string, atMost bool, value float64) work.Goal {
		return work.Goal{
			ID: id, Work: of,
			Bound: work.Bound{AtMost: atMost, Value: value, Unit: work.Times},
		}
	}
	reached := goal("hit", "the fast case", true, 2)
	missed := goal("missed", "the slow case", false, 15)
	unknown := goal("unknown", "the missing case", false, 2)
	bars := chart.Bars{Name: "it", Title: "Chart"}
	bars.Add("a", 1, "1 ns", true)
	return &report{
		Begun:   time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Took:    90 * time.Second,
		Command: "go run ./report",
		Machine: []fact{{"cores", "2"}},
		Parts: []part{{work.Workload{Name: "w", Title: "Title", About: "About."}, &work.Outcome{
			Verdicts: []work.Verdict{
				{Goal: reached, Bound: reached.Bound, Samples: []float64{1, 1.5, 3}, Reached: true},
				{Goal: missed, Bound: missed.Bound, Samples: []float64{12}},
				{Goal: unknown, Bound: unknown.Bound, Skipped: "not installed here"},
			},
			Figures: []work.Figure{{Name: "a thing", Unit: work.Nanos, Samples: []float64{100, 200, 1500}}},
			Notes:   []string{"A note."},
			Skipped: []peers.Skipped{{Name: "Peer", Why: "not installed"}},
			Charts:  []chart.Chart{&bars},
		}, time.Minute}},
	}
}

// The report contains the reason if a goal is missed or not measured.
func TestMarkdown(t *testing.T) {
	work.Reasons["missed"] = "the profile shows a lock."
	t.Cleanup(func() { delete(work.Reasons, "missed") })
	text := sample().markdown()
	for _, want := range []string{
		"`go run ./report` in `benchmarks` wrote this file on 2026-01-02 03:04 UTC, in 1m30s.",
		"| the fast case | ≤ 2 × | 1.5 × | 1.25 × – 2.25 × | 3 | yes |",
		"| the slow case | ≥ 15 × | 12 × |  | once | **no** |",
		"| the missing case | ≥ 2 × | – | | | not measured: not installed here |",
		"* **the slow case**: the profile shows a lock.",
		"* **Peer**: not installed",
		"| a thing | 200 ns | 150 ns – 850 ns | 3 |",
		"![Chart](charts/it.svg)",
		"* A note.",
		"| cores | 2 |",
	} {
		require.Contains(t, text, want)
	}
	require.NotContains(t, text, "-quick")
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, sample().write(dir))
	text, err := os.ReadFile(filepath.Join(dir, "RESULTS.md"))
	require.NoError(t, err)
	require.Equal(t, sample().markdown(), string(text))
	svg, err := os.ReadFile(filepath.Join(dir, "charts", "it.svg"))
	require.NoError(t, err)
	require.Contains(t, string(svg), "<svg")
}

// A progress writes nothing to a pipe or a file.
func TestNoProgressInAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	p := newProgress(w)
	p.show("working")
	p.clear()
	require.NoError(t, w.Close())
	written, err := io.ReadAll(r)
	require.NoError(t, err)
	require.Empty(t, written)
}

// The description of the machine contains no path of the machine.
func TestDescribe(t *testing.T) {
	dir := t.TempDir()
	facts := describe(dir)
	require.NotEmpty(t, facts)
	cwd, err := os.Getwd()
	require.NoError(t, err)
	for _, f := range facts {
		require.NotEmpty(t, f.is)
		require.NotContains(t, f.is, dir)
		require.NotContains(t, f.is, cwd)
	}
}
