package storemetrics

import (
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// The names have the forms of both systems, and no name occurs twice.
func TestNames(t *testing.T) {
	seen := make(map[string]bool)
	for _, m := range Metrics {
		for _, name := range []string{m.Prometheus, m.OTel} {
			require.False(t, seen[name], name)
			seen[name] = true
		}
		require.Regexp(t, regexp.MustCompile(`^apikeys(_[a-z]+)+$`), m.Prometheus)
		require.Regexp(t, regexp.MustCompile(`^apikey(\.[a-z]+(_[a-z]+)*)+$`), m.OTel)
		require.Equal(t, m.Label == "", m.Attribute == "", m.Prometheus)
		require.NotEmpty(t, m.Unit, m.Prometheus)
		require.Equal(t, m.Kind == Counter,
			regexp.MustCompile(`_total$`).MatchString(m.Prometheus), m.Prometheus)
	}
}

func TestNewInventory(t *testing.T) {
	_, err := NewInventory(keystoretest.New(t, nil), MinInventory-1)
	require.ErrorContains(t, err, "at least 10m0s")
}

// Each metric has a value of a new store, except those that need an inventory, several processes,
// or an earlier hasher.
func TestTake(t *testing.T) {
	store := keystoretest.New(t, nil)
	var without []string
	for _, m := range Metrics {
		n := 0
		m.Read(Take(store, nil), func(word string, v Value) {
			n++
			require.Equal(t, m.Label != "", word != "", m.Prometheus)
		})
		if n == 0 {
			without = append(without, m.Prometheus)
		}
	}
	require.Equal(t, []string{"apikeys_outdated_digests", "apikeys_freshness_seconds",
		"apikeys_feed_lag_seconds", "apikeys_barrier_duration_seconds", "apikeys_lost_touch_total",
		"apikeys_processes_removed_total", "apikeys_keys", "apikeys_expiring_keys",
		"apikeys_unused_keys", "apikeys_inventory_timestamp_seconds"}, without)
}
