package keystore

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func TestHistogram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var d durations
		require.Zero(t, d.histogram().Count)
		require.Len(t, d.histogram().AtMost, 13, "from the beginning")
		for _, took := range []time.Duration{0, time.Millisecond, 1500 * time.Microsecond,
			10 * time.Second, time.Minute} {
			began := time.Now()
			time.Sleep(took)
			d.since(began)
		}
		h := d.histogram()
		require.EqualValues(t, 5, h.Count)
		require.Equal(t, 70*time.Second+2500*time.Microsecond, h.Sum)
		require.EqualValues(t, 2, h.AtMost[time.Millisecond])
		require.EqualValues(t, 3, h.AtMost[2*time.Millisecond])
		require.EqualValues(t, 3, h.AtMost[5*time.Second])
		require.EqualValues(t, 4, h.AtMost[10*time.Second])
	})
}

// The numbers of a store of several processes: without failures, while another process is silent,
// and while this process is out of contact.
func TestStatsOfProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		alone, err := New(f.shared.Open(), f.options(nil))
		require.NoError(t, err)
		require.NoError(t, alone.Close())
		a, b := f.open(nil), f.open(nil)
		id := a.create(Spec{}).Key.ID
		require.NoError(t, a.Disable(t.Context(), id, ""))
		st := a.Stats()
		require.Equal(t, testFreshness, st.Freshness)
		require.Zero(t, st.FeedLag)
		require.EqualValues(t, 1, st.Barriers.Count)
		require.Zero(t, st.Barriers.Sum)
		require.EqualValues(t, 1, st.Durations[ActionCreate].Count)

		b.link.Set(badlink.Faults{Stopped: true})
		require.NoError(t, a.Enable(t.Context(), id))
		bound := testFreshness * 6 / 5
		st = a.Stats()
		require.Equal(t, bound, st.Barriers.Sum)
		require.Equal(t, bound, st.Durations[ActionEnable].Sum)
		for a.Stats().Processes > 1 {
			time.Sleep(testFreshness)
		}
		require.EqualValues(t, 1, a.Stats().Removed)
		require.Zero(t, a.Stats().LostTouch)

		// The heartbeats are confirmed, and the feed is silent.
		a.link.Set(badlink.Faults{Silent: true})
		time.Sleep(3 * testFreshness)
		st = a.Stats()
		require.False(t, st.Fresh)
		require.EqualValues(t, 1, st.LostTouch)
		require.GreaterOrEqual(t, st.FeedLag, 2*testFreshness)
		require.Less(t, st.FeedLag, 4*testFreshness)
		a.link.Set(badlink.Faults{FeedDelay: testFreshness / 8})
		time.Sleep(5 * testFreshness) // until the feed has caught up
		st = a.Stats()
		require.True(t, st.Fresh)
		require.Equal(t, testFreshness/8, st.FeedLag)
		require.GreaterOrEqual(t, st.LostTouch, uint64(1), "a count never goes down")
	})
}

func TestStatsWithoutOtherProcesses(t *testing.T) {
	s, err := New(backendtest.NewMemory(), &Options{CacheSize: 2})
	require.NoError(t, err)
	defer s.Close()
	for range 5 {
		issued, err := s.Create(t.Context(), Spec{Name: "n"})
		require.NoError(t, err)
		_, err = s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
	}
	st := s.Stats()
	require.Zero(t, st.Freshness+st.FeedLag)
	require.Zero(t, st.Barriers.Count+st.LostTouch+st.Removed)
	require.EqualValues(t, 3, st.Evicted)
	require.EqualValues(t, 5, st.Durations[ActionCreate].Count)
	require.Equal(t, map[string]uint64{"full": 0, "failed": 0}, st.FailedWrites)
}
