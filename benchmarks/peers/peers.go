// Package peers has what users would otherwise run in the place of grpc-api-key, each as its own documentation sets it up:
// no peer is made slower than it need be. All of them guard the same service, over the same connections, and are sent
// credentials of one length but for the JWTs, which have their own.
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

// Clients is how many callers there are, each with a credential of its own; Population is how many credentials a peer that
// stores them has stored.
const (
	Clients    = 8
	Population = 10_000
)

// A Peer is one way to guard a server.
type Peer struct {
	Name string
	How  string // it works, in a line
	// Options guard a server.
	Options []grpc.ServerOption
	// Good are credentials of Clients callers. Bad has the form of one, and must not be admitted.
	Good []string
	Bad  string
	// Check verifies a credential, without a server around it. It is nil for no auth.
	Check func(ctx context.Context, credential string) error
	// Close ends what the peer has started.
	Close func() error
}

// A Skipped peer could not be started.
type Skipped struct{ Name, Why string }

// errMissing is wrapped by the error of a peer whose server is not installed.
var errMissing = errors.New("not installed")

// Start starts the peers that have a name in names, or all, if there are none. What they store goes into dir, or into
// directories that Close removes. A peer whose server is not installed is skipped.
func Start(ctx context.Context, dir string, names ...string) (started []*Peer, skipped []Skipped, err error) {
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

// Close ends the peers.
func Close(all []*Peer) error {
	var errs []error
	for _, p := range all {
		if p.Close != nil {
			errs = append(errs, p.Close())
		}
	}
	return errors.Join(errs...)
}

// A principal is what a peer's interceptor gives to handlers.
type principal struct{ id string }

type principalKey struct{}

var errRefused = status.Error(codes.Unauthenticated, "invalid credentials")

// guard makes a peer of a look-up, behind the interceptor that most would use for it.
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

// An issued is an opaque credential that a peer stores: of the same form, and so of the same length, as one of
// grpc-api-key's.
type issued struct{ id, credential string }

func (i issued) digest() [sha256.Size]byte { return sha256.Sum256([]byte(i.credential)) }

// issue makes Population credentials, and one more that nobody stores.
func issue() (stored []issued, unknown string) {
	format, err := token.NewFormat("oil", 64, keystore.ASCII62)
	if err != nil {
		panic(err) // it is the default
	}
	for range Population {
		id, text := format.New()
		stored = append(stored, issued{id.String(), text})
	}
	_, unknown = format.New()
	return stored, unknown
}

// credentials gives the peer those of the first callers.
func (p *Peer) credentials(stored []issued, unknown string) {
	for _, i := range stored[:Clients] {
		p.Good = append(p.Good, i.credential)
	}
	p.Bad = unknown
}
