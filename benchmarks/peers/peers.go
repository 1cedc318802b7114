// Package peers contains the alternatives to grpc-api-key. Each peer is configured as in its
// documentation, and no peer is slower than necessary. All peers guard the same service over the
// same kind of connections. All credentials have the same length, except JWTs, whose length is
// given by their format.
package peers

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/auth"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The names of the peers.
const (
	NoAuth     = "no auth"
	APIKey     = "grpc-api-key"
	Map        = "constant token in a map"
	LookAside  = "LRU with a TTL before Badger"
	HS256      = "JWT HS256"
	RS256      = "JWT RS256"
	ES256      = "JWT ES256"
	EdDSA      = "JWT EdDSA"
	Redis      = "Redis look-up"
	PostgreSQL = "PostgreSQL look-up"
)

// Clients is the number of callers. Each caller has another credential. Population is the number of
// credentials in each peer that stores credentials.
const (
	Clients    = 8
	Population = 10_000
)

// A Peer is one way to guard a server.
type Peer struct {
	Name string
	How  string // how the peer works, in one line
	// Options guard a server.
	Options []grpc.ServerOption
	// Good are the valid credentials of the callers, one for each of the Clients callers. Bad has
	// the same form, and the peer must refuse Bad.
	Good []string
	Bad  string
	// Check verifies a credential without a server. Check is nil for the peer without auth.
	Check func(ctx context.Context, credential string) error
	// Close stops everything that the peer has started.
	Close func() error
}

// Skipped describes a peer that could not be started.
type Skipped struct{ Name, Why string }

// errMissing is wrapped by the error of a start function if the server of the peer is not
// installed.
var errMissing = errors.New("not installed")

// Start starts the peers with the given names, or all peers if there are no names. The peers store
// their data in dir, or in directories that Close removes. Start skips a peer if its server is not
// installed.
func Start(
	ctx context.Context, dir string, names ...string,
) (started []*Peer, skipped []Skipped, err error) {
	wanted := func(name string) bool {
		for _, n := range names {
			if n == name {
				return true
			}
		}
		return len(names) == 0
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Close(started))
			started = nil
		}
	}()
	for i, p := range []struct {
		name  string
		start func(ctx context.Context, dir string) (*Peer, error)
	}{
		{NoAuth, startNoAuth},
		{APIKey, startAPIKey},
		{Map, startMap},
		{LookAside, startLookAside},
		{HS256, startJWT(HS256)},
		{EdDSA, startJWT(EdDSA)},
		{ES256, startJWT(ES256)},
		{RS256, startJWT(RS256)},
		{Redis, startRedis},
		{PostgreSQL, startPostgreSQL},
	} {
		if !wanted(p.name) {
			continue
		}
		own := filepath.Join(dir, fmt.Sprintf("peer%d", i))
		if err := os.MkdirAll(own, 0o700); err != nil {
			return started, skipped, err
		}
		peer, err := p.start(ctx, own)
		if errors.Is(err, errMissing) {
			skipped = append(skipped, Skipped{p.name, err.Error()})
			continue
		}
		if err != nil {
			return started, skipped, fmt.Errorf("%s: %w", p.name, err)
		}
		peer.Name = p.name
		started = append(started, peer)
	}
	return started, skipped, nil
}

// Close stops the peers.
func Close(all []*Peer) error {
	var errs []error
	for _, p := range all {
		if p.Close != nil {
			errs = append(errs, p.Close())
		}
	}
	return errors.Join(errs...)
}

// A principal is the identity of a caller. The interceptor of a peer passes the principal to the
// handlers.
type principal struct{ id string }

type principalKey struct{}

var errRefused = status.Error(codes.Unauthenticated, "invalid credentials")

// guard returns a peer that calls lookup for each credential, inside the auth interceptor of
// go-grpc-middleware, which most users would choose.
func guard(lookup func(ctx context.Context, credential string) (*principal, error)) *Peer {
	authenticate := func(ctx context.Context) (context.Context, error) {
		credential, err := auth.AuthFromMD(ctx, "bearer")
		if err != nil {
			return nil, err
		}
		p, err := lookup(ctx, credential)
		if err != nil {
			return nil, err
		}
		return context.WithValue(ctx, principalKey{}, p), nil
	}
	return &Peer{
		Options: []grpc.ServerOption{
			grpc.ChainUnaryInterceptor(auth.UnaryServerInterceptor(authenticate)),
			grpc.ChainStreamInterceptor(auth.StreamServerInterceptor(authenticate)),
		},
		Check: func(ctx context.Context, credential string) error {
			_, err := lookup(ctx, credential)
			return err
		},
	}
}

// An issued is an opaque credential in the storage of a peer. The credential has the same form, and
// so the same length, as a key of grpc-api-key.
type issued struct{ id, credential string }

func (i issued) digest() [sha256.Size]byte { return sha256.Sum256([]byte(i.credential)) }

// issue returns Population credentials for the storage of a peer, and one unknown credential.
func issue() (stored []issued, unknown string) {
	for range Population {
		stored = append(stored, issueOne())
	}
	return stored, issueOne().credential
}

func issueOne() issued {
	format, err := token.NewFormat("oil", 64, keystore.ASCII62)
	if err != nil {
		panic(err) // cannot happen: this is the default format
	}
	id, text := format.New()
	return issued{id.String(), text}
}

// credentials sets the good and the bad credentials of the peer.
func (p *Peer) credentials(stored []issued, unknown string) {
	for _, i := range stored[:Clients] {
		p.Good = append(p.Good, i.credential)
	}
	p.Bad = unknown
}
