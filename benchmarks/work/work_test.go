package work

import (
	"os"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

func TestMain(m *testing.M) {
	MaybeChild()
	os.Exit(m.Run())
}

// The IDs of all goals are different, and each reason belongs to a goal.
func TestGoals(t *testing.T) {
	seen := make(map[string]bool)
	add := func(ids ...string) {
		for _, id := range ids {
			require.False(t, seen[id], id)
			seen[id] = true
		}
	}
	for _, w := range All() {
		require.NotNil(t, w.Run, w.Name)
		for _, g := range w.Goals {
			add(g.ID)
		}
	}
	for _, w := range Shared() {
		require.NotNil(t, w.Run, w.Name)
		for _, g := range w.Goals {
			add(g.ID, "etcd/"+g.ID, "postgres/"+g.ID)
		}
	}
	for id := range Reasons {
		require.True(t, seen[id], "there is a reason for the goal %s, but no such goal", id)
	}
}

func TestSelect(t *testing.T) {
	names := func(only string) (names []string) {
		for _, w := range Select(All(), regexp.MustCompile(only)) {
			names = append(names, w.Name)
		}
		return names
	}
	require.Len(t, Select(All(), nil), len(All()))
	require.Equal(t, []string{"verify"}, names("^jwt-"))
	require.Equal(t, []string{"unary"}, names("^unary$"))
	require.Empty(t, names("nothing"))
}

func TestJudge(t *testing.T) {
	w := &Workload{Goals: []Goal{
		{ID: "least", Bound: atLeast(2, Times)},
		{ID: "either", Bound: atMost(2, Times), Or: &Bound{true, 5, MoreThan}},
	}}
	require.Equal(t, "≥ 2 ×", w.Goals[0].String())
	require.Equal(t, "≤ 2 ×, or ≤ 5 ns more", w.Goals[1].String())
	var o Outcome
	o.judge(w, "least", []float64{1, 2, 100})
	o.judge(w, "least", []float64{1, 1.9, 100})
	o.judgeEither(w, "either", []float64{2}, []float64{9})
	o.judgeEither(w, "either", []float64{3}, []float64{4})
	o.judgeEither(w, "either", []float64{3}, []float64{6})
	var reached []bool
	var units []Unit
	for _, v := range o.Verdicts {
		reached = append(reached, v.Reached)
		units = append(units, v.Bound.Unit)
	}
	require.Equal(t, []bool{true, false, true, true, false}, reached)
	require.Equal(t, []Unit{Times, Times, Times, MoreThan, MoreThan}, units)
}

func TestFormat(t *testing.T) {
	for _, tt := range []struct {
		unit Unit
		v    float64
		want string
	}{
		{Nanos, 0.5, "0.5 ns"},
		{Nanos, 123.4, "123 ns"},
		{Nanos, 1500, "1.5 µs"},
		{Nanos, 12_345_678, "12.3 ms"},
		{Nanos, 2e9, "2 s"},
		{MoreThan, -250, "-250 ns more"},
		{Times, 0.9876, "0.988 ×"},
		{Times, 1, "1 ×"},
		{Times, 999.7, "1,000 ×"},
		{Rate, 1_234_567, "1,230,000 /s"},
		{Rate, 12_345, "12,300 /s"},
		{Bytes, 64 << 20, "64 MiB"},
		{Bytes, 3 << 30, "3 GiB"},
		{PerKey, 300, "300 B a key"},
		{Percent, 99.95, "99.95 %"},
		{Count, 0, "0"},
		{Count, 16, "16"},
	} {
		require.Equal(t, tt.want, tt.unit.Format(tt.v))
	}
}

// A child opens the store that this process has created, and reports the costs.
func TestOpenInChild(t *testing.T) {
	e := &Env{Dir: t.TempDir(), Quick: true, Keys: million}
	s, err := e.sized(t.Context(), 500)
	require.NoError(t, err)
	require.Len(t, s.tokens, 500)
	require.Positive(t, s.disk)
	require.Len(t, s.owned, 50)
	require.Len(t, s.owned[49], keysOfOwner)
	again, err := e.sized(t.Context(), 500)
	require.NoError(t, err)
	require.Same(t, s, again)
	o, err := openInChild(t.Context(), s.dir, s.tokens)
	require.NoError(t, err)
	require.Positive(t, o.Open)
	require.Positive(t, o.Goroutines)
	require.Positive(t, o.Apparent)
	_, err = openInChild(t.Context(), s.dir, []string{"no token"})
	require.ErrorContains(t, err, "malformed")
}

// The server process serves all its peers, and reports what it has used.
func TestServerProcess(t *testing.T) {
	if _, err := processCPU(); err != nil {
		t.Skip("SKIPPED: this system does not report the processor time of a process: ", err)
	}
	s, err := startServer(t.Context(), t.TempDir())
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	require.Len(t, s.servers, len(cpuPeers))
	for _, peer := range s.servers {
		rig, err := peers.Connect(peer.Addr, peer.Good)
		require.NoError(t, err)
		before, err := s.spent()
		require.NoError(t, err)
		require.NoError(t, rig.Call(t.Context(), 0)())
		after, err := s.spent()
		require.NoError(t, err)
		require.Greater(t, after.CPU, before.CPU)
		require.Greater(t, after.Allocations, before.Allocations)
		require.NoError(t, rig.Close())
	}
}
