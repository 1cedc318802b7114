package etcdstore

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// scanned is what a scan of some keys in ascending order costs an etcd.
type scanned struct{ requests, counted int }

// scanParts reads the keys from start to end in parts, and answers each request as etcd does.
func scanParts(t *testing.T, keys []string, start, end string) (cost scanned) {
	t.Helper()
	first, _ := slices.BinarySearch(keys, start)
	last, _ := slices.BinarySearch(keys, end)
	var found []string
	for p := (part{start, end}); p.from < end; {
		require.LessOrEqual(t, p.to, end)
		from, _ := slices.BinarySearch(keys, p.from)
		to, _ := slices.BinarySearch(keys, p.to)
		r := &clientv3.GetResponse{Count: int64(to - from), More: to-from > pageEntries}
		for _, key := range keys[from:min(to, from+pageEntries)] {
			r.Kvs = append(r.Kvs, &mvccpb.KeyValue{Key: []byte(key)})
			found = append(found, key)
		}
		cost.requests++
		cost.counted += to - from
		next := p.next(r, end)
		require.Less(t, p.from, next.from)
		p = next
	}
	require.True(t, slices.Equal(keys[first:last], found), "%d keys of %d", len(found), last-first)
	return cost
}

// A scan reads each entry once. etcd counts the entries of the range once for the first request,
// and then a small number of times: without parts, etcd would count each entry once for each page
// before it.
func TestParts(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	id := func(at time.Time) string { // as a UUIDv7
		key := binary.BigEndian.AppendUint64([]byte("/prefix/\x00k"), uint64(at.UnixMilli())<<16)
		key = key[:len(key)-2]
		for range 10 {
			key = append(key, byte(random.Uint32()))
		}
		return string(key)
	}
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	shapes := map[string]func(n int) string{
		"even": func(n int) string { return id(begin.Add(time.Duration(n) * time.Minute)) },
		"bursts": func(n int) string {
			return id(begin.Add(time.Duration(n/3000)*24*time.Hour +
				time.Duration(n%3000)*time.Millisecond))
		},
		"random":  func(int) string { return id(time.UnixMilli(random.Int64N(1 << 47))) },
		"spaces":  func(n int) string { return string(byte('e'+n%20)) + id(begin) },
		"numbers": func(n int) string { return fmt.Sprintf("/prefix/\x00%d", n) },
	}
	const n = 50_000
	for name, shape := range shapes {
		t.Run(name, func(t *testing.T) {
			var keys []string
			for i := range n {
				keys = append(keys, shape(i))
			}
			slices.Sort(keys)
			keys = slices.Compact(keys)
			cost := scanParts(t, keys, "", "\xff")
			t.Logf("%+v", cost)
			require.Less(t, cost.counted, 7*n)
			require.Less(t, cost.requests, 8*n/pageEntries)
			from, to := keys[random.IntN(n/2)], keys[n/2+random.IntN(n/2)]
			scanParts(t, keys, from, to)
			scanParts(t, keys, to, to+"\x00")
			scanParts(t, nil, "", "\xff")
		})
	}
}

// Keys that differ only by zeros at the end are the same number.
func TestPartsOfZeros(t *testing.T) {
	var keys []string
	zeros := "k"
	for range 1000 {
		keys = append(keys, zeros)
		zeros += "\x00"
	}
	scanParts(t, keys, "", "\xff")
	scanParts(t, keys, keys[10], keys[900])
}

func FuzzParts(f *testing.F) {
	f.Add([]byte("a\x00b"), []byte("a\x00"), []byte("c"), byte(3))
	f.Fuzz(func(t *testing.T, seed, start, end []byte, size byte) {
		var keys []string
		for rest := seed; len(rest) > 0; {
			n := min(int(size%5)+1, len(rest))
			for i := range 300 / (int(size) + 1) {
				keys = append(keys, string(append(rest[:n:n], byte(i))))
			}
			keys, rest = append(keys, string(rest[:n])), rest[n:]
		}
		slices.Sort(keys)
		keys = slices.Compact(keys)
		if string(start) < string(end) {
			scanParts(t, keys, string(start), string(end))
		}
	})
}
