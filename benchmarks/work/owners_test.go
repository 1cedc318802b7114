package work

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/measure"
)

// Each goal has a verdict, from the samples of the sizes that its text names.
func TestJudgeOwners(t *testing.T) {
	samples := make(measure.Samples)
	for keys, v := range map[int]float64{10_000: 10, million: 14, tenMillion: 35} {
		for _, what := range []string{ownerList, ownerEvents, ownerRevokeAll} {
			samples[ofSize(what, keys)] = []float64{v, v, v}
		}
		samples[ofSize(ownerBare, keys)] = []float64{1, 1, 1}
		samples[ofSize(ownerRevokes, keys)] = []float64{20, 20, 20}
	}
	var all Outcome
	judgeOwners(&all, samples)
	require.Len(t, all.Verdicts, len(ownersWork.Goals))
	measured := make(map[string]float64)
	for _, v := range all.Verdicts {
		require.Empty(t, v.Skipped)
		measured[v.Goal.ID] = measure.Median(v.Samples)
	}
	require.Equal(t, map[string]float64{
		"list": 1.4, "list-bare": 14, "events": 1.4, "events-bare": 14, "revokeall": 0.7,
		"list-10m": 2.5, "events-10m": 2.5, "revokeall-10m": 2.5,
	}, measured)

	var none Outcome
	judgeOwners(&none, nil)
	require.Len(t, none.Verdicts, len(ownersWork.Goals))
	for _, v := range none.Verdicts {
		require.NotEmpty(t, v.Skipped)
	}
}

// The methods of an ownersStore check that the store returns what belongs to the owner.
func TestOwnersStore(t *testing.T) {
	e := &Env{Dir: t.TempDir(), Quick: true, Keys: million}
	var end closer
	o, err := openOwners(t.Context(), e, 60, &end)
	require.NoError(t, err)
	defer func() {
		var err error
		end.into(&err)
		require.NoError(t, err)
	}()
	for range 10 {
		require.NoError(t, o.list(t.Context()))
		require.NoError(t, o.events(t.Context()))
		require.NoError(t, o.get(t.Context()))
		require.NoError(t, o.read(t.Context()))
	}
	require.NoError(t, o.revokeAll(t.Context()))
	require.NoError(t, o.revokes(t.Context()))
	require.NoError(t, o.revokeAll(t.Context()))
	require.ErrorIs(t, o.revokes(t.Context()), errNoKeys, "all keys of three owners are revoked")
}
