// Package guides_test checks that the pages agree with the files and the code that the pages show.
package guides_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	return string(text)
}

// trimmed returns the lines without their indentation.
func trimmed(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "\n")
}

// sources lists the files that the blocks of the pages come from, by the language of the block.
var sources = map[string][]string{
	"go": {"service/*.go", "fake_time_test.go", "../../internal/compat/*.go",
		"../../internal/compat/gateway/proxy/main.go", "../web/main.go"},
	"nginx":   {"nginx/nginx.conf"},
	"systemd": {"systemd/*.service"},
	"yaml":    {"kubernetes/*.yaml", "envoy/*.yaml", "prometheus/*.yml"},
}

// Every line of a block in a page must occur in a file that a test compiles, checks or runs.
func TestPagesShowWhatIsTested(t *testing.T) {
	pages, err := filepath.Glob("*.md")
	require.NoError(t, err)
	fenced := regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$")
	shown := 0
	for _, page := range pages {
		for _, block := range fenced.FindAllStringSubmatch(read(t, page), -1) {
			patterns, ok := sources[block[1]]
			require.True(t, ok, "%s has a block of %s, which no test runs", page, block[1])
			found := false
			for _, pattern := range patterns {
				files, err := filepath.Glob(pattern)
				require.NoError(t, err)
				require.NotEmpty(t, files, pattern)
				for _, file := range files {
					found = found || strings.Contains(trimmed(read(t, file)), trimmed(block[2]))
				}
			}
			require.True(t, found, "%s shows what is in none of %v:\n%s", page, patterns, block[2])
			shown++
		}
	}
	require.Greater(t, shown, 10)
}

// The index must list every page, and the targets of all links in the pages must exist.
func TestLinks(t *testing.T) {
	links := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	pages, err := filepath.Glob("*.md")
	require.NoError(t, err)
	for _, page := range pages {
		if page != "README.md" {
			require.Contains(t, read(t, "README.md"), "("+page+")", "the index names every page")
		}
		for _, link := range links.FindAllStringSubmatch(read(t, page), -1) {
			_, err := os.Stat(link[1])
			require.NoError(t, err, "%s points to %s", page, link[1])
		}
	}
}

// promtool must find no error in the alerts. Each alert must fire in the expected cases, and only
// then.
func TestAlerts(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("NOT RUN: promtool is not installed. Install Debian's package prometheus.")
	}
	for _, args := range [][]string{
		{"check", "rules", "alerts.yml"}, {"test", "rules", "alerts_test.yml"},
	} {
		cmd := exec.Command(promtool, args...)
		cmd.Dir = "prometheus"
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	tests := read(t, "prometheus/alerts_test.yml")
	rules, names := read(t, "prometheus/alerts.yml"), regexp.MustCompile(`alert: (\w+)`)
	for _, alert := range names.FindAllStringSubmatch(rules, -1) {
		require.Contains(t, tests, "alertname: "+alert[1], "each alert has a test")
	}
}
