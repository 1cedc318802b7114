package cluster

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// chaosCatches runs seeds until the checks catch a wrong variant of the protocol.
func chaosCatches(t *testing.T, wrong Variant) {
	const most = 400
	for seed := range uint64(most) {
		if f := chaos(t, seed+1, wrong); f.Stale > 0 {
			t.Logf("caught by seed %d", seed+1)
			return
		}
	}
	require.Fail(t, "not caught", "%d seeds", most)
}

func TestChaosCatchesAGateThatIsAlwaysOpen(t *testing.T) { chaosCatches(t, GateAlwaysOpen) }
func TestChaosCatchesAnEarlyReturn(t *testing.T)         { chaosCatches(t, ReturnEarly) }
func TestChaosCatchesAnEarlyEviction(t *testing.T)       { chaosCatches(t, EvictEarly) }
