package pgstore_test

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// A store on a primary and a standby, with TLS.
func Example() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	pool, err := pgxpool.New(ctx, "postgres://app@pg-0,pg-1/app"+
		"?target_session_attrs=read-write&sslmode=verify-full&sslrootcert=ca.crt")
	if err != nil {
		slog.Error("make the pool", "error", err)
		return
	}
	defer pool.Close()

	b, err := pgstore.Open(ctx, pool, "apikeys", nil)
	if err != nil {
		slog.Error("open the store in PostgreSQL", "error", err)
		return
	}
	store, err := keystore.New(b, nil)
	if err != nil {
		slog.Error("open the key store", "error", err)
		return
	}
	defer store.Close() // closes b too

	issued, err := store.Create(ctx, keystore.Spec{Name: "ci"})
	if err != nil {
		slog.Error("create a key", "error", err)
		return
	}
	fmt.Println(issued.Secret.Reveal())
}
