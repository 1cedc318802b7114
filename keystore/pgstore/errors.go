package pgstore

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/grpc-api-key/grpc-api-key/internal/remote"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// The codes of PostgreSQL's errors that the package knows. Codes that begin with KS are those of
// schema.sql.
const (
	codeConflict     = "KS001"
	codeUnreplicated = "KS002"
	codeLater        = "KS003"
	codeSomeConflict = "KS004"

	codeAuthorization  = "28000"
	codePassword       = "28P01"
	codeNoDatabase     = "3D000"
	codeNoSchema       = "3F000"
	codeNoTable        = "42P01"
	codeDuplicateTable = "42P07"
	codeNoColumn       = "42703"
	codeNoRight        = "42501"
	codeReadOnly       = "25006"
	codeUnique         = "23505"
	codeDiskFull       = "53100"
	codeTooManyConns   = "53300"
	codeCanceled       = "57014"
	codeAdminShutdown  = "57P01"
	codeCrashShutdown  = "57P02"
	codeCannotConnect  = "57P03"
)

// wrap returns the error of a call. If the context of the caller has ended, or the Backend was
// closed, wrap returns that.
func (b *Backend) wrap(ctx context.Context, op string, err error) error {
	if ended := b.calls.Ended(ctx); ended != nil {
		return ended
	}
	return b.explain(op, err)
}

// explain returns a remote.Error that begins with what was done. Its Err is the error of pgx. An
// error that is explained already stays as it is.
func (b *Backend) explain(op string, err error) error {
	var explained *remote.Error
	if errors.As(err, &explained) {
		return explained
	}
	// pgx writes an error of several hosts on several lines.
	text := strings.Join(strings.Fields(err.Error()), " ")
	if advice := b.advise(err, text); advice != "" {
		text += ": " + advice
	}
	return &remote.Error{Text: "pgstore: " + op + ": " + text, Err: err}
}

// codeOf returns the code of an error of PostgreSQL, or "".
func codeOf(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// advise returns what to do about an error of PostgreSQL or of the connection, or "".
func (b *Backend) advise(err error, text string) string {
	has := func(part string) bool { return strings.Contains(text, part) }
	switch codeOf(err) {
	case codeUnreplicated:
		return adviceUnreplicated
	case codePassword:
		return "PostgreSQL refuses the user name or the password: check the connection string"
	case codeAuthorization:
		return "there is no such user, or PostgreSQL has no rule in pg_hba.conf that lets this user " +
			"connect from here, or requires TLS or a client certificate"
	case codeNoDatabase:
		return "make the database, or check the connection string"
	case codeNoSchema, codeNoTable:
		return "the tables of the store are gone"
	case codeNoRight:
		return "the role has too few rights: " + b.grants()
	case codeReadOnly:
		return adviceStandby
	case codeTooManyConns:
		return "the server has no connection left: raise max_connections, or make the pools of " +
			"its clients smaller"
	case codeCanceled:
		return "statement_timeout of the server or of the role, or a person, has canceled the " +
			"statement"
	}
	switch {
	case has("certificate signed by unknown authority"), has("failed to verify certificate"):
		return "the client does not trust the certificate of the server: check sslrootcert and " +
			"the host name in the connection string"
	case has("server refused TLS connection"):
		return "the server does not use TLS: set ssl = on in postgresql.conf"
	case has("connection refused"), has("no such host"), has("i/o timeout"):
		return "check the host and the port in the connection string"
	case has("closed pool"):
		return "the pool was closed before the store"
	}
	return ""
}

const (
	adviceUnreplicated = "a revocation could be lost when a standby replaces the server: set " +
		"synchronous_standby_names, and synchronous_commit to on, or set Options.Unreplicated if " +
		"no standby will replace the server"
	adviceStandby = "the server is a standby, or is read-only: name all servers in the connection " +
		"string, with target_session_attrs=read-write"
)

// grants returns the statements that give a role the rights that the store needs.
func (b *Backend) grants() string {
	return fmt.Sprintf("run, with the name of the role: %s", strings.Join(b.sql.grants, "; "))
}

// fullError returns an error that wraps ErrFull.
func (b *Backend) fullError(err error) error {
	return fmt.Errorf("pgstore: write: %w: PostgreSQL has no disk space left: %w",
		backend.ErrFull, b.explain("write", err))
}
