package promkeys_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

// A labelSet has all words that a label may have.
type labelSet struct {
	metric, label string
	words         []string
}

// storeReasons are the reasons of Verify and Bind.
var storeReasons = []string{"malformed", "unknown", "revoked", "expired", "disabled",
	"not_yet_valid", "network", "rate_limited", "credits_exhausted", "narrowed", "corrupt", "closed",
	"unavailable", "canceled", "deadline", "other"}

var allActions = []string{"create", "update", "rotate", "disable", "enable", "revoke", "rehash",
	"credits", "purge", "restore", "import"}

// closedSets has every label of this package, except grpc_method.
var closedSets = []labelSet{
	{"apikeys_lookups_total", "result", []string{"hit", "miss"}},
	{"apikeys_refusals_total", "reason", storeReasons},
	{"apikeys_calls_refused_total", "reason", append([]string{"missing", "scheme", "several",
		"insecure", "scope", "throttled", "no_rule", "twice"}, storeReasons...)},
	{"apikeys_changes_total", "action", allActions},
	{"apikeys_change_duration_seconds", "action", allActions[:8]},
	{"apikeys_failed_writes_total", "reason", []string{"full", "failed"}},
	{"apikeys_streams_ended_total", "cause", []string{"revoked", "expired", "disabled",
		"not_yet_valid", "narrowed", "closed", "unavailable"}},
	{"apikeys_keys", "state", []string{"active", "pending", "expired", "disabled", "revoked"}},
	{"apikeys_expiring_keys", "within", []string{"24h", "7d", "30d"}},
	{"apikeys_unused_keys", "since", []string{"30d", "90d"}},
}

// Whatever callers send, and whatever the names and owners of keys are, each label of each metric
// has a word of a small set.
func TestLabelsAreClosedSets(t *testing.T) {
	ctx := t.Context()
	store := keystoretest.New(t, nil)
	registry := register(t, store, &promkeys.Options{Inventory: time.Hour})
	calls := promkeys.NewCalls()
	require.NoError(t, registry.Register(calls))
	auth, err := interceptor.New(store,
		interceptor.Header("authorization", "Bearer"), interceptor.Header("x-api-key", ""),
		interceptor.Require("/grpc.health.v1.Health/List", "nobody"),
		interceptor.Require("/grpc.health.v1.Health/Watch", "nobody"), // or it would not return
		interceptor.Observe(func(ctx context.Context, c interceptor.Call) {
			if !c.Ended {
				calls.Refused(ctx, c.Method, c.Refusal.Reason)
			}
		}))
	require.NoError(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	server := grpc.NewServer(append(auth.ServerOptions(), grpc.WaitForHandlers(true),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return nil }))...)
	healthpb.RegisterHealthServer(server, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		require.NoError(t, <-served)
	})
	conn, err := grpc.NewClient(listener.Addr().String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })

	texts := []string{"", "nonsense", `"} 1` + "\u202e", "oil_"}
	for i, spec := range []keystore.Spec{
		{Name: `name"} 1`, Owner: "owner-of-the-test"},
		{Name: "revoked"}, {Name: "disabled"},
		{Name: "late", NotBefore: time.Now().Add(time.Hour)},
		{Name: "elsewhere", AllowedNetworks: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		{Name: "limited", RateLimit: keystore.RateLimit{PerSecond: 0.001, Burst: 1}},
	} {
		issued := keystoretest.MustCreate(t, store, spec)
		texts = append(texts, issued.Secret.Reveal(), issued.Key.ID)
		switch i {
		case 1:
			require.NoError(t, store.Revoke(ctx, issued.Key.ID, "reason-of-the-test"))
		case 2:
			require.NoError(t, store.Disable(ctx, issued.Key.ID, "reason-of-the-test"))
		}
	}
	methods := []string{"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List",
		"/grpc.health.v1.Health/Watch", "/method-of-the-test/" + texts[4], "/a/b"}
	// Each text goes to each method in each way, in a random order, so each refusal occurs.
	const ways = 6
	for _, i := range rand.Perm(len(texts) * len(methods) * ways) {
		text, method := texts[i%len(texts)], methods[i/len(texts)%len(methods)]
		md := []string{"authorization", "Bearer " + text}
		way := i / len(texts) / len(methods)
		switch way {
		case 0:
			md = nil
		case 1:
			md = []string{"authorization", "Basic " + text}
		case 2:
			md = append(md, "x-api-key", text)
		}
		call, cancel := context.WithTimeout(metadata.AppendToOutgoingContext(ctx, md...),
			time.Minute)
		if way == 3 {
			cancel()
		}
		_ = conn.Invoke(call, method, new(healthpb.HealthCheckRequest),
			new(healthpb.HealthCheckResponse))
		cancel()
	}
	require.Eventually(t, func() bool {
		_, ok := values(t, registry)["apikeys_keys active"]
		return ok
	}, time.Minute, time.Millisecond)

	families, err := registry.Gather()
	require.NoError(t, err)
	series, reasons := 0, make(map[string]bool)
	for _, f := range families {
		for _, m := range f.Metric {
			series++
			for _, l := range m.Label {
				if l.GetName() == "grpc_method" {
					require.Contains(t, append(methods[:3:3], interceptor.OtherMethod),
						l.GetValue())
					continue
				}
				i := slices.IndexFunc(closedSets, func(s labelSet) bool {
					return s.metric == f.GetName() && s.label == l.GetName()
				})
				require.GreaterOrEqual(t, i, 0, "%s has the label %s", f.GetName(), l.GetName())
				require.Contains(t, closedSets[i].words, l.GetValue(), f.GetName())
				if l.GetName() == "reason" && m.GetCounter().GetValue() > 0 {
					reasons[l.GetValue()] = true
				}
			}
		}
	}
	for _, reason := range []string{"missing", "scheme", "several", "scope", "malformed", "revoked",
		"disabled", "not_yet_valid", "network", "rate_limited"} {
		require.True(t, reasons[reason], "no call was refused because of %s", reason)
	}
	require.Less(t, series, 250, "the number of series is bounded")
	for _, part := range []string{"of-the-test", `name"`, "127.0.0.1", "10.0.0", "nonsense"} {
		require.NotContains(t, fmt.Sprint(families), part)
	}
}
