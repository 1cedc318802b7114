package crashtest

import (
	"flag"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var cycles = flag.Int("cycles", 5, "how many times to kill the process")

func TestKill(t *testing.T) {
	dir := t.TempDir()
	o := newOracle()
	began := time.Now()
	for cycle := range *cycles {
		p := start(t, "writer", dir)
		for line, ok := p.line(); ok; line, ok = p.line() {
			if line == "open" {
				time.AfterFunc(rand.N(150*time.Millisecond), func() { _ = p.cmd.Process.Kill() })
			}
			o.hear(line)
		}
		require.ErrorContains(t, p.cmd.Wait(), "signal: killed", "cycle %d: %s", cycle, p.stderr)
		// All keys after all cycles would be a square: what was changed and a sample after each,
		// and all now and then.
		o.checkAll(t, dir, cycle%25 == 24 || cycle == *cycles-1)
	}
	require.Greater(t, o.Acknowledged, 10**cycles, "the victims did hardly anything")
	t.Logf("%d cycles, %d acknowledged changes, %d keys: none lost, none back; %.2f s each",
		*cycles, o.Acknowledged, len(o.Keys), time.Since(began).Seconds()/float64(*cycles))
}
