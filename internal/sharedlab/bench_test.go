package sharedlab

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// BenchmarkRevoke measures a Revoke that is in force in three stores, and one commit of the same
// etcd, in turns. The ratio is the one of the medians.
func BenchmarkRevoke(b *testing.B) {
	r := startReplicas(b)
	ctx := context.Background()
	plain := open(b, r.lab.Client(b), newPrefix())
	var commits, revokes []time.Duration
	for n := range max(b.N, 1) {
		issued, err := r.stores[n%3].Create(ctx, keystore.Spec{Name: "bench"})
		require.NoError(b, err)
		for _, s := range r.stores {
			_, err := s.Verify(ctx, issued.Secret.Reveal())
			require.NoError(b, err)
		}
		start := time.Now()
		require.NoError(b, plain.Apply(ctx, backend.Change{Key: fmt.Append(nil, n)}))
		commits = append(commits, time.Since(start))
		start = time.Now()
		require.NoError(b, r.stores[(n+1)%3].Revoke(ctx, issued.Key.ID, "bench"))
		revokes = append(revokes, time.Since(start))
	}
	slices.Sort(commits)
	slices.Sort(revokes)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	commit, revoke := commits[len(commits)/2], revokes[len(revokes)/2]
	b.ReportMetric(ms(commit), "commit-p50-ms")
	b.ReportMetric(ms(revoke), "revoke-p50-ms")
	b.ReportMetric(ms(revokes[len(revokes)*99/100]), "revoke-p99-ms")
	b.ReportMetric(float64(revoke)/float64(commit), "revoke/commit")
}
