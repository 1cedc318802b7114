// Package postgres is the engine of servers that share their keys in PostgreSQL.
package postgres

import (
	"context"
	"errors"
	"flag"
	"fmt"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// An Engine says how to reach PostgreSQL, and where the keys are. An Engine is a server.Engine.
type Engine struct {
	url, schema string
}

// Name returns the name for the flag -engine.
func (e *Engine) Name() string { return "postgres" }

// AddFlags adds the flags of the engine.
func (e *Engine) AddFlags(flags *flag.FlagSet) {
	flags.StringVar(&e.url, "postgres", "", "connection string of PostgreSQL, which names the "+
		"primary and its standbys; the password belongs into PGPASSFILE")
	flags.StringVar(&e.schema, "schema", "apikeys", "schema of the keys in PostgreSQL")
}

// Open connects to PostgreSQL.
func (e *Engine) Open(ctx context.Context) (backend.Backend, func() error, error) {
	if e.url == "" {
		return nil, nil, errors.New("-postgres must be a connection string: see -help")
	}
	pool, err := pgxpool.New(ctx, e.url)
	if err != nil {
		return nil, nil, fmt.Errorf("-postgres: %w", err) // pgx leaves passwords out
	}
	b, err := pgstore.Open(ctx, pool, e.schema, nil)
	if err != nil {
		pool.Close()
		return nil, nil, err
	}
	return b, func() error { pool.Close(); return nil }, nil
}
