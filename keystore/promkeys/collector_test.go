package promkeys_test

import (
	"bytes"
	"os/exec"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// register returns a registry with a Collector of the store. The registry is pedantic: it checks
// each metric against Describe.
func register(t testing.TB, store *keystore.Store, opts *promkeys.Options) *prometheus.Registry {
	t.Helper()
	c, err := promkeys.NewCollector(store, opts)
	require.NoError(t, err)
	registry := prometheus.NewPedanticRegistry()
	require.NoError(t, registry.Register(c))
	return registry
}

// values returns the gathered values, by the name and the label. A histogram has its count.
func values(t testing.TB, registry *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := registry.Gather()
	require.NoError(t, err)
	all := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.Metric {
			name := f.GetName()
			for _, l := range m.Label {
				name += " " + l.GetValue()
			}
			all[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() +
				float64(m.GetHistogram().GetSampleCount())
		}
	}
	return all
}

// text returns what a scrape gets.
func text(t testing.TB, registry *prometheus.Registry) []byte {
	t.Helper()
	families, err := registry.Gather()
	require.NoError(t, err)
	var b bytes.Buffer
	for _, f := range families {
		_, err := expfmt.MetricFamilyToText(&b, f)
		require.NoError(t, err)
	}
	return b.Bytes()
}

func TestCollector(t *testing.T) {
	store := keystoretest.New(t, nil)
	registry := register(t, store, nil)
	ctx := t.Context()
	first := values(t, registry)
	require.Equal(t, 1.0, first["apikeys_up"])
	require.Equal(t, 0.0, first["apikeys_refusals_total revoked"], "each word is there at first")
	require.Equal(t, 0.0, first["apikeys_streams_ended_total revoked"])
	require.Equal(t, 0.0, first["apikeys_failed_writes_total full"])
	require.NotContains(t, first, "apikeys_outdated_digests", "there is no earlier hasher")
	require.NotContains(t, first, "apikeys_feed_lag_seconds", "there is one process")
	require.NotContains(t, first, "apikeys_keys active", "there is no inventory")

	issued := keystoretest.MustCreate(t, store, keystore.Spec{})
	for range 3 {
		_, err := store.Verify(ctx, issued.Secret.Reveal())
		require.NoError(t, err)
	}
	_, err := store.Bind(ctx, issued.Secret.Reveal())
	require.NoError(t, err)
	_, err = store.Verify(ctx, "nonsense")
	require.Error(t, err)
	require.Equal(t, 1.0, values(t, registry)["apikeys_streams"])
	require.NoError(t, store.Revoke(ctx, issued.Key.ID, ""))

	got := values(t, registry)
	for name, want := range map[string]float64{
		"apikeys_up": 1, "apikeys_fresh": 1, "apikeys_processes": 1,
		"apikeys_lookups_total hit": 3, "apikeys_lookups_total miss": 1,
		"apikeys_admissions_total": 4, "apikeys_refusals_total malformed": 1,
		"apikeys_changes_total create": 1, "apikeys_changes_total revoke": 1,
		"apikeys_change_duration_seconds revoke": 1, "apikeys_streams": 0,
		"apikeys_streams_ended_total revoked": 1, "apikeys_cached_keys": 0,
		"apikeys_cache_evictions_total": 0,
	} {
		require.Equal(t, want, got[name], name)
	}
	require.NoError(t, store.Close())
	require.Equal(t, 0.0, values(t, registry)["apikeys_up"], "a closed store can be collected")
}

// A store of several processes has more metrics.
func TestCollectorOfProcesses(t *testing.T) {
	shared := backendtest.NewShared()
	open := func() *keystore.Store {
		// With a long freshness, a slow machine loses no contact.
		s, err := keystore.New(shared.Open(), &keystore.Options{Freshness: time.Minute,
			Timeout: 2 * time.Minute})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		return s
	}
	a := open()
	open()
	registry := register(t, a, nil)
	issued := keystoretest.MustCreate(t, a, keystore.Spec{})
	require.NoError(t, a.Revoke(t.Context(), issued.Key.ID, ""))
	got := values(t, registry)
	require.Equal(t, 2.0, got["apikeys_processes"])
	require.Equal(t, 1.0, got["apikeys_fresh"])
	require.Equal(t, 60.0, got["apikeys_freshness_seconds"])
	require.Equal(t, 1.0, got["apikeys_barrier_duration_seconds"])
	require.Less(t, got["apikeys_feed_lag_seconds"], 60.0)
	require.Equal(t, 0.0, got["apikeys_lost_touch_total"])
	require.Equal(t, 0.0, got["apikeys_processes_removed_total"])
}

func TestInventory(t *testing.T) {
	store := keystoretest.New(t, nil)
	for range 3 {
		keystoretest.MustCreate(t, store, keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)})
	}
	registry := register(t, store, &promkeys.Options{Inventory: 10 * time.Minute})
	values(t, registry) // starts the first count
	require.Eventually(t, func() bool {
		return values(t, registry)["apikeys_keys active"] == 3
	}, time.Minute, time.Millisecond)
	got := values(t, registry)
	require.Equal(t, 3.0, got["apikeys_expiring_keys 24h"])
	require.Equal(t, 0.0, got["apikeys_unused_keys 30d"])
	require.InDelta(t, time.Now().Unix(), got["apikeys_inventory_timestamp_seconds"], 3600)
}

func TestNewCollectorRefuses(t *testing.T) {
	_, err := promkeys.NewCollector(nil, nil)
	require.EqualError(t, err, "promkeys: NewCollector: the store is nil")
	_, err = promkeys.NewCollector(keystoretest.New(t, nil),
		&promkeys.Options{Inventory: time.Minute})
	require.EqualError(t, err, "promkeys: NewCollector: Options.Inventory is 1m0s: it must be 0, "+
		"for no inventory, or at least 10m0s, because each count reads every key")
}

// promtool has no complaint about the names, the types and the help texts.
func TestNames(t *testing.T) {
	promtool := lookPath(t, "promtool")
	store := keystoretest.New(t, nil)
	registry := register(t, store, &promkeys.Options{Inventory: time.Hour})
	calls := promkeys.NewCalls()
	require.NoError(t, registry.Register(calls))
	calls.Refused(t.Context(), "/package.Service/Method", "missing")
	require.Eventually(t, func() bool {
		_, ok := values(t, registry)["apikeys_keys active"]
		return ok
	}, time.Minute, time.Millisecond)
	cmd := exec.Command(promtool, "check", "metrics")
	cmd.Stdin = bytes.NewReader(text(t, registry))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Empty(t, string(out))
}

// lookPath returns the path of a program of Debian's package prometheus. Without the program, the
// test is skipped.
func lookPath(t testing.TB, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Skipf("NOT RUN: %s is not installed. Install Debian's package prometheus.", program)
	}
	return path
}
