package crashtest

import (
	"flag"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

var cycles = flag.Int("cycles", 5, "the number of times to kill the process")

func TestKill(t *testing.T) {
	dir := t.TempDir()
	o := newOracle()
	began := time.Now()
	for cycle := range *cycles {
		p := start(t, "writer", dir)
		hear, aimed := o.aim(cycle%2 == 0), false
		for line, ok := p.line(); ok; line, ok = p.line() {
			if hear(line) && !aimed {
				aimed = true
				time.AfterFunc(rand.N(150*time.Millisecond), func() { _ = p.cmd.Process.Kill() })
			}
		}
		require.ErrorContains(t, p.cmd.Wait(), "signal: killed", "cycle %d: %s", cycle, p.stderr)
		// To check all keys after each cycle would take quadratic time. So check the changed keys
		// and a sample after each cycle, and check all keys only after every 25th and the last
		// cycle.
		o.checkAll(t, dir, cycle%25 == 24 || cycle == *cycles-1)
	}
	require.Greater(t, o.Acknowledged, 10**cycles, "the victims made too few changes")
	figures.Record(t, "%d cycles, %d acknowledged changes of %d keys: nothing lost or undone; "+
		"%.2f s a cycle",
		*cycles, o.Acknowledged, len(o.Keys), time.Since(began).Seconds()/float64(*cycles))
}
