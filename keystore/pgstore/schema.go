package pgstore

import (
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
)

// format is the version of the tables that this package makes, and the only version that this
// package can use.
const format = 1

// The function apply removes old rows of the log. A transaction adds at most maxGroup rows, and
// removes at most pruneRows. So the log does not grow while there are rows to remove, and the
// removal does not delay a change for long. schema.sql needs pruneRows > maxGroup.
const (
	// logSpan is the time for which the log keeps a change at least, by the clock of the server. A
	// feed that is further behind ends with backend.ErrGap.
	logSpan   = 10 * time.Minute
	pruneRows = 2 * maxGroup
)

// maxSchemaSize is the size of the longest name in PostgreSQL, in bytes. PostgreSQL cuts a longer
// name, so two long names could mean the same schema.
const maxSchemaSize = 63

// Schema returns the SQL that makes the tables of a store in a schema, and makes the schema if the
// database has none. Open runs the same SQL. If the role of the application may not create tables,
// the owner of the database runs the SQL, for example with psql, and grants the rights that the
// package documentation names.
//
// The SQL is one statement, and changes everything or nothing. If the tables are there, the SQL
// changes nothing, and fails if a later version of this package has made the tables. Schema returns
// an error for a name that Open refuses.
func Schema(schema string) (string, error) {
	if err := checkSchema(schema); err != nil {
		return "", fmt.Errorf("pgstore: %w", err)
	}
	return newStatements(schema).migrate, nil
}

func checkSchema(schema string) error {
	switch {
	case schema == "":
		return errors.New("the schema is empty: choose the name of a schema, such as \"apikeys\"")
	case len(schema) > maxSchemaSize:
		return fmt.Errorf("the name of the schema has %d bytes: at most %d are allowed",
			len(schema), maxSchemaSize)
	case strings.ContainsRune(schema, 0) || !utf8.ValidString(schema):
		return errors.New("the name of the schema has a NUL byte, or is not UTF-8")
	case strings.HasPrefix(schema, "pg_"):
		return fmt.Errorf("the schema is %q: names that begin with pg_ belong to PostgreSQL",
			schema)
	}
	return nil
}

// statements are the SQL of a Backend, with the name of the schema.
type statements struct {
	migrate, version, rights, apply            string
	getSeen, getSeenOrNone, getSoon, get       string
	getAll, present                            string
	scan                                       string
	mark, snapshot, snapshotTo                 string
	listen, feedStart, feedPage, feedPositions string

	grants []string
}

//go:embed schema.sql
var schemaSQL string

// newStatements returns the SQL for a schema, whose name checkSchema has accepted.
func newStatements(schema string) statements {
	hash := sha256.Sum256([]byte("grpc-api-key pgstore " + schema))
	channel := "pgstore_" + hex.EncodeToString(hash[:16])
	quoted := pgx.Identifier{schema}.Sanitize()
	fill := strings.NewReplacer(
		"@schema@", quoted,
		"@name@", literal(schema),
		"@head@", literal(quoted+".head"),
		"@entry@", literal(quoted+".entry"),
		"@log@", literal(quoted+".log"),
		"@quote@", dollarTag("apply", quoted),
		"@channel@", channel,
		"@lock@", fmt.Sprint(int64(binary.BigEndian.Uint64(hash[:]))),
		"@format@", fmt.Sprint(format),
		"@page@", fmt.Sprint(pageEntries),
		"@batches@", fmt.Sprint(pageBatches),
		"@prune@", fmt.Sprint(pruneRows),
		"@span@", fmt.Sprint(logSpan.Seconds(), " seconds"),
	).Replace
	const (
		// last is the position of the last change. The log always has this position, and an index
		// finds it, however many changes are in the log.
		last = "(select position from @schema@.log order by position desc limit 1)"
		// deleted is the position of the last deletion after a given position. The bound keeps the
		// server from reading the deletions that were removed from the log, and that vacuum has not
		// removed from the index. known is the tag at the given position.
		deleted = "(select position from @schema@.log where deletes and position > $1 " +
			"order by position desc limit 1)"
		known    = "(select tag from @schema@.log where position = $1)"
		snapshot = "select key, value, revision from @schema@.entry where key >= $1"
		// soon are the columns of a soonRow that getSeen and getSoon have. They begin with those
		// that identify the process of the server.
		soon = "pg_postmaster_start_time(), pg_backend_pid(), e.value, e.revision, e.position"
	)
	// A function of another role in a schema of the search path must not replace a function of
	// PostgreSQL. PostgreSQL prefers a function with the exact types of the arguments, and so
	// unnest(bytea[]) to its own unnest(anyarray).
	return statements{
		grants: []string{
			fill("grant usage on schema @schema@ to ROLE"),
			fill("grant select on all tables in schema @schema@ to ROLE"),
			fill("grant execute on all functions in schema @schema@ to ROLE"),
		},
		migrate: migrate(fill(schemaSQL)),
		version: fill("select version from @schema@.head"),
		rights: fill("select has_table_privilege(@entry@, 'select') and " +
			"has_table_privilege(@log@, 'select') and " +
			"coalesce((select bool_and(has_function_privilege(p.oid, 'execute')) from pg_proc p " +
			"join pg_namespace n on n.oid = p.pronamespace " +
			"where n.nspname = @name@ and p.proname in ('apply', 'page')), false), " +
			// Row-level security without a policy hides all rows.
			"exists (select from pg_class c where c.oid in (@entry@::regclass, @log@::regclass) " +
			"and row_security_active(c.oid) " +
			"and not exists (select from pg_policy where polrelid = c.oid))"),
		apply: fill("select failed, at, tag from " +
			"@schema@.apply($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, " +
			"$17, $18, $19, $20)"),
		present: fill("select key, value, revision from @schema@.entry where key = any($1)"),
		// getSeen reads one row, and shows enough with a connection whose server has shown the view:
		// see seenView. If there is no entry, getSeen has no row, and getSeenOrNone has one, which
		// takes PostgreSQL a microsecond more. getSoon reads three rows, and usually shows enough. A
		// join takes PostgreSQL less time than a select inside the select.
		getSeen: fill("select " + soon + " from @schema@.entry e where e.key = $1"),
		getSeenOrNone: fill("select " + soon + " from (select) one " +
			"left join @schema@.entry e on e.key = $1"),
		getSoon: fill("select " + soon + ", pg_is_in_recovery(), d.tag, r.tag " +
			"from @schema@.log d join @schema@.log r on r.position = $2 " +
			"left join @schema@.entry e on e.key = $3 where d.position = $1"),
		get: fill("select pg_is_in_recovery(), " + last + ", " + known + ", " +
			"case when e.key is null then " + deleted + " end, e.value, e.revision, e.position " +
			"from (select) one left join @schema@.entry e on e.key = $2"),
		getAll: fill("select pg_is_in_recovery(), " + last + ", " + known + ", " + deleted + ", " +
			"k.n, e.value, e.revision, e.position " +
			"from pg_catalog.unnest($2::bytea[]) with ordinality k(key, n) " +
			"left join lateral (select value, revision, position from @schema@.entry " +
			"where key = k.key limit 1) e on true"),
		scan: fill("select pg_is_in_recovery(), l.position, " + known + ", " + deleted +
			", e.key, e.value, e.revision, e.position from " + last + " l " +
			"left join lateral @schema@.page($2, $3, $4) with ordinality " +
			"e(key, value, revision, position, n) on true order by e.n"),
		mark: fill("select position, tag, current_setting('synchronous_standby_names') " +
			"from @schema@.log order by position desc limit 1"),
		snapshot:   fill(snapshot + " order by key"),
		snapshotTo: fill(snapshot + " and key < $2 order by key"),
		listen:     fill("listen @channel@"),
		feedStart:  fill("select position, tag from @schema@.log order by position desc limit 1"),
		feedPage: fill("select position, tag, case when position > $1 then changes end " +
			"from @schema@.log " +
			"where position >= $1 and position <= $1 + @batches@ order by position"),
		feedPositions: fill("select min(position), max(position) from @schema@.log"),
	}
}

// literal returns a string constant of SQL, whatever standard_conforming_strings is.
func literal(text string) string {
	text = strings.ReplaceAll(text, "'", "''")
	if strings.Contains(text, `\`) {
		return " E'" + strings.ReplaceAll(text, `\`, `\\`) + "'"
	}
	return "'" + text + "'"
}

// dollarTag returns a tag for a dollar-quoted constant with a text: the text does not have the tag.
func dollarTag(name, text string) string {
	tag := "$" + name + "$"
	for n := 1; strings.Contains(text, tag); n++ {
		tag = fmt.Sprintf("$%s%d$", name, n)
	}
	return tag
}

// migrate returns one statement that runs the block.
func migrate(block string) string {
	tag := dollarTag("migrate", block)
	return "do " + tag + "\n" + block + tag + ";\n"
}
