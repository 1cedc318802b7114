package admin_test

import (
	"bytes"
	"context"
	"flag"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin/adminpb"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/keystoretest"
)

var manyKeys = flag.Int("keys", 10000, "how many keys the benchmarks make")

// createMany creates keys in many goroutines, so that many keys share one write.
func createMany(t testing.TB, store *keystore.Store, n int, spec keystore.Spec) {
	t.Helper()
	spec.Name = "many"
	var all sync.WaitGroup
	const creators = 128
	for i := range creators {
		all.Go(func() {
			for range (n + i) / creators { // together n
				if _, err := store.Create(context.Background(), spec); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	require.False(t, t.Failed())
}

// heap returns the size of the objects in use, in bytes.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// The keys of a page are all that a list holds, in the server and in the client.
func TestListInBoundedMemory(t *testing.T) {
	needsDirectory(t)
	store := keystoretest.Open(t, t.TempDir(), nil)
	const all, metadata = 10000, 4000
	createMany(t, store, all,
		keystore.Spec{Metadata: map[string]string{"a": strings.Repeat("x", metadata)}})
	c := newRig(t, store).local(t)
	list := func(peak *int64) (keys int) {
		pages := 0
		listKeys(t, c, &adminpb.ListKeysRequest{PageSize: 500}, func(p *adminpb.ListKeysResponse) {
			keys += len(p.Keys)
			if pages++; pages%8 == 0 {
				*peak = max(*peak, heap())
			}
		})
		return keys
	}
	var warm, peak int64
	list(&warm)
	before := heap()
	require.Equal(t, all, list(&peak))
	t.Logf("the heap grew by %d KB at most; the keys take %d KB", (peak-before)>>10,
		all*metadata>>10)
	require.Less(t, peak-before, int64(all*metadata/4))
}

// A page in the middle and a page at the end read no more of the storage than the first page.
func TestEachPageReadsTheSame(t *testing.T) {
	gate := newGate()
	store, err := keystore.New(gate, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	const all, size = 5000, 50
	createMany(t, store, all, keystore.Spec{})
	c := newRig(t, store).local(t)
	for _, newest := range []bool{false, true} {
		var reads []int64
		last := gate.entries.Load()
		r := &adminpb.ListKeysRequest{PageSize: size, NewestFirst: newest}
		listKeys(t, c, r, func(*adminpb.ListKeysResponse) {
			now := gate.entries.Load()
			reads, last = append(reads, now-last), now
		})
		require.Len(t, reads, all/size)
		require.GreaterOrEqual(t, reads[0], int64(size))
		for i, n := range reads {
			require.LessOrEqual(t, n, reads[0]+2, "page %d", i)
		}
	}
}

// BenchmarkPage compares a page of 50 keys at the end with a page at the beginning, in turns, and
// measures by how much the heap of server and client grows during a list of all keys. For a million
// keys: go test ./interceptor/admin -run '^$' -bench Page -keys 1000000
func BenchmarkPage(b *testing.B) {
	needsDirectory(b)
	store := keystoretest.Open(b, b.TempDir(), nil)
	createMany(b, store, *manyKeys, keystore.Spec{})
	c := newRig(b, store).local(b)
	const size = 50
	begin := &adminpb.ListKeysRequest{PageSize: size}
	end := &adminpb.ListKeysRequest{PageSize: size}
	pages, before, peak := 0, heap(), int64(0)
	listing := time.Now()
	r := &adminpb.ListKeysRequest{PageSize: 1000}
	listKeys(b, c, r, func(p *adminpb.ListKeysResponse) {
		if p.NextPageToken != "" {
			end.PageToken = p.NextPageToken // of another size, which is not part of the token
		}
		if pages++; pages%50 == 0 {
			peak = max(peak, heap()-before)
		}
	})
	listed := time.Since(listing)
	page := func(r *adminpb.ListKeysRequest) time.Duration {
		start := time.Now()
		p, err := c.ListKeys(b.Context(), r)
		if err != nil || len(p.Keys) != size {
			b.Fatal(len(p.GetKeys()), err)
		}
		return time.Since(start)
	}
	var first, last time.Duration
	for b.Loop() {
		first += page(begin)
		last += page(end)
	}
	b.ReportMetric(float64(first.Nanoseconds())/float64(b.N), "ns/first-page")
	b.ReportMetric(float64(last.Nanoseconds())/float64(b.N), "ns/last-page")
	b.ReportMetric(float64(last)/float64(first), "last/first")
	b.ReportMetric(listed.Seconds(), "s/list-of-all")
	b.ReportMetric(float64(peak)/(1<<20), "MB/list-of-all")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkBatchRevoke compares BatchRevokeKeys over the socket with Store.RevokeAll, in turns,
// each on a new store. The client is part of the process. For 100,000 keys:
//
//	go test ./interceptor/admin -run '^$' -bench BatchRevoke -benchtime 3x -keys 100000
func BenchmarkBatchRevoke(b *testing.B) {
	needsDirectory(b)
	source := keystoretest.Open(b, b.TempDir(), nil)
	createMany(b, source, *manyKeys, keystore.Spec{Owner: "acme"})
	var backup bytes.Buffer
	require.NoError(b, source.Backup(b.Context(), &backup))
	run := func(revoke func(*keystore.Store) int) time.Duration {
		store, err := keystore.Open(b.TempDir(), nil)
		require.NoError(b, err)
		defer store.Close()
		require.NoError(b, store.Restore(b.Context(), bytes.NewReader(backup.Bytes())))
		runtime.GC()
		start := time.Now()
		n := revoke(store)
		took := time.Since(start)
		require.Equal(b, *manyKeys, n)
		return took
	}
	query := keystore.Query{Owner: "acme"}
	direct := func(store *keystore.Store) int {
		n, err := store.RevokeAll(b.Context(), query, "left", nil)
		require.NoError(b, err)
		return n
	}
	batch := func(expected *int64) func(*keystore.Store) int {
		return func(store *keystore.Store) (n int) {
			stream, err := newRig(b, store).local(b).BatchRevokeKeys(b.Context(),
				&adminpb.BatchRevokeKeysRequest{Filter: &adminpb.Filter{Owner: query.Owner},
					Reason: "left", Expected: expected})
			require.NoError(b, err)
			for {
				m, err := stream.Recv()
				if err == io.EOF {
					return n
				}
				require.NoError(b, err)
				n += len(m.Keys)
			}
		}
	}
	var took [3]time.Duration
	for b.Loop() {
		for i, revoke := range []func(*keystore.Store) int{
			direct, batch(nil), batch(expect(int64(*manyKeys))),
		} {
			took[i] += run(revoke)
		}
	}
	b.ReportMetric(took[0].Seconds()/float64(b.N), "s/RevokeAll")
	b.ReportMetric(float64(took[1])/float64(took[0]), "BatchRevokeKeys/RevokeAll")
	b.ReportMetric(float64(took[2])/float64(took[0]), "with-expected/RevokeAll")
	b.ReportMetric(0, "ns/op")
}
