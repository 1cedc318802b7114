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
	reached := work.Goal{ID: "hit", Work: "what is quick", Bound: work.Bound{AtMost: true, Value: 2, Unit: work.Times}}
	missed := work.Goal{ID: "missed", Work: "what is slow", Bound: work.Bound{Value: 15, Unit: work.Times}}
	unknown := work.Goal{ID: "unknown", Work: "what is not there", Bound: work.Bound{Value: 2, Unit: work.Times}}
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
				{Goal: unknown, Bound: unknown.Bound, Skipped: "it is not installed"},
			},
			Figures: []work.Figure{{Name: "a thing", Unit: work.Nanos, Samples: []float64{100, 200, 1500}}},
			Notes:   []string{"A note."},
			Skipped: []peers.Skipped{{Name: "Peer", Why: "not installed"}},
			Charts:  []chart.Bars{bars},
		}, time.Minute}},
	}
}

// A goal that is not reached, or not measured, stands there with the reason.
func TestMarkdown(t *testing.T) {
	work.Reasons["missed"] = "the profile shows a lock."
	t.Cleanup(func() { delete(work.Reasons, "missed") })
	text := sample().markdown()
	for _, want := range []string{
		"Written by `go run ./report` in `benchmarks`, on 2026-01-02 03:04 UTC, in 1m30s.",
		"| what is quick | ≤ 2 × | 1.5 × | 1.25 × – 2.25 × | 3 | yes |",
		"| what is slow | ≥ 15 × | 12 × |  | once | **no** |",
		"| what is not there | ≥ 2 × | – | | | not measured: it is not installed |",
		"* **what is slow**: the profile shows a lock.",
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

// Nothing of the progress goes into a pipe or a file.
func TestNoProgressInAPipe(t *testing.T) {
	r, w, err := os.Pipe()
	require.NoError(t, err)
	p := newProgress(w)
	p.show("working")
	p.clear()
	require.NoError(t, w.Close())
	said, err := io.ReadAll(r)
	require.NoError(t, err)
	require.Empty(t, said)
}

// What the machine is says nothing of where on it this ran.
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
