package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v3"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// pepperFlag is --pepper-file, in the form that the server of the guides has. The pepper itself is
// never an argument, because other users can see the arguments.
func pepperFlag() cli.Flag {
	return &cli.StringSliceFlag{Name: "pepper-file", Category: groupPlace,
		Usage: "with --dir: the pepper of the server, as `ID=FILE` such as 2026=/etc/orders/pepper, " +
			"in base64. ID=raw:FILE takes the bytes of the file as they are. Repeat, with the current " +
			"pepper first; sha256 means no pepper [$APIKEYCTL_PEPPER_FILE]"}
}

// peppers returns the values of --pepper-file, or else of the environment.
func (c *call) peppers() []string {
	values := c.StringSlice("pepper-file")
	if env := os.Getenv("APIKEYCTL_PEPPER_FILE"); len(values) == 0 && env != "" {
		values = strings.Split(env, ",")
	}
	return values
}

// hasherOf returns the Hasher for the values of --pepper-file. No error repeats a value, because
// the value may be the pepper itself.
func hasherOf(values []string) (hashing.Hasher, error) {
	var all []hashing.Hasher
	for _, value := range values {
		one, err := readPepper(value)
		if err != nil {
			return nil, err
		}
		all = append(all, one)
	}
	if len(all) == 0 {
		return hashing.SHA256(), nil
	}
	h, err := hashing.Keyring(all[0], all[1:]...)
	if err != nil {
		return nil, usage("--pepper-file: two files with the same ID hold different peppers: give " +
			"each pepper the ID that it has in the server")
	}
	return h, nil
}

// readPepper returns the Hasher for one value of --pepper-file.
func readPepper(value string) (hashing.Hasher, error) {
	if value == "sha256" {
		return hashing.SHA256(), nil
	}
	id, path, ok := strings.Cut(value, "=")
	if !ok || path == "" {
		return nil, usage("--pepper-file cannot be used: write ID=FILE, such as " +
			"2026=/etc/orders/pepper, and never the pepper itself")
	}
	if _, err := hashing.HMACSHA256(id, make([]byte, 32)); err != nil {
		return nil, usage("--pepper-file: the ID before the = cannot be used: write the ID that the " +
			"pepper has in the server, 1 to 64 letters, digits and any of . _ -")
	}
	path, raw := strings.CutPrefix(path, "raw:")
	pepper, err := os.ReadFile(path)
	if err != nil {
		var cause *fs.PathError
		if errors.As(err, &cause) {
			err = cause.Err // without the path
		}
		return nil, usage("--pepper-file: the file of the pepper %s cannot be read: %v: write "+
			"%s=FILE", id, err, id)
	}
	if !raw {
		// The error of base64 would show a part of the pepper.
		if pepper, err = base64.StdEncoding.DecodeString(string(bytes.TrimSpace(pepper))); err != nil {
			return nil, usage("--pepper-file: the file of the pepper %s does not hold base64: if the "+
				"server takes the bytes of the file as they are, write %s=raw:FILE", id, id)
		}
	}
	h, err := hashing.HMACSHA256(id, pepper)
	if err != nil {
		return nil, usage("--pepper-file: the pepper %s has %d bytes, and a pepper has 16 at least: "+
			"look whether it is the right file", id, len(pepper))
	}
	return h, nil
}

// needsPepper are the commands that make digests or compare digests.
var needsPepper = []string{createName, rotateName, lookupName}

// A countingHasher is a Hasher that makes the store count the digests of other hashers.
type countingHasher struct{ hashing.Hasher }

func (countingHasher) HasEarlier() bool { return true }

// A keyring is a hashing.Keyring.
type keyring interface {
	HasEarlier() bool
	Schemes() []string
}

// importedSchemes are the schemes of digests that other systems have made. A server has hashers for
// these schemes as earlier hashers at most, so the digests say nothing about the pepper.
var importedSchemes = []string{
	hashing.SHA512().Digest("").Scheme, hashing.PBKDF2SHA256().Digest("").Scheme,
	sha2cryptForm{}.Digest("").Scheme,
}

// dirHasher returns the Hasher for a directory, and a function that checks the store that is opened
// with the Hasher. The function returns a failure if the command needs the pepper of the server,
// and the store has digests of a pepper that is not given: the server would not know a key that
// apikeyctl makes without the pepper.
func (c *call) dirHasher() (
	h hashing.Hasher, check func(context.Context, *keystore.Store) error, err error,
) {
	if h, err = hasherOf(c.peppers()); err != nil {
		return nil, nil, err
	}
	if c.Name == lookupName {
		h, err = hashing.Keyring(h, hashing.SHA512(), hashing.PBKDF2SHA256()) // of imported keys
		if err != nil {
			return nil, nil, local("%v", err)
		}
	}
	if !slices.Contains(needsPepper, c.Name) {
		return h, func(context.Context, *keystore.Store) error { return nil }, nil
	}
	known := importedSchemes
	if k, ok := h.(keyring); ok && k.HasEarlier() {
		known = slices.Concat(known, k.Schemes())
	} else {
		h = countingHasher{h}
	}
	return h, func(ctx context.Context, store *keystore.Store) error {
		return c.checkPepper(ctx, store, known)
	}, nil
}

// checkPepper returns a failure if the store has digests of schemes besides the scheme of new
// digests and the known schemes.
func (c *call) checkPepper(ctx context.Context, store *keystore.Store, known []string) error {
	// The count begins with the store, and reads all keys.
	counts := store.Stats().OutdatedSchemes
	for ; counts == nil; counts = store.Stats().OutdatedSchemes {
		select {
		case <-ctx.Done():
			return interrupted("nothing was changed")
		case <-time.After(5 * time.Millisecond):
		}
	}
	others, bare := 0, 0
	for scheme, n := range counts {
		switch {
		case slices.Contains(known, scheme):
		case scheme == hashing.SHA256().Digest("").Scheme:
			bare += n
		default:
			others += n
		}
	}
	switch {
	case others > 0:
		return usage("the store in %s has %s of a pepper that is not given: give each pepper of the "+
			"server with --pepper-file ID=FILE, the current pepper first, and --pepper-file sha256 "+
			"if the server also takes digests without a pepper", c.place.dir,
			plural(others, "digest"))
	case bare > 0:
		return usage("the store in %s has %s without a pepper: if the server takes them besides the "+
			"digests of its pepper, as after an import, give --pepper-file sha256 after the pepper. "+
			"If the server has no pepper, give no --pepper-file", c.place.dir, plural(bare, "digest"))
	default:
		return nil
	}
}
