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

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/interceptor/admin"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/importer"
)

// openDir opens the directory of a store, and serves the store to this process alone: on a socket
// in a directory that no other user can enter. So the commands do the same for a directory as for a
// server, and the events name the user of apikeyctl.
func (c *call) openDir(ctx context.Context, opts []grpc.DialOption) (*connection, error) {
	hasher, check, err := c.dirHasher()
	if err != nil {
		return nil, err
	}
	settings := &keystore.Options{Hasher: hasher, Prefix: c.String("prefix"),
		MustExist: c.Name != createName && c.Name != restoreName}
	if c.Name == lookupName {
		for _, system := range importer.Systems() {
			settings.Legacy = append(settings.Legacy, system.Formats()...)
		}
	}
	store, err := c.openStore(c.place.dir, settings)
	if err != nil {
		return nil, err
	}
	if err := check(ctx, store); err != nil {
		store.Close()
		return nil, err
	}
	if store, err = c.withPrefix(ctx, store, hasher); err != nil {
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

// withPrefix returns the store, or for commands that make tokens, the store with the prefix of the
// newest key. So a new key looks as a key that the server makes. A key with another prefix works
// too, but leak scanners do not know the key.
func (c *call) withPrefix(
	ctx context.Context, store *keystore.Store, hasher hashing.Hasher,
) (*keystore.Store, error) {
	if c.Name != createName && c.Name != rotateName || c.IsSet("prefix") {
		return store, nil
	}
	prefix := newestPrefix(ctx, store)
	if prefix == "" {
		return store, nil
	}
	if err := store.Close(); err != nil {
		return nil, local("%v: look at the store with apikeyctl check", err)
	}
	return c.openStore(c.place.dir, &keystore.Options{
		Hasher: hasher, Prefix: prefix, MustExist: true})
}

// newestPrefix returns the prefix of the newest key of a store. The result is empty if the prefix
// is the default prefix, or if no key tells the prefix.
func newestPrefix(ctx context.Context, store *keystore.Store) string {
	const defaultPrefix = "oil"
	// The ID of an imported key has zeros in place of its time, so each key that the server has made
	// is newer.
	const noTime = "0000000000"
	for key, err := range store.List(ctx, keystore.Query{Newest: true}) {
		if err != nil {
			continue // the command itself meets the error, if the error matters
		}
		prefix, _, ok := strings.Cut(key.Hint, "_"+key.ID+"_")
		if !ok || prefix == defaultPrefix || strings.HasPrefix(key.ID, noTime) {
			break
		}
		return prefix
	}
	return ""
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
