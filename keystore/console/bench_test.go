package console_test

import (
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/console"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

var keys = flag.Int("keys", 5000, "number of keys in the store of BenchmarkPages")

// asOperator returns a console for an operator with keys:admin, without a login.
func asOperator(tb testing.TB, store *keystore.Store) *console.Console {
	c, err := console.New(store, console.WithUser(func(*http.Request) (string, []string, bool) {
		return "operator", []string{"keys:admin"}, true
	}))
	require.NoError(tb, err)
	tb.Cleanup(c.Close)
	return c
}

// BenchmarkPages shows each page of a store with many keys, and reports the median and the longest
// time, and the size. The goals are 50 ms and 100 KB with a million keys:
//
//	go test ./keystore/console -run '^$' -bench Pages -benchtime 50x -keys 1000000 -timeout 0
func BenchmarkPages(b *testing.B) {
	store := keystoretest.Open(b, b.TempDir(), nil)
	last := fillStore(b, store, *keys)
	c := asOperator(b, store)
	get := func(path string) int {
		w := httptest.NewRecorder()
		c.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/"+path, nil))
		require.Equal(b, http.StatusOK, w.Code, path)
		return w.Body.Len()
	}
	paths := append(pages(last)[:len(pages(last))-1], // no login
		"keys?owner=owner+7", "keys?text=nothing+has+this+name", "keys?state=revoked",
		"keys?unused=90", "keys?scope=scope:7", "audit?actor=unknown", "audit?action=purge")
	for _, path := range paths {
		name := path
		if path == "" {
			name = "overview"
		}
		b.Run(name, func(b *testing.B) {
			size := 0
			var took []time.Duration
			for b.Loop() {
				begin := time.Now()
				size = max(size, get(path))
				took = append(took, time.Since(begin))
			}
			slices.Sort(took)
			ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
			b.ReportMetric(ms(took[len(took)/2]), "ms/median")
			b.ReportMetric(ms(took[len(took)-1]), "ms/max")
			b.ReportMetric(float64(size)/1024, "KB/page")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// fillStore creates n keys, and returns the ID of one of them.
func fillStore(tb testing.TB, store *keystore.Store, n int) (last string) {
	var creators sync.WaitGroup
	const together = 256
	ids := make([]string, together)
	for g := range together {
		creators.Go(func() {
			for i := g; i < n; i += together {
				issued, err := store.Create(tb.Context(), keystore.Spec{
					Name:  fmt.Sprintf("key number %d", i),
					Owner: fmt.Sprintf("owner %d", i%(n/100+1)), Scopes: []string{
						fmt.Sprintf("scope:%d", i%1000), "orders:read"}})
				if err != nil {
					tb.Error(err)
					return
				}
				ids[g] = issued.Key.ID
			}
		})
	}
	creators.Wait()
	return ids[0]
}

// A hundred operators, each with a login, an open stream and the last page, take little memory.
func TestMemoryOfAHundredOperators(t *testing.T) {
	if raceEnabled {
		t.Skip("NOT RUN: the race detector needs several times the memory of the console. CI also runs " +
			"the test without the race detector.")
	}
	store := keystoretest.New(t, nil)
	c, err := console.New(store)
	require.NoError(t, err)
	defer c.Close()
	fillStore(t, store, 200)
	var secrets []string
	for range 100 {
		issued := keystoretest.MustCreate(t, store, keystore.Spec{Scopes: []string{"keys:admin"}})
		secrets = append(secrets, issued.Secret.Reveal())
	}
	used := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	before := used()
	ctx, cancel := context.WithCancel(t.Context())
	var pages, streams sync.WaitGroup
	for _, secret := range secrets {
		send := func(ctx context.Context, method, path string, cookie *http.Cookie) *http.Response {
			req := httptest.NewRequestWithContext(ctx, method, "https://console.example/"+path, nil)
			req.PostForm = map[string][]string{"key": {secret}}
			if cookie != nil {
				req.AddCookie(cookie)
			}
			w := httptest.NewRecorder()
			w.Body = nil // the browser has the page, and not the server
			c.ServeHTTP(w, req)
			return w.Result()
		}
		cookie := send(ctx, http.MethodPost, "login", nil).Cookies()[0]
		streams.Go(func() { send(ctx, http.MethodGet, "audit/tail?after=9000000000000000000", cookie) })
		for _, path := range []string{"", "keys", "audit"} {
			pages.Go(func() { send(ctx, http.MethodGet, path, cookie) })
		}
	}
	pages.Wait()
	require.Eventually(t, func() bool { return console.Streams(c) == 100 },
		20*time.Second, time.Millisecond)
	after := used()
	t.Logf("100 operators take %d KB", (after-before)/1024)
	require.LessOrEqual(t, after-before, int64(16<<20))
	cancel()
	streams.Wait()
}
