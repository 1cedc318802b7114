package promkeys_test

import (
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var alertNames = regexp.MustCompile(`alert: (\w+)`)

// promtool finds no error in the alerts. With made-up numbers, each alert fires when it should, and
// only then.
func TestRules(t *testing.T) {
	promtool := lookPath(t, "promtool")
	for _, args := range [][]string{
		{"check", "rules", "rules.yaml"}, {"test", "rules", "rules_test.yaml", "rules_week_test.yaml"},
	} {
		out, err := exec.Command(promtool, args...).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	tests := readFile(t, "rules_test.yaml") + readFile(t, "rules_week_test.yaml")
	for _, alert := range alertNames.FindAllStringSubmatch(readFile(t, "rules.yaml"), -1) {
		require.Contains(t, tests, "alertname: "+alert[1], "each alert has a test")
	}
}

// The README names every metric, every value of a label, and every alert.
func TestREADME(t *testing.T) {
	readme := readFile(t, "README.md")
	for name := range described(t) {
		if !strings.Contains(name, "_duration_seconds_") {
			require.Contains(t, readme, "`"+name+"`")
		}
	}
	for _, labels := range closedSets {
		for _, word := range labels.words {
			require.Contains(t, readme, "`"+word+"`")
		}
	}
	for _, alert := range alertNames.FindAllStringSubmatch(readFile(t, "rules.yaml"), -1) {
		require.Contains(t, readme, "| `"+alert[1]+"` |")
	}
}
