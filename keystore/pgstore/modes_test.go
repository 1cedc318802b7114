package pgstore_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The caller's configuration of the pool may choose how pgx runs a statement, and so whether the
// server sends the rows in the binary format or as text.
func TestWaysToRunAStatement(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	for _, mode := range []string{
		"cache_statement", "cache_describe", "describe_exec", "exec", "simple_protocol",
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			b := open(t, newPool(t, server.URL("default_query_exec_mode", mode)), newSchema(), alone)
			ctx := within(t, patience)
			all := []byte{0, 1, '\'', '\\', 0x80, 0xff}
			require.NoError(t, b.Apply(ctx, backend.Change{Key: all, Value: all},
				backend.Change{Key: []byte("empty")},
				backend.Change{Key: []byte("high"), Value: all, Revision: 1<<64 - 2}))
			for range 2 { // the second time, the log shows enough
				e, err := b.Get(ctx, all)
				require.NoError(t, err)
				require.Equal(t, backend.Entry{Key: all, Value: all, Revision: 1}, e)
				e, err = b.Get(ctx, []byte("empty"))
				require.NoError(t, err)
				require.Empty(t, e.Value)
				e, err = b.Get(ctx, []byte("high"))
				require.NoError(t, err)
				require.Equal(t, uint64(1<<64-2), e.Revision)
				_, err = b.Get(ctx, []byte("missing"))
				require.ErrorIs(t, err, backend.ErrNotFound)
			}
			found, err := b.GetAll(ctx, [][]byte{all, []byte("missing")})
			require.NoError(t, err)
			require.Equal(t, []backend.Entry{{Key: all, Value: all, Revision: 1}, {}}, found)
			n := 0
			for _, err := range b.Scan(context.Background(), nil, nil) {
				require.NoError(t, err)
				n++
			}
			require.Equal(t, 3, n)
		})
	}
}
