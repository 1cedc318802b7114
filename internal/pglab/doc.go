// Package pglab starts PostgreSQL servers for tests: a primary, its standbys, restarts, crashes and
// promotions. The servers are those of the machine, such as Debian's package postgresql. A test on
// a machine without PostgreSQL is skipped.
//
// Each server has a new database cluster in a temporary directory, listens on 127.0.0.1 and on a
// Unix socket, and ends with the test. PostgreSQL refuses to run as root, so the tests of root run
// the servers as another user, such as postgres.
//
// The package has no client of PostgreSQL, so each module of this repository can use it.
package pglab
