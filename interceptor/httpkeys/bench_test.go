package httpkeys_test

import (
	"crypto/sha256"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/grpc-api-key/grpc-api-key/interceptor/httpkeys"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

// constantMap is the middleware that many write by hand: a map of digests, which never changes.
func constantMap(token string, next http.Handler) http.Handler {
	keys := map[[sha256.Size]byte]bool{sha256.Sum256([]byte("Bearer " + token)): true}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !keys[sha256.Sum256([]byte(r.Header.Get("Authorization")))] {
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
}

var hello = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
	_, _ = w.Write([]byte("hello"))
})

// BenchmarkWrap measures the middleware alone, without a connection.
func BenchmarkWrap(b *testing.B) {
	store := keystoretest.New(b, nil)
	_, token := issue(b, store, keystore.Spec{Scopes: []string{"orders:read"}})
	for _, bm := range []struct {
		name    string
		handler http.Handler
	}{
		{"bare", hello},
		{"constant map", constantMap(token, hello)},
		{"Wrap", newAuth(b, store).Wrap(hello)},
		{"Wrap with a rule", newAuth(b, store,
			httpkeys.Require("GET /orders/{id}", "orders:read")).Wrap(hello)},
	} {
		b.Run(bm.name, func(b *testing.B) {
			r := request(b, "GET", "http://localhost/orders/7", token, http.NoBody)
			w := &discard{header: http.Header{}}
			b.ReportAllocs()
			for b.Loop() {
				bm.handler.ServeHTTP(w, r)
			}
		})
	}
}

type discard struct{ header http.Header }

func (d *discard) Header() http.Header         { return d.header }
func (d *discard) Write(p []byte) (int, error) { return len(p), nil }
func (d *discard) WriteHeader(status int) {
	if status != http.StatusOK {
		panic(status)
	}
}

// BenchmarkWrapTurns alternates between requests over a socket to the bare handler, to the handler
// behind a constant map, and to the handler behind Wrap. The metrics are the ratios of the medians.
func BenchmarkWrapTurns(b *testing.B) {
	store := keystoretest.New(b, nil)
	_, token := issue(b, store, keystore.Spec{})
	handlers := []http.Handler{hello, constantMap(token, hello), newAuth(b, store).Wrap(hello)}
	rounds := make([]func() time.Duration, len(handlers))
	for i, h := range handlers {
		url, client := serve(b, false, h)
		rounds[i] = func() time.Duration {
			begin := time.Now()
			for range 50 {
				if status, _, _ := do(b, client, request(b, "GET", url, token, nil)); status != 200 {
					b.Fatal(status)
				}
			}
			return time.Since(begin) / 50
		}
	}
	times := make([][]time.Duration, len(handlers))
	for b.Loop() {
		for i, round := range rounds {
			times[i] = append(times[i], round())
		}
	}
	median := func(i int) float64 {
		slices.Sort(times[i])
		return float64(times[i][len(times[i])/2])
	}
	b.ReportMetric(median(0), "ns/bare")
	b.ReportMetric(median(2)/median(0), "x-bare")
	b.ReportMetric(median(2)/median(1), "x-map")
}
