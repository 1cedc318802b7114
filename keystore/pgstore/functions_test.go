package pgstore_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
)

// A role that may make functions in a schema of the search path cannot replace a function that the
// statements use.
func TestFunctionsOfOtherRoles(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	server.Exec(t, "create role stranger login; grant create on schema public to stranger")
	pool := newPool(t, server.URL())
	b := open(t, pool, "apikeys", alone)
	ctx := within(t, patience)
	stranger, err := pgxpool.ParseConfig(server.URL())
	require.NoError(t, err)
	stranger.ConnConfig.User = "stranger"
	conn, err := pgx.ConnectConfig(ctx, stranger.ConnConfig)
	require.NoError(t, err)
	defer conn.Close(context.Background())
	for _, f := range []string{
		"unnest(bytea[]) returns setof bytea", "min(bigint) returns bigint",
		"unnest(bytea[], integer[]) returns setof bytea", "current_setting(varchar) returns text",
		"pg_logical_emit_message(boolean, varchar, varchar) returns pg_lsn",
		"set_config(text, varchar, boolean) returns text",
		"has_table_privilege(varchar, varchar) returns boolean",
		"has_function_privilege(oid, varchar) returns boolean",
	} {
		_, err := conn.Exec(ctx, "create function "+f+" language plpgsql as "+
			"'begin raise exception ''a function of another role runs''; end'")
		require.NoError(t, err)
	}
	pool.Reset()
	require.NoError(t, put(ctx, b, "a", 0))
	found, err := b.GetAll(ctx, [][]byte{[]byte("a"), []byte("missing")})
	require.NoError(t, err)
	require.Equal(t, []uint64{1, 0}, revisions(found))
	remotetest.UseEachMethod(t, b)
	remotetest.UseEachMethod(t, open(t, pool, "apikeys", alone))
	remotetest.UseEachMethod(t, open(t, pool, "new", alone))
}
