package work

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
)

// judgeSizes gets invented measurements, because a test does not create stores of these sizes.
func TestJudgeSizes(t *testing.T) {
	at := func(keys int, open, checksum, anonymous, disk float64) *sized {
		o := opening{
			Open: open, Checksum: checksum, Goroutines: 14, Heap: 10 << 20,
			AnonSettled: anonymous, Apparent: 19 << 20,
		}
		return &sized{keys: keys, disk: disk, opened: []opening{o, o, o}}
	}
	empty := at(0, 10e6, 0, 0, 0)
	one := at(million, 60e6, 100e6, 50<<20, 200*million)
	ten := at(tenMillion, 1e9, 1e9, 150<<20, 2100*million)
	misses := measure.Samples{one.name(): {10, 10, 10}, ten.name(): {15, 15, 15}}
	judged := func(by map[int]*sized) map[string]Verdict {
		var o Outcome
		judgeSizes(&o, by, misses)
		require.Len(t, o.Verdicts, len(sizesWork.Goals), "each goal has a verdict")
		verdicts := make(map[string]Verdict)
		for _, v := range o.Verdicts {
			verdicts[v.Goal.ID] = v
		}
		return verdicts
	}

	all := judged(map[int]*sized{0: empty, million: one, tenMillion: ten})
	require.InDelta(t, 60.0/110, measure.Median(all["open-1m"].Samples), 1e-9)
	require.True(t, all["open-1m"].Reached)
	require.Equal(t, 200.0, measure.Median(all["disk-1m"].Samples))
	require.Equal(t, 10.5, measure.Median(all["disk-10m"].Samples))
	require.False(t, all["disk-10m"].Reached)
	require.Equal(t, 1.5, measure.Median(all["miss-10m"].Samples))
	require.True(t, all["miss-10m"].Reached)
	require.True(t, all["empty-goroutines"].Reached)
	if runtime.GOOS == "linux" {
		require.True(t, all["memory-1m"].Reached)
		require.Equal(t, 3.0, measure.Median(all["memory-10m"].Samples))
		require.False(t, all["memory-10m"].Reached)
	}

	some := judged(map[int]*sized{0: empty, million: one})
	require.True(t, some["disk-1m"].Reached)
	require.NotEmpty(t, some["disk-10m"].Skipped)
	require.NotEmpty(t, judged(map[int]*sized{0: empty})["open-1m"].Skipped)
}
