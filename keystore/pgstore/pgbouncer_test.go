package pgstore_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// A PgBouncer in session mode is between the stores and a primary with a synchronous standby. A
// revocation in one store is in force in the other, also after a crash of the primary.
func TestPgBouncerInSessionMode(t *testing.T) {
	t.Parallel()
	primary, _ := startPair(t)
	url := pglab.URL(primary.PgBouncer(t, "pool_mode = session", "default_pool_size = 60"))
	remotetest.UseEachMethod(t, open(t, newPool(t, url), "apikeys", nil))
	a := newStore(t, url, "apikeys", freshness, nil)
	b := newStore(t, url, "apikeys", freshness, nil)
	stores := []*keystore.Store{a, b}
	ctx := within(t, 3*patience)
	for range 2 {
		// After the crash, PgBouncer ends each connection with an error, and callers repeat.
		var leaked *keystore.Issued
		var err error
		require.Eventually(t, func() bool {
			leaked, err = a.Create(ctx, keystore.Spec{Name: "leaked"})
			return err == nil
		}, patience, time.Millisecond, "%v", err)
		var session *keystore.Session
		require.Eventually(t, func() bool {
			session, err = b.Bind(ctx, leaked.Secret.Reveal())
			return err == nil
		}, patience, time.Millisecond, "%v", err)
		defer session.Close()
		require.Eventually(t, func() bool {
			err = a.Revoke(ctx, leaked.Key.ID, "test")
			return err == nil
		}, patience, time.Millisecond, "%v", err)
		require.Error(t, session.Cause())
		requireRevoked(ctx, t, stores, leaked.Secret.Reveal())

		primary.Crash()
		require.NoError(t, primary.Start())
		requireRevoked(ctx, t, stores, leaked.Secret.Reveal())
		require.Eventually(t, func() bool {
			return a.Err() == nil && b.Err() == nil && a.Stats().Fresh && b.Stats().Fresh
		}, patience, time.Millisecond)
	}
}

// Open refuses a PgBouncer in another mode, and changes no setting of the connections that other
// programs use, however busy the other programs are.
func TestPgBouncerInOtherModes(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	for _, mode := range []string{"transaction", "statement"} {
		url := pglab.URL(server.PgBouncer(t, "pool_mode = "+mode, "default_pool_size = 20"))
		says := []string{"leads through a pooler, such as PgBouncer", "pool_mode = session",
			"without the pooler"}
		refused(t, newPool(t, url), "apikeys", alone, says...)
		others, stop := context.WithCancel(context.Background())
		var running sync.WaitGroup
		for range 4 {
			running.Go(func() {
				conn, err := pgx.Connect(others, url)
				for err == nil {
					_, err = conn.Exec(others, "select pg_sleep(random() / 500)",
						pgx.QueryExecModeSimpleProtocol)
				}
				if conn != nil {
					_ = conn.Close(context.Background())
				}
			})
		}
		for range 20 {
			refused(t, newPool(t, url), "apikeys", alone, says...)
		}
		stop()
		running.Wait()
		conn, err := pgx.Connect(within(t, patience), url)
		require.NoError(t, err)
		for range 20 {
			var level string
			require.NoError(t, conn.QueryRow(within(t, patience), "show client_min_messages",
				pgx.QueryExecModeSimpleProtocol).Scan(&level))
			require.Equal(t, "notice", level)
		}
		require.NoError(t, conn.Close(within(t, patience)))
	}
}

// A PgBouncer that has too few connections is named in the error.
func TestPgBouncerWithoutConnections(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	url := pglab.URL(server.PgBouncer(t, "pool_mode = session", "default_pool_size = 1"))
	_, err := pgstore.Open(within(t, patience), newPool(t, url), "apikeys", alone)
	require.ErrorContains(t, err, "raise default_pool_size")
}
