package peers_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/peers"
)

// The tables do what the report says: they create, revoke, list and get keys.
func TestTables(t *testing.T) {
	const connections = 4
	durable := []string{peers.BareBadger, peers.RedisAlways, peers.PostgreSQLTable}
	for _, indexed := range []bool{false, true} {
		names := durable
		if indexed {
			names = durable[1:]
		}
		started, skipped, err := peers.StartTables(
			t.Context(), t.TempDir(), connections, indexed, names...)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, peers.CloseTables(started)) })
		require.Len(t, started, len(names)-len(skipped))
		for _, s := range skipped {
			t.Logf("SKIPPED: %s: %s", s.Name, s.Why)
		}
		for _, table := range started {
			t.Run(fmt.Sprintf("%s, indexed %v", table.Name, indexed), func(t *testing.T) {
				ctx := t.Context()
				var ids []string
				for range 3 {
					id, err := table.Create(ctx, "ours")
					require.NoError(t, err)
					require.Len(t, id, 26)
					ids = append(ids, id)
				}
				require.NoError(t, table.Revoke(ctx, ids[0]))
				if table.CPU != nil {
					spent, err := table.CPU()
					require.NoError(t, err)
					require.Positive(t, spent)
				}
				if !indexed {
					return
				}
				owner := func(i int) string { return fmt.Sprint(i % 10) }
				filled, err := table.Fill(ctx, 100, owner)
				require.NoError(t, err)
				require.Len(t, filled, 100)
				require.NoError(t, table.Get(ctx, filled[50]))
				require.Error(t, table.Get(ctx, "no such key"))
				n, err := table.List(ctx, "7")
				require.NoError(t, err)
				require.Equal(t, 10, n)
				n, err = table.RevokeOwner(ctx, "7")
				require.NoError(t, err)
				require.Equal(t, 10, n)
			})
		}
	}
}
