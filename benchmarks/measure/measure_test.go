package measure_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
)

func TestQuantile(t *testing.T) {
	require.Zero(t, measure.Median(nil))
	require.Equal(t, 7.0, measure.Median([]float64{7}))
	require.Equal(t, 2.0, measure.Median([]float64{3, 1, 2}))
	require.Equal(t, 2.5, measure.Median([]float64{4, 1, 2, 3}))
	require.Equal(t, 1.75, measure.Quantile([]float64{4, 1, 2, 3}, 0.25))
	require.Equal(t, 4.0, measure.Quantile([]float64{4, 1, 2, 3}, 1))
}

func TestPairs(t *testing.T) {
	require.Equal(t, []float64{2, 3}, measure.Ratios([]float64{4, 9, 5}, []float64{2, 3}))
	require.Equal(t, []float64{-1}, measure.Differences([]float64{1}, []float64{2, 3}))
	require.Equal(t, []float64{2, 4}, measure.Scaled([]float64{1, 2}, 2))
}

// Each contestant has one turn in each round. The samples of the first round are discarded.
func TestRoundsTakeTurns(t *testing.T) {
	var turns []string
	contestant := func(name string) measure.Contestant {
		return measure.Contestant{Name: name, Sample: func(context.Context) (float64, error) {
			turns = append(turns, name)
			return float64(len(turns)), nil
		}}
	}
	samples, err := measure.Rounds(t.Context(), 20, nil, contestant("a"), contestant("b"))
	require.NoError(t, err)
	require.Len(t, turns, 42)
	var orders []string
	for round := range slices.Chunk(turns, 2) {
		orders = append(orders, round[0]+round[1])
	}
	require.Subset(t, []string{"ab", "ba"}, orders)
	require.Contains(t, orders, "ab")
	require.Contains(t, orders, "ba")
	require.Len(t, samples["a"], 20)
	require.Len(t, samples["b"], 20)
	require.Greater(t, min(samples["a"][0], samples["b"][0]), 2.0)
}

func TestAnErrorEndsIt(t *testing.T) {
	broken := errors.New("broken")
	fails := func(context.Context) (float64, error) { return 0, broken }
	_, err := measure.Rounds(t.Context(), 3, nil, measure.Contestant{Name: "it", Sample: fails})
	require.ErrorIs(t, err, broken)
	_, err = measure.Throughput(2, 1, time.Hour, func(int) func() error {
		return func() error { return broken }
	})
	require.ErrorIs(t, err, broken)
	_, err = measure.Timed(measure.Case{Do: func(int) error { return broken }}, time.Millisecond)
	require.ErrorIs(t, err, broken)
	ended, end := context.WithCancel(t.Context())
	end()
	_, err = measure.Rounds(ended, 1, nil, measure.Contestant{})
	require.ErrorIs(t, err, context.Canceled)
}

// Timed must measure that a case takes longer: 100 times as long, and at least 10 times in this
// noisy test.
func TestTimed(t *testing.T) {
	spin := func(times int) measure.Case {
		return measure.Case{Name: "spin", Do: func(n int) error {
			for range n * times {
				sha256.Sum256(nil)
			}
			return nil
		}}
	}
	short, err := measure.Timed(spin(10), time.Millisecond)
	require.NoError(t, err)
	long, err := measure.Timed(spin(1000), time.Millisecond)
	require.NoError(t, err)
	short.Name = "short"
	samples, err := measure.Rounds(t.Context(), 20, nil, short, long)
	require.NoError(t, err)
	ratio := measure.Median(measure.Ratios(samples["spin"], samples["short"]))
	require.Greater(t, ratio, 10.0, "the exact ratio is 100")
}

// Throughput counts the operations of all goroutines: ten goroutines do more than one goroutine.
func TestThroughput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nap := func(int) func() error {
			return func() error {
				time.Sleep(time.Millisecond)
				return nil
			}
		}
		for _, goroutines := range []int{1, 10} {
			rate, err := measure.Throughput(goroutines, 1, 100*time.Millisecond, nap)
			require.NoError(t, err)
			require.InDelta(t, 1000*goroutines, rate, 1e-6)
		}
	})
}
