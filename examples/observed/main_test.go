package main

import (
	"encoding/xml"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A short run ends without an error, and draws every panel with lines. The revocation ends every
// stream of its key, and shows in a trace and in the log.
func TestRun(t *testing.T) {
	if _, err := exec.LookPath("prometheus"); err != nil {
		t.Skip("NOT RUN: prometheus is not installed. Install Debian's package prometheus.")
	}
	out := filepath.Join(t.TempDir(), "panels.svg")
	var report strings.Builder
	require.NoError(t, run(t.Context(), config{duration: 12 * time.Second, out: out,
		dashboard: "../../keystore/promkeys/dashboard.json", report: &report}))
	require.Contains(t, report.String(), "It ended 20 streams")
	require.Contains(t, report.String(), "event apikey.stream.ended\n      error.type = revoked")
	require.Contains(t, report.String(), `"trace_id":"`)

	text, err := os.ReadFile(out)
	require.NoError(t, err)
	var drawing struct {
		Texts []string `xml:"text"`
		Lines []struct {
			Points string `xml:"points,attr"`
		} `xml:"polyline"`
	}
	require.NoError(t, xml.Unmarshal(text, &drawing))
	panels, err := readDashboard("../../keystore/promkeys/dashboard.json")
	require.NoError(t, err)
	for _, p := range panels {
		require.Contains(t, drawing.Texts, p.Title)
	}
	require.Greater(t, len(drawing.Lines), 30)
	for _, legend := range []string{"admitted", "missing", "scope", "revoked", "open", "within 7d"} {
		require.Contains(t, drawing.Texts, legend)
	}
}

func TestFormat(t *testing.T) {
	for text, value := range map[string]struct {
		v    float64
		unit string
	}{
		"25 %": {0.25, "percentunit"}, "2 ms": {0.002, "s"}, "3 s": {3, "s"}, "0 s": {0, "s"},
		"200/s": {200, "ops"}, "1.5 M": {1.5e6, "short"}, "1": {1, "none"},
	} {
		require.Equal(t, text, format(value.v, value.unit))
	}
	for most, end := range map[float64]float64{0: 1, 1: 1, 1.5: 2, 3: 4, 5: 6, 7: 10, 0.03: 0.04} {
		require.InDelta(t, end, niceMax(most), 1e-9)
	}
}
