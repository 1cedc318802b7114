package pgstore_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// inDatabase returns the connection string for another database of a server.
func inDatabase(server *pglab.Server, name string) string {
	return strings.Replace(server.URL(), "/postgres?", "/"+name+"?", 1)
}

// A database may have any encoding, and settings that the store does not need.
func TestSettingsOfTheDatabase(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	for name, set := range map[string][2]string{
		"SQL_ASCII":          {"encoding 'SQL_ASCII'"},
		"LATIN1":             {"encoding 'LATIN1'"},
		"client of LATIN1":   {"", "client_encoding = 'LATIN1'"},
		"strings":            {"", "standard_conforming_strings = off"},
		"serializable":       {"", "default_transaction_isolation = 'serializable'"},
		"repeatable read":    {"", "default_transaction_isolation = 'repeatable read'"},
		"deferrable":         {"", "default_transaction_deferrable = on"},
		"bytes":              {"", "bytea_output = 'escape'"},
		"search path":        {"", "search_path = ''"},
		"names of variables": {"", "plpgsql.variable_conflict = 'use_variable'"},
		"strict plpgsql":     {"", "plpgsql.extra_errors = 'all'"},
	} {
		t.Run(name, func(t *testing.T) {
			database := "d" + newSchema()
			server.Exec(t, "create database "+database+" template template0 "+set[0])
			if set[1] != "" {
				server.Exec(t, "alter database "+database+" set "+set[1])
			}
			for _, schema := range []string{"apikeys", `a'\b`, "é"} {
				b := open(t, newPool(t, inDatabase(server, database)), schema, alone)
				remotetest.UseEachMethod(t, b)
				ctx := within(t, patience)
				all := []byte{0, 1, '\'', '\\', 0x80, 0xff}
				require.NoError(t, b.Apply(ctx, backend.Change{Key: all, Value: all}))
				require.ErrorIs(t, b.Apply(ctx, backend.Change{Key: all}), backend.ErrConflict)
				e, err := b.Get(ctx, all)
				require.NoError(t, err)
				require.Equal(t, backend.Entry{Key: all, Value: all, Revision: 1}, e)
			}
		})
	}
}
