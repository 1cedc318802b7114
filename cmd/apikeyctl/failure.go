package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v3"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The exit codes. README and the help of apikeyctl list them.
const (
	exitUsage       = 1   // the command line, or something on this machine
	exitServer      = 2   // the server, or the way to it
	exitNotFound    = 3   // no such key
	exitDenied      = 4   // not permitted
	exitElsewhere   = 5   // another process has the directory open
	exitConflict    = 6   // the key, or the selection, has changed
	exitInterrupted = 130 // as shells report SIGINT
)

// A failure is an error as the user sees it. The message says what is wrong, and ends with what to
// do. The message never contains a text of the command line that could be a secret.
type failure struct {
	exit    int
	code    codes.Code
	reason  string
	message string
}

func (f *failure) Error() string { return f.message }

// usage is the failure of a command line that cannot be used.
func usage(format string, args ...any) error {
	return &failure{exitUsage, codes.InvalidArgument, "USAGE", fmt.Sprintf(format, args...)}
}

// local is the failure of something on this machine, such as a file.
func local(format string, args ...any) error {
	return &failure{exitUsage, codes.Unknown, "LOCAL", fmt.Sprintf(format, args...)}
}

// failureOf returns the failure for any error. A failure is itself. A status of the server gets the
// exit code of its code, and advice for its reason.
func failureOf(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	var ofCLI cli.ExitCoder
	if errors.As(err, &ofCLI) {
		// The text may repeat an argument that is a secret.
		return failureOf(usage(`there is no such command: see "apikeyctl --help"`))
	}
	st, ok := status.FromError(err)
	if !ok {
		return &failure{exitUsage, codes.Unknown, "LOCAL", err.Error()}
	}
	f = &failure{exit: exitOf(st.Code()), code: st.Code(), message: st.Message()}
	var metadata map[string]string
	for _, detail := range st.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			f.reason, metadata = info.Reason, info.Metadata
		}
	}
	if f.code == codes.InvalidArgument {
		f.message = flagNames.Replace(f.message)
	}
	if advice := adviceFor(f.reason, metadata); advice != "" {
		f.message += ": " + advice
	}
	return f
}

func exitOf(c codes.Code) int {
	switch c {
	case codes.InvalidArgument:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.PermissionDenied, codes.Unauthenticated:
		return exitDenied
	case codes.Aborted, codes.FailedPrecondition:
		return exitConflict
	default:
		return exitServer
	}
}

// flagNames translates the names of fields in the texts of the server.
var flagNames = strings.NewReplacer(
	"display_name", "--name",
	"expire_time", "--expires",
	"start_time", "--not-before",
	"allowed_networks", "--network",
	"rate_limit", "--rate",
	"filter.unused_since", "--unused-since",
	"scopes[", "--scope[",
	"after is not a cursor", "--after is not a cursor",
	"call SetCredits", "give --set",
)

// adviceFor says what to do about a reason, where the text of the server says nothing.
func adviceFor(reason string, metadata map[string]string) string {
	switch reason {
	case "KEY_NOT_FOUND":
		return `"apikeyctl list" shows the keys`
	case "KEY_REVOKED":
		return "create another key"
	case "INSUFFICIENT_SCOPE":
		return fmt.Sprintf("use a key with one of the scopes %s, or the socket",
			strings.ReplaceAll(metadata["scopes"], " ", ", "))
	case "SCOPE_CEILING":
		return "use a key with keys:admin, or the socket"
	case "CREDENTIALS_MISSING", "API_KEY_INVALID", "API_KEY_REVOKED", "API_KEY_EXPIRED":
		return "look at the key in APIKEYCTL_KEY, or in the file of --key-file"
	case "STORE_CORRUPT":
		return `make a copy of the directory, and see "apikeyctl check"`
	case "STORE_CLOSED":
		return "try again when the server runs"
	case "BACKUP_CORRUPT":
		return "take another backup"
	default:
		return ""
	}
}

// interrupted is the failure of a command that the user has ended. left says what was done, and how
// to continue.
func interrupted(left string) error {
	return &failure{exitInterrupted, codes.Canceled, "INTERRUPTED", "interrupted: " + left}
}

// failed returns the failure for the error of a call to the server. Without a status of the
// service, the failure names the server, and what to do about the connection.
func (c *call) failed(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	f := failureOf(err)
	switch {
	case ctx.Err() != nil:
		return interrupted(c.left)
	case f.reason != "":
		return f
	case f.code == codes.DeadlineExceeded:
		f.reason = "NO_ANSWER"
		f.message = fmt.Sprintf("no answer from %s within %v: %s. See whether the server is busy, or "+
			"wait longer with --timeout", c.place, c.timeout, c.left)
	case f.code == codes.Unavailable:
		f.reason = "CONNECTION_LOST"
		f.message = fmt.Sprintf("the connection to %s is lost: %s. See whether the server runs, and "+
			"try again", c.place, c.left)
	case f.code == codes.Unimplemented:
		f.reason = "NO_ADMIN_SERVICE"
		f.message = fmt.Sprintf("%s does not serve this method: register package admin with the "+
			"server, or use an apikeyctl of the server's version", c.place)
	default:
		f.reason = "UNEXPECTED"
		f.message += ": look at the log of the server"
	}
	return f
}

// report prints a failure, as JSON for the formats json and jsonl.
func (f *failure) report(w io.Writer, format string) {
	if format != "json" && format != "jsonl" {
		fmt.Fprintf(w, "apikeyctl: %s\n", printable(f.message))
		return
	}
	type body struct {
		Code    string `json:"code"`
		Reason  string `json:"reason"`
		Message string `json:"message"`
	}
	_ = json.NewEncoder(w).Encode(map[string]body{
		"error": {code.Code(f.code).String(), f.reason, f.message}})
}
