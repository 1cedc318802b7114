package promkeys_test

import (
	"context"
	"math"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

// described returns the names of all metrics of this package, as Describe reports them.
func described(t testing.TB) map[string]bool {
	t.Helper()
	c, err := promkeys.NewCollector(keystoretest.New(t, nil), nil)
	require.NoError(t, err)
	names := make(map[string]bool)
	for _, collector := range []prometheus.Collector{c, promkeys.NewCalls()} {
		descs := make(chan *prometheus.Desc, 100)
		collector.Describe(descs)
		close(descs)
		for d := range descs {
			_, name, _ := strings.Cut(d.String(), `fqName: "`)
			name, _, _ = strings.Cut(name, `"`)
			names[name] = true
			if strings.HasSuffix(name, "_duration_seconds") {
				names[name+"_bucket"], names[name+"_sum"], names[name+"_count"] = true, true, true
			}
		}
	}
	return names
}

// repeatedly calls f until the end of the test, in the background.
func repeatedly(t testing.TB, pause time.Duration, f func(ctx context.Context)) {
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		done.Wait()
	})
	done.Go(func() {
		for ctx.Err() == nil {
			f(ctx)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
		}
	})
}

// busyStore returns a store in a directory with digests of an earlier pepper, in use until the end
// of the test: calls are admitted and refused, streams end, and the cache is too small.
func busyStore(t testing.TB) *keystore.Store {
	t.Helper()
	dir := t.TempDir()
	store, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	var texts []string
	for range 20 {
		issued := keystoretest.MustCreate(t, store,
			keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)})
		texts = append(texts, issued.Secret.Reveal())
	}
	require.NoError(t, store.Close())
	peppered, err := hashing.HMACSHA256("1", []byte(strings.Repeat("p", 32)))
	require.NoError(t, err)
	ring, err := hashing.Keyring(peppered, hashing.SHA256())
	require.NoError(t, err)
	store, err = keystore.Open(dir, &keystore.Options{Hasher: ring, CacheSize: 10})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	repeatedly(t, 20*time.Millisecond, func(ctx context.Context) {
		for _, text := range texts[:15] { // the digests of the others stay
			_, _ = store.Verify(ctx, text)
		}
		_, _ = store.Verify(ctx, "nonsense")
		if issued, err := store.Create(ctx, keystore.Spec{Name: "n"}); err == nil {
			if _, err := store.Bind(ctx, issued.Secret.Reveal()); err == nil {
				_ = store.Revoke(ctx, issued.Key.ID, "")
			}
		}
	})
	return store
}

// Each expression of the dashboard has a value, of real data, in a real Prometheus. Prometheus
// evaluates each alert without an error. No expression names a metric that does not exist.
func TestExpressions(t *testing.T) {
	names := described(t)
	expressions := make(map[string][]string) // by the title of the panel
	for _, p := range readDashboard(t) {
		for _, target := range p.Targets {
			expressions[p.Title] = append(expressions[p.Title], withoutVariables(target.Expr))
		}
	}
	all := readFile(t, "rules.yaml")
	for _, list := range expressions {
		all += strings.Join(list, "\n")
	}
	for _, name := range metricNames.FindAllString(all, -1) {
		require.True(t, names[name], "%s is not collected", name)
	}

	store := busyStore(t)
	registry := register(t, store, &promkeys.Options{Inventory: time.Hour})
	calls := promkeys.NewCalls()
	require.NoError(t, registry.Register(calls))
	repeatedly(t, 100*time.Millisecond, func(ctx context.Context) {
		calls.Refused(ctx, "/package.Service/Method", "missing")
	})
	shared := backendtest.NewShared()
	var processes []*keystore.Store
	for range 2 {
		s, err := keystore.New(shared.Open(), nil)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, s.Close()) })
		processes = append(processes, s)
	}
	repeatedly(t, 100*time.Millisecond, func(ctx context.Context) {
		if issued, err := processes[0].Create(ctx, keystore.Spec{Name: "n"}); err == nil {
			_ = processes[1].Revoke(ctx, issued.Key.ID, "")
		}
	})

	server := startPrometheus(t, readFile(t, "rules.yaml"),
		target{"busy", serve(t, registry)},
		target{"process", serve(t, register(t, processes[0], nil))},
		target{"process2", serve(t, register(t, processes[1], nil))})
	hasValue := func(expr string) bool {
		result := server.query(t, expr)
		for _, s := range result {
			if math.IsNaN(s.number(t)) {
				return false
			}
		}
		return len(result) > 0
	}
	for title, list := range expressions {
		for _, expr := range list {
			require.Eventually(t, func() bool { return hasValue(expr) }, 2*time.Minute,
				200*time.Millisecond, "%s: %s", title, expr)
		}
	}
	for name := range names { // a scrape that takes too long on a slow machine has no values
		require.Eventually(t, func() bool { return hasValue(name) || hasValue(name+"_count") },
			2*time.Minute, 200*time.Millisecond, "%s has no value", name)
	}
	rules := server.rules(t)
	require.Len(t, rules, strings.Count(readFile(t, "rules.yaml"), "- alert:"))
	for _, r := range rules {
		require.Empty(t, r.LastError, r.Name)
		require.NotEmpty(t, r.Annotations["runbook"], "%s says what to do", r.Name)
		require.NotEmpty(t, r.Annotations["summary"], r.Name)
		require.Eventually(t, func() bool {
			for _, r2 := range server.rules(t) {
				if r2.Name == r.Name {
					return r2.Health == "ok"
				}
			}
			return false
		}, time.Minute, 200*time.Millisecond, r.Name)
	}
}

// The panels of the dashboard do not overlap, and each says what it shows.
func TestDashboard(t *testing.T) {
	taken := make(map[[2]int]string)
	ids := make(map[int]bool)
	shown := make(map[string]bool)
	for _, p := range readDashboard(t) {
		require.False(t, ids[p.ID], "two panels have the id %d", p.ID)
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				require.Empty(t, taken[[2]int{x, y}], p.Title)
				require.Less(t, x, 24)
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		require.NotEmpty(t, p.Description, p.Title)
		require.NotEmpty(t, p.Targets, p.Title)
		for _, target := range p.Targets {
			require.NotEmpty(t, target.LegendFormat, p.Title)
			require.Contains(t, target.Expr, `{job=~"$job",instance=~"$instance"`, p.Title)
			for _, name := range metricNames.FindAllString(target.Expr, -1) {
				shown[strings.TrimSuffix(name, "_bucket")] = true
			}
		}
	}
	for name := range described(t) {
		if !strings.Contains(name, "_duration_seconds_") {
			require.True(t, shown[name], "no panel shows %s", name)
		}
	}
}
