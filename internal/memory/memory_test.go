package memory

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// depth returns the length of the longest path from the root to a leaf.
func (t *tree) depth() int {
	if t == nil {
		return 0
	}
	return 1 + max(t.left.depth(), t.right.depth())
}

// The tree is shallow, whatever the order of the writes. So a call takes time proportional to the
// logarithm of the number of entries. The conformance suite of package backendtest tests the rest.
func TestTreeIsShallow(t *testing.T) {
	const entries = 10_000
	for name, order := range map[string]func(i int) int{
		"ascending":  func(i int) int { return i },
		"descending": func(i int) int { return entries - i },
		"random":     func(int) int { return rand.IntN(entries) },
	} {
		t.Run(name, func(t *testing.T) {
			var all *tree
			for i := range entries {
				all = all.with(backend.Entry{Key: fmt.Appendf(nil, "%09d", order(i))})
			}
			require.Less(t, all.depth(), 100, "2 ln 10,000 is 18")
			for i := range entries / 2 {
				all = all.without(fmt.Appendf(nil, "%09d", order(i)))
			}
			require.Less(t, all.depth(), 100)
		})
	}
}

// A second write of a key replaces the first entry.
func TestWriteReplacesNode(t *testing.T) {
	m := New().(*memory)
	for n := range uint64(100) {
		require.NoError(t,
			m.Apply(context.Background(), backend.Change{Key: []byte("k"), Expect: n}))
	}
	require.Equal(t, 1, m.all.depth())
	deletion := backend.Change{Key: []byte("k"), Expect: 100, Delete: true}
	require.NoError(t, m.Apply(context.Background(), deletion))
	require.Nil(t, m.all)
}

func BenchmarkScan(b *testing.B) {
	for _, entries := range []int{100, 10_000} {
		b.Run(fmt.Sprint(entries), func(b *testing.B) {
			m := New()
			for i := range entries {
				require.NoError(b,
					m.Apply(b.Context(), backend.Change{Key: fmt.Appendf(nil, "%09d", i)}))
			}
			for b.Loop() {
				for _, err := range m.Scan(b.Context(), nil, nil) {
					require.NoError(b, err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(entries),
				"ns/entry")
		})
	}
}
