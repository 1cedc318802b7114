// Package pgstore keeps the entries of a key store in PostgreSQL, for many processes. The package
// is a separate module, so that only its users have a client of PostgreSQL in their module graph.
//
//	pool, err := pgxpool.New(ctx, "postgres://app@pg-0,pg-1/app"+
//		"?target_session_attrs=read-write&sslmode=verify-full&sslrootcert=ca.crt")
//	b, err := pgstore.Open(ctx, pool, "apikeys", nil)
//	store, err := keystore.New(b, nil)
//
// TLS, the user and the password belong to the connection string. No error and no log message of
// this package has a credential.
//
// # What PostgreSQL must be
//
// The server has version 14 or later. The tests run with version 15. The versions 14 to 18 are
// supported by what their documents say; only version 15 is tested. What the store uses
// differs between these versions in two places: transaction_timeout exists since version 17, and is
// set to 0 where it exists; and pg_logical_emit_message has one more argument since version 17,
// with a default.
//
// Commits wait for a standby: synchronous_standby_names is not empty, and synchronous_commit is on,
// remote_apply or remote_write. Name two standbys, as in "ANY 1 (a, b)", so that the store
// continues while one standby is down. Open refuses a server without synchronous replication, and
// while the setting is empty, every change fails. Only a standby that the server waits for may be
// promoted. The old primary, if it is still alive, then confirms no change any more, so its
// processes refuse every call after at most Options.Freshness of package keystore. Until then, such
// a process admits no key whose revocation has returned, and denies no key whose Enable has
// returned: each change of a key waits until all processes have the change or refuse every call.
// Create does not wait. So before Get returns backend.ErrNotFound, or GetAll leaves an entry out, a
// commit shows that the server is still the primary. Calls that run at the same time share the
// commit.
//
// Options.Unreplicated allows a server that no standby replaces. If a standby is promoted all the
// same, revocations that have returned may be lost, and processes that still reach the old primary
// continue to admit keys that are revoked on the new one.
//
// # Rights
//
// A role that may create schemas in the database needs nothing else: Open makes the tables. To let
// an application have the least rights, the owner of the database runs the SQL of Schema, and then:
//
//	grant usage on schema apikeys to app
//	grant select on all tables in schema apikeys to app
//	grant execute on all functions in schema apikeys to app
//
// This role cannot write to the tables. The function apply makes each change, with the rights of
// the role that ran the SQL of Schema, and keeps the order of the changes.
//
// # Connections
//
// Get and the scans use the pool of the caller. A Backend also opens up to 8 other connections, and
// one more for each running Feed, with the configuration of the pool. Changes that are made at the
// same time share a commit.
//
// PgBouncer may be between the store and the server if pool_mode is session. Each process of the
// store then holds up to 10 connections of the server, and those of its pool, so default_pool_size
// must have these for all processes. Open refuses the modes transaction and statement: LISTEN and
// the settings of a connection do not last there. After a failover, PgBouncer must lead to the new
// primary.
//
// # Layout
//
// The table entry has a row for each entry. The table log has a row for each Apply, with a
// position; the positions have no holes. A position of a feed is a position of the log. The tables
// head and log must not be changed by other programs. If a program puts earlier rows back while the
// server runs, a Get may show these rows until a feed notices, usually within 50 ms. Stop the
// processes of the store before you restore its tables in place.
//
// The log keeps each change for at least 10 minutes, by the clock of the server. The function apply
// removes older rows in the transaction of a change, at most 128 rows at a time, and no other
// program has to do this. The last 128 rows always stay. While changes are made, the log has at
// most the changes of the busiest 10 minutes, and a few hundred rows more. Leave autovacuum on, so
// that new rows use the space of removed rows. A feed whose position was removed ends with
// backend.ErrGap, and the caller starts a new feed. If the clock jumps forward, rows are removed
// earlier. If the clock is set back, rows stay longer.
//
// # A restored server
//
// A server that is restored from a backup has lost the changes since the backup, such as
// revocations. A standby that is promoted under Options.Unreplicated may have lost the last changes
// too. Each row of the log has a random tag, so a Backend notices when a position means another
// change. The feeds then end with backend.ErrGap, and a message goes to the Logger. Restore the
// store's own backup on top of the restored server, or revoke the keys again.
package pgstore
