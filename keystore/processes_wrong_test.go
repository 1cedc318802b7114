package keystore

import (
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
)

// The tests of this file show that the chaos detects errors of the protocol in whole stores. The
// errors that chaos cannot find are forced, step by step: in processes_test.go, and in package
// cluster.

// chaosCatches runs seeds until one of them finds a violation of one of the guarantees.
func chaosCatches(t *testing.T, wrong processVariant, guarantees ...string) {
	const most = 100
	count := make(tally)
	for n := range uint64(most) {
		found := runChaos(t, n+1, wrong, count, new(chaosFigures))
		if i := slices.IndexFunc(found, func(err error) bool {
			return slices.ContainsFunc(guarantees, func(name string) bool {
				return strings.Contains(err.Error(), " "+name+": ")
			})
		}); i >= 0 {
			text, _, _ := strings.Cut(found[i].Error(), "\n")
			t.Logf("caught by seed %d: %s", n+1, text)
			return
		}
	}
	require.Fail(t, "not caught", "%d seeds", most)
}

func TestProcessesChaosCatchesAGateThatIsAlwaysOpen(t *testing.T) {
	chaosCatches(t, processVariant{protocol: cluster.GateAlwaysOpen}, "C2", "C4")
}

func TestProcessesChaosCatchesAnEarlyReturn(t *testing.T) {
	chaosCatches(t, processVariant{protocol: cluster.ReturnEarly}, "C2", "C4")
}

func TestProcessesChaosCatchesAnEarlyEviction(t *testing.T) {
	chaosCatches(t, processVariant{protocol: cluster.EvictEarly}, "C2", "C4")
}

func TestProcessesChaosCatchesAChangeWithoutItsGuard(t *testing.T) {
	chaosCatches(t, processVariant{store: noGuard}, "C7")
}

func TestProcessesChaosCatchesStampsThatFollowOnlyTheClock(t *testing.T) {
	chaosCatches(t, processVariant{store: noLastStamp}, "C10")
}

func TestProcessesChaosCatchesARestoreThatReturnsEarly(t *testing.T) {
	chaosCatches(t, processVariant{store: noRestoreBarrier}, "C2", "C4")
}

func TestProcessesChaosCatchesARestoreOfPurgedKeys(t *testing.T) {
	chaosCatches(t, processVariant{store: noGrave}, "purged guests")
}
