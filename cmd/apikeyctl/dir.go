package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// openDir opens the directory of a store, and serves the store to this process alone: on a socket
// in a directory that no other user can enter. So the commands do the same for a directory as for a
// server, and the events name the user of apikeyctl.
func (c *call) openDir(ctx context.Context, opts []grpc.DialOption) (*connection, error) {
	hasher, check, err := c.dirHasher()
	if err != nil {
		return nil, err
	}
	store, err := c.openStore(c.place.dir, &keystore.Options{
		Hasher: hasher, MustExist: c.Name != createName && c.Name != restoreName})
	if err != nil {
		return nil, err
	}
	if err := check(ctx, store); err != nil {
		store.Close()
		return nil, err
	}
	undo := []func() error{store.Close}
	close := func() (err error) {
		for i := range undo {
			err = errors.Join(err, undo[len(undo)-1-i]())
		}
		return err
	}
	fail := func(err error) (*connection, error) {
		return nil, local("%v: set TMPDIR to a directory that you can write to",
			errors.Join(err, close()))
	}
	srv, err := admin.New(store)
	if err != nil {
		return fail(err)
	}
	undo = append(undo, func() error { srv.Close(); return nil })
	temp, err := os.MkdirTemp("", "apikeyctl-") // has mode 0700
	if err != nil {
		return fail(err)
	}
	undo = append(undo, func() error { return os.RemoveAll(temp) })
	socket := filepath.Join(temp, "s")
	listener, err := admin.ListenUnix(socket)
	if err != nil {
		return fail(err)
	}
	server := grpc.NewServer(grpc.Creds(admin.PeerCredentials()))
	srv.Register(server)
	go server.Serve(listener)
	undo = append(undo, func() error { server.Stop(); return nil })
	conn, err := dialSocket(socket, opts)
	if err != nil {
		return fail(err)
	}
	undo = append(undo, conn.Close)
	return &connection{conn.ClientConn, close}, nil
}

// openStore opens a store, and logs to stderr.
func (c *call) openStore(dir string, opts *keystore.Options) (*keystore.Store, error) {
	opts.Logger = slog.New(slog.NewTextHandler(c.out.stderr, &slog.HandlerOptions{
		Level: slog.LevelWarn}))
	store, err := keystore.Open(dir, opts)
	if err != nil {
		return nil, openFailed(dir, err)
	}
	return store, nil
}

// openFailed returns the failure for an error of keystore.Open.
func openFailed(dir string, err error) error {
	switch {
	case errors.Is(err, keystore.ErrLocked):
		return &failure{exitElsewhere, codes.FailedPrecondition, "STORE_OPEN_ELSEWHERE",
			textOf(err) + ", with --socket PATH"}
	case errors.Is(err, fs.ErrNotExist):
		return &failure{exitUsage, codes.NotFound, "NO_STORE", fmt.Sprintf(
			`there is no store in %s: check the path. create, restore and import make a store`, dir)}
	case errors.Is(err, keystore.ErrCorrupt):
		return &failure{exitServer, codes.DataLoss, "STORE_CORRUPT", textOf(err) +
			`: keep the directory, and restore a backup into a new one with "apikeyctl restore"`}
	case errors.Is(err, keystore.ErrInvalid) && strings.Contains(err.Error(), "Options.Hasher"):
		return usage("--pepper-file: the keys in %s were made with another pepper of the same ID: give "+
			"the file of that pepper. If the server takes the bytes of the file as they are, write "+
			"ID=raw:FILE", dir)
	default:
		return local("cannot open the store in %s: %s", dir, textOf(err))
	}
}

// textOf returns the text of an error of keystore.Open without the words before the cause.
func textOf(err error) string {
	text := strings.TrimPrefix(err.Error(), "keystore: ")
	return strings.TrimPrefix(text, "open: ")
}
