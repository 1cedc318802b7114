// Apikeyctl manages the API keys of a server: it creates, lists, rotates and revokes keys, follows
// the changes, and makes backups. The server serves the package interceptor/admin on a unix socket,
// or over TLS. For most uses, give the socket:
//
//	export APIKEYCTL_SOCKET=run/admin.sock
//	apikeyctl create --name ci --owner acme --expires 90d
//	apikeyctl list
//	apikeyctl revoke ID --reason leaked
//
// With --dir, apikeyctl opens the directory of a store that no process has open.
//
// Results go to stdout, and everything else to stderr. The exit code is
//
//	0    done
//	1    the command line cannot be used, or something on this machine failed
//	2    the server failed, or was not reached
//	3    there is no such key
//	4    not permitted
//	5    another process has the directory open
//	6    the key or the selection has changed, or the key is revoked
//	130  interrupted
//
// "apikeyctl --help" lists the commands, and "apikeyctl COMMAND --help" shows an example.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	// A closed pipe is an error of the write, so that no secret is lost without a word.
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(run(os.Args))
}

// run runs a command line, and returns the exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second interrupt ends the process immediately
	err := newCommand().Run(ctx, args)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errGone):
		return exitUsage
	}
	f := failureOf(err)
	f.report(os.Stderr, formatIn(args))
	return f.exit
}

// formatIn returns the format that a command line asks for, also if the rest of the command line
// cannot be used.
func formatIn(args []string) string {
	format := os.Getenv("APIKEYCTL_OUTPUT")
	for i, arg := range args {
		switch name, value, ok := strings.Cut(arg, "="); {
		case arg == "--":
			return format
		case name != "-o" && name != "--output":
		case ok:
			format = value
		case i+1 < len(args):
			format = args[i+1]
		}
	}
	return format
}
