package pgstore_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/pglab"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/pgstore"
)

// refused requires that Open returns an error that says something, and does not wait for the end of
// the context.
func refused(t *testing.T, pool *pgxpool.Pool, schema string, o *pgstore.Options, says ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := pgstore.Open(ctx, pool, schema, o)
	require.Error(t, err)
	require.Nil(t, b)
	require.NoError(t, ctx.Err(), "Open waited although waiting could not help: %v", err)
	for _, text := range says {
		require.ErrorContains(t, err, text)
	}
	require.True(t, strings.HasPrefix(err.Error(), "pgstore: open: "), err.Error())
}

// The name of a schema may be any name, and is never SQL.
func TestSchemaNames(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pool := newPool(t, server.URL())
	names := []string{
		"apikeys", "API keys", "select", "ключи", `a"b`, `a'b`, `a\b`, `a\'b`, "a$b", "@schema@",
		`x"; drop schema apikeys cascade; --`, `x'; drop schema apikeys cascade; --`,
		`$migrate$; drop schema apikeys cascade; --`, `$apply$; drop schema apikeys cascade; --`,
		`$migrate$ $migrate1$`, strings.Repeat("n", 63),
	}
	for _, name := range names {
		remotetest.UseEachMethod(t, open(t, pool, name, alone))
	}
	remotetest.UseEachMethod(t, open(t, pool, names[0], alone))
	for _, name := range names {
		b := open(t, pool, name, alone)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		require.NoError(t, b.Apply(ctx, backend.Change{Key: []byte("own"), Value: []byte(name)}))
		cancel()
	}
	for _, name := range names {
		got := server.Exec(t, fmt.Sprintf("select string_agg(encode(key, 'escape'), ' ') from %s.entry",
			pgx.Identifier{name}.Sanitize()))
		require.Equal(t, "own", got, name)
	}
	for name, says := range map[string]string{
		"": "the schema is empty", strings.Repeat("n", 64): "64 bytes", "a\x00b": "NUL byte",
		"\xff": "not UTF-8", "pg_keys": "belong to PostgreSQL",
	} {
		refused(t, pool, name, alone, says)
		_, err := pgstore.Schema(name)
		require.ErrorContains(t, err, says)
	}
	refused(t, nil, "apikeys", alone, "pgxpool.New")
}

// The role of an application has the rights that the package documentation names, and no others.
func TestLeastRights(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	server.Exec(t, "create role app login; create role stranger login")
	as := func(role string) *pgxpool.Pool {
		return newPool(t, strings.Replace(server.URL(), "postgres@", role+"@", 1))
	}
	app := as("app")
	refused(t, app, "apikeys", alone, `pgstore.Schema("apikeys")`, "owner of the database")
	refused(t, app, "apikeys", alone, "grant select on all tables")

	sql, err := pgstore.Schema("apikeys")
	require.NoError(t, err)
	for range 2 { // the second time, the tables are there
		server.Exec(t, sql)
	}
	grants := documentedGrants(t)
	refused(t, app, "apikeys", alone, "too few rights",
		`grant usage on schema "apikeys" to ROLE`)
	for i, grant := range grants {
		server.Exec(t, grant)
		if i+1 < len(grants) {
			refused(t, app, "apikeys", alone, "too few rights", "grant execute on all functions")
		}
	}
	b := open(t, app, "apikeys", alone)
	remotetest.UseEachMethod(t, b)
	refused(t, as("stranger"), "apikeys", alone, "too few rights")

	// The role changes the tables in no other way than by the function.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, statement := range []string{
		"insert into apikeys.entry values ('k', 'v', 1)", "delete from apikeys.entry",
		"update apikeys.log set changes = ''", "delete from apikeys.log",
		"update apikeys.head set version = 7", "create table apikeys.more ()",
		"drop table apikeys.entry", "truncate apikeys.log",
	} {
		_, err := app.Exec(ctx, statement)
		require.ErrorContains(t, err, "42501", statement)
	}

	// The rights are taken away while the store is open.
	server.Exec(t, "revoke usage on schema apikeys from app")
	_, get := b.Get(ctx, []byte("k"))
	feed := error(nil)
	for _, err := range b.Feed(ctx, nil, nil, 0) {
		feed = err
	}
	for _, err := range []error{get, feed, b.Apply(ctx, backend.Change{Key: []byte("k")})} {
		require.ErrorContains(t, err, "grant usage on schema")
	}
}

// Open refuses a role from which row-level security hides all rows. To such a role, each key would
// be unknown, and a RevokeAll would find no key.
func TestRowLevelSecurity(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	server.Exec(t, "create role app login")
	app := newPool(t, strings.Replace(server.URL(), "postgres@", "app@", 1))
	owner := open(t, newPool(t, server.URL()), "apikeys", alone)
	for _, grant := range documentedGrants(t) {
		server.Exec(t, grant)
	}
	ctx := within(t, patience)
	require.NoError(t, put(ctx, owner, "a", 0))
	for _, table := range []string{"entry", "log", "head"} {
		server.Exec(t, "alter table apikeys."+table+" enable row level security")
		refused(t, app, "apikeys", alone, "row-level security")
		server.Exec(t, "alter table apikeys."+table+" disable row level security")
	}
	server.Exec(t, "alter table apikeys.entry enable row level security; "+
		"create policy app on apikeys.entry for select to app using (true)")
	b := open(t, app, "apikeys", alone)
	_, err := b.Get(ctx, []byte("a"))
	require.NoError(t, err)
	remotetest.UseEachMethod(t, b)
}

// documentedGrants returns the statements in the package documentation.
func documentedGrants(t *testing.T) (grants []string) {
	text, err := os.ReadFile("doc.go")
	require.NoError(t, err)
	for line := range strings.Lines(string(text)) {
		if grant, ok := strings.CutPrefix(line, "//\tgrant "); ok {
			grants = append(grants, "grant "+strings.TrimSpace(grant))
		}
	}
	require.Len(t, grants, 3)
	return grants
}

func TestTablesOfOthers(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pool := newPool(t, server.URL())
	server.Exec(t, "create schema a; create table a.log (line text)")
	refused(t, pool, "a", alone, "tables of something else", "log")
	require.Equal(t, "log", server.Exec(t, "select string_agg(relname, ' ') from pg_class "+
		"where relnamespace = 'a'::regnamespace and relkind = 'r'"), "nothing was made")
	server.Exec(t, "create schema b; create table b.head (line text)")
	refused(t, pool, "b", alone, "tables of something else", "head")

	open(t, pool, "c", alone)
	server.Exec(t, "update c.head set version = 2")
	refused(t, pool, "c", alone, "later version", "update this program")
	sql, err := pgstore.Schema("c")
	require.NoError(t, err)
	_, err = pool.Exec(context.Background(), sql)
	require.ErrorContains(t, err, "a later version of pgstore")
}

// Many processes that open a new store at the same time make one store.
func TestOpenAtTheSameTime(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pool := newPool(t, server.URL())
	for range 5 {
		schema := newSchema()
		results := make(chan error, 8)
		for range 8 {
			go func() {
				b, err := pgstore.Open(within(t, patience), pool, schema, alone)
				if err == nil {
					err = b.Close()
				}
				results <- err
			}()
		}
		for range 8 {
			require.NoError(t, <-results)
		}
	}
}

func TestOpenWithoutServer(t *testing.T) {
	t.Parallel()
	const closed = "127.0.0.1:1" // a port that the system gives to no other test
	pool := newPool(t, strings.Replace(pglab.URL(closed), "postgres@", "app:hunter2@", 1))
	late := func(pool *pgxpool.Pool, says ...string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_, err := pgstore.Open(ctx, pool, "apikeys", alone)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NotContains(t, err.Error(), "hunter2")
		for _, text := range says {
			require.ErrorContains(t, err, text)
		}
	}
	late(pool, "check the host and the port", closed)

	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and never answers
	require.NoError(t, err)
	defer silent.Close()
	late(newPool(t, pglab.URL(silent.Addr().String())), "does not answer")

	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	_, err = pgstore.Open(cancelled, pool, "apikeys", alone)
	require.ErrorIs(t, err, context.Canceled)
}

// Open waits for a server that starts.
func TestOpenBeforeTheServer(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true})
	pool := newPool(t, server.URL())
	server.Stop()
	opened := make(chan error)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		b, err := pgstore.Open(ctx, pool, "apikeys", alone)
		if err == nil {
			err = b.Close()
		}
		opened <- err
	}()
	require.NoError(t, server.Start())
	require.NoError(t, <-opened)
}

const password = "correct horse battery staple"

func TestPassword(t *testing.T) {
	t.Parallel()
	server := pglab.Start(t, pglab.Config{NoSync: true,
		HBA: []string{"host all app 127.0.0.1/32 scram-sha-256", "host all nobody all reject"}})
	server.Exec(t, "create role app login password '"+password+"'; create role nobody login")
	server.Exec(t, "grant create on database postgres to app")
	as := func(user, password string) *pgxpool.Pool {
		c, err := pgxpool.ParseConfig(server.URL())
		require.NoError(t, err)
		c.ConnConfig.User, c.ConnConfig.Password = user, password
		pool, err := pgxpool.NewWithConfig(context.Background(), c)
		require.NoError(t, err)
		t.Cleanup(pool.Close)
		return pool
	}
	b := open(t, as("app", password), "apikeys", alone)
	remotetest.UseEachMethod(t, b)
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		require.NotContains(t, fmt.Sprintf(format, b), password)
	}
	refused(t, as("app", "hunter2"), "apikeys", alone, "refuses the user name or the password")
	refused(t, as("nobody", ""), "apikeys", alone, "there is no such user, or PostgreSQL has no rule")
	refused(t, newPool(t, strings.Replace(server.URL(), "/postgres?", "/none?", 1)), "apikeys",
		alone, "make the database")
}
