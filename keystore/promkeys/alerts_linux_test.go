package promkeys_test

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

// A cause is real trouble, and the alerts that must fire because of it. No other alert may fire.
type cause struct {
	alerts []string
	// store returns a store with the trouble. The trouble stays until the end of the test.
	store     func(t *testing.T) *keystore.Store
	inventory bool
}

var causes = map[string]cause{
	"healthy":      {nil, healthy, true},
	"disk_full":    {[]string{"ApiKeyStorageTrouble"}, onAFullDisk, false},
	"store_failed": {[]string{"ApiKeyStoreDown"}, failed, false},
	"out_of_touch": {[]string{"ApiKeyProcessOutOfTouch"}, outOfTouch, false},
	"revoked":      {[]string{"ApiKeyRevokedKeyStillUsed"}, revokedInUse, false},
	"wrong_network": {[]string{"ApiKeyWrongNetwork"},
		fromAWrongNetwork, false},
	"unknown_keys": {[]string{"ApiKeyRefusalsSpike"}, unknownKeys, false},
	"small_cache":  {[]string{"ApiKeyCacheThrash"}, withASmallCache, false},
	"slow_revoke":  {[]string{"ApiKeySlowRevoke"}, slowToRevoke, false},
	"expiring":     {[]string{"ApiKeysExpiringSoon"}, withExpiringKeys, true},
}

// minute is how long a minute of the rules takes in TestAlertsFire.
const minute = time.Second

// Each alert fires for its real cause, in a real Prometheus, and no other alert fires. Only
// ApiKeyOutdatedDigestsStuck, which needs a week, fires in TestRules alone. The test shortens all
// times in the rules by the same factor.
func TestAlertsFire(t *testing.T) {
	if testing.Short() {
		t.Skip("NOT RUN: -short is set, and the alerts take a minute")
	}
	lookPath(t, "prometheus")
	rules := shortened(t, readFile(t, "rules.yaml"))
	var targets []target
	want := make(map[string][]string)
	for job, c := range causes {
		if job == "disk_full" && os.Geteuid() != 0 {
			t.Log("NOT RUN: the disk that is full, because mounting a file system needs root")
			continue
		}
		var opts promkeys.Options
		if c.inventory {
			opts.Inventory = 10 * time.Minute
		}
		want[job] = c.alerts
		targets = append(targets, target{job, serve(t, register(t, c.store(t), &opts))})
	}
	server := startPrometheus(t, rules, targets...)

	fired := make(map[string]map[string]bool) // by job
	require.Eventually(t, func() bool {
		for _, r := range server.rules(t) {
			for _, a := range r.Alerts {
				if a.State != "firing" {
					continue
				}
				job := a.Labels["job"]
				if fired[job] == nil {
					fired[job] = make(map[string]bool)
				}
				fired[job][r.Name] = true
			}
		}
		for job, alerts := range want {
			for _, alert := range alerts {
				if !fired[job][alert] {
					return false
				}
			}
		}
		return true
	}, 5*time.Minute, 250*time.Millisecond, "not every alert has fired: %v", fired)
	for job := range want {
		require.ElementsMatch(t, want[job], slices.Collect(maps.Keys(fired[job])), job)
	}
}

// shortened returns the rules with all times shortened.
func shortened(t testing.TB, rules string) string {
	t.Helper()
	units := map[string]time.Duration{"m": time.Minute, "h": time.Hour, "d": 24 * time.Hour}
	times := regexp.MustCompile(`(for: |offset |\[)(\d+)([mhd])`)
	n := 0
	rules = times.ReplaceAllStringFunc(rules, func(match string) string {
		n++
		parts := times.FindStringSubmatch(match)
		number, err := strconv.Atoi(parts[2])
		require.NoError(t, err)
		long := time.Duration(number) * units[parts[3]]
		return fmt.Sprint(parts[1], (long / (time.Minute / minute)).Milliseconds(), "ms")
	})
	require.Greater(t, n, 15)
	return rules
}

// open opens a store in a new directory until the end of the test.
func open(t *testing.T, opts *keystore.Options) *keystore.Store {
	t.Helper()
	store, err := keystore.Open(t.TempDir(), opts)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return store
}

// use uses a key until the end of the test, however the store answers.
func use(t *testing.T, store *keystore.Store, text string) {
	repeatedly(t, 20*time.Millisecond, func(ctx context.Context) { _, _ = store.Verify(ctx, text) })
}

func issue(t *testing.T, store *keystore.Store, spec keystore.Spec) (id, text string) {
	t.Helper()
	issued := keystoretest.MustCreate(t, store, spec)
	return issued.Key.ID, issued.Secret.Reveal()
}

// healthy has a good store, with calls, a few refusals, and changes. The store is in memory,
// because a disk that other tests use may take a second for a revocation.
func healthy(t *testing.T) *keystore.Store {
	store := keystoretest.New(t, nil)
	_, text := issue(t, store, keystore.Spec{})
	use(t, store, text)
	repeatedly(t, time.Second, func(ctx context.Context) {
		_, _ = store.Verify(ctx, "nonsense")
		if issued, err := store.Create(ctx, keystore.Spec{Name: "n"}); err == nil {
			_ = store.Revoke(ctx, issued.Key.ID, "")
		}
	})
	return store
}

// onAFullDisk fills the file system of the store. Keys cannot be created any more.
func onAFullDisk(t *testing.T) *keystore.Store {
	dir := t.TempDir()
	require.NoError(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=128m"))
	t.Cleanup(func() { require.NoError(t, syscall.Unmount(dir, 0)) })
	store, err := keystore.Open(filepath.Join(dir, "keys"), nil)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, os.Remove(filepath.Join(dir, "hog")))
		require.NoError(t, store.Close())
	})
	_, text := issue(t, store, keystore.Spec{})
	use(t, store, text)
	hog, err := os.Create(filepath.Join(dir, "hog"))
	require.NoError(t, err)
	for err == nil {
		_, err = hog.Write(make([]byte, 1<<20))
	}
	require.ErrorIs(t, err, syscall.ENOSPC)
	require.NoError(t, hog.Close())
	_, err = store.Create(t.Context(), keystore.Spec{Name: "n"})
	require.ErrorIs(t, err, syscall.ENOSPC)
	repeatedly(t, 100*time.Millisecond, func(ctx context.Context) {
		_, _ = store.Create(ctx, keystore.Spec{Name: "n"})
	})
	return store
}

// failed takes the directory away from the store, as if its volume was unmounted. The next write
// ends the store for good.
func failed(t *testing.T) *keystore.Store {
	dir := filepath.Join(t.TempDir(), "keys")
	store, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	t.Cleanup(func() {
		require.NoError(t, os.Rename(dir+".away", dir))
		_ = store.Close() // reports the failure
	})
	_, text := issue(t, store, keystore.Spec{})
	use(t, store, text)
	require.NoError(t, os.Rename(dir, dir+".away"))
	_, err = store.Create(t.Context(), keystore.Spec{Name: "n"})
	require.ErrorIs(t, err, keystore.ErrUnavailable)
	require.Error(t, store.Err())
	return store
}

// process opens a shared store in a process with a network of its own.
func process(
	t *testing.T, shared *backendtest.Shared, freshness time.Duration,
) (*keystore.Store, *badlink.Link) {
	t.Helper()
	link := badlink.Open(shared)
	store, err := keystore.New(link,
		&keystore.Options{Freshness: freshness, Timeout: time.Minute})
	require.NoError(t, err)
	t.Cleanup(func() {
		link.Set(badlink.Faults{})
		require.NoError(t, store.Close())
		link.Wait()
	})
	return store, link
}

// outOfTouch loses all requests of a process to the shared storage.
func outOfTouch(t *testing.T) *keystore.Store {
	store, link := process(t, backendtest.NewShared(), time.Second)
	_, text := issue(t, store, keystore.Spec{})
	use(t, store, text)
	link.Set(badlink.Faults{Drop: true})
	return store
}

// slowToRevoke has a network on which each request to the shared storage takes long. With a long
// freshness, the process stays in touch, also on a slow machine.
func slowToRevoke(t *testing.T) *keystore.Store {
	store, link := process(t, backendtest.NewShared(), 20*time.Second)
	link.Set(badlink.Faults{Delay: 600 * time.Millisecond})
	repeatedly(t, time.Millisecond, func(ctx context.Context) {
		if issued, err := store.Create(ctx, keystore.Spec{Name: "n"}); err == nil {
			_ = store.Revoke(ctx, issued.Key.ID, "")
		}
	})
	return store
}

// revokedInUse has a client that has missed the revocation of its key, among good calls.
func revokedInUse(t *testing.T) *keystore.Store {
	store := open(t, nil)
	id, text := issue(t, store, keystore.Spec{})
	_, good := issue(t, store, keystore.Spec{})
	require.NoError(t, store.Revoke(t.Context(), id, ""))
	use(t, store, text)
	use(t, store, good)
	return store
}

// fromAWrongNetwork has a client whose key does not permit its address, among good calls.
func fromAWrongNetwork(t *testing.T) *keystore.Store {
	store := open(t, nil)
	_, text := issue(t, store, keystore.Spec{
		AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	_, good := issue(t, store, keystore.Spec{})
	repeatedly(t, 20*time.Millisecond, func(ctx context.Context) {
		ctx = keystore.WithClientAddr(ctx, netip.MustParseAddr("192.0.2.1"))
		_, _ = store.Verify(ctx, text)
	})
	use(t, store, good)
	return store
}

// unknownKeys has clients whose keys another store has made: as after a deployment with an empty
// volume.
func unknownKeys(t *testing.T) *keystore.Store {
	store := open(t, nil)
	_, text := issue(t, keystoretest.New(t, nil), keystore.Spec{})
	use(t, store, text)
	return store
}

// withASmallCache has more keys in use than its cache can hold.
func withASmallCache(t *testing.T) *keystore.Store {
	store := open(t, &keystore.Options{CacheSize: 20})
	var texts []string
	for range 100 {
		_, text := issue(t, store, keystore.Spec{})
		texts = append(texts, text)
	}
	next := 0
	repeatedly(t, 5*time.Millisecond, func(ctx context.Context) {
		_, _ = store.Verify(ctx, texts[next%len(texts)])
		next++
	})
	return store
}

func withExpiringKeys(t *testing.T) *keystore.Store {
	store := open(t, nil)
	_, text := issue(t, store, keystore.Spec{ExpiresAt: time.Now().Add(48 * time.Hour)})
	use(t, store, text)
	return store
}
