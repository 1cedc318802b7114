package promkeys_test

import (
	"context"
	"fmt"
	"log"
	"net/http/httptest"
	"os"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/promkeys"
)

// A server registers the store and the refused calls, and serves /metrics.
func Example() {
	dir, err := os.MkdirTemp("", "keys")
	check(err)
	defer os.RemoveAll(dir)
	store, err := keystore.Open(dir, nil)
	check(err)
	defer store.Close()

	registry := prometheus.NewRegistry()
	collector, err := promkeys.NewCollector(store, nil)
	check(err)
	calls := promkeys.NewCalls()
	registry.MustRegister(collector, calls)
	auth, err := interceptor.New(store, interceptor.Observe(
		func(ctx context.Context, c interceptor.Call) {
			if !c.Ended {
				calls.Refused(ctx, c.Method, c.Refusal.Reason)
			}
		}))
	check(err)
	_ = auth.ServerOptions() // for grpc.NewServer
	metrics := promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true})

	_, err = store.Verify(context.Background(), "nonsense")
	fmt.Println(err)
	scrape := httptest.NewRecorder()
	metrics.ServeHTTP(scrape, httptest.NewRequest("GET", "/metrics", nil))
	for line := range strings.Lines(scrape.Body.String()) {
		if strings.HasPrefix(line, "apikeys_up") || strings.Contains(line, `"malformed"`) {
			fmt.Print(line)
		}
	}
	// Output:
	// API key denied: malformed
	// apikeys_refusals_total{reason="malformed"} 1
	// apikeys_up 1
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
