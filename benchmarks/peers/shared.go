package peers

import (
	"context"
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/hashicorp/golang-lru/v2/expirable"
	"github.com/jackc/pgx/v5/pgxpool"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// Shared is the name of the peer that shares its keys with other processes.
const Shared = "grpc-api-key, shared"

// TTL is the time to live of an entry in the cache before an engine. Services often choose a
// minute; a shorter time lets the workloads end sooner.
const TTL = 2 * time.Second

// A SharedPeer is a Peer whose credentials can be issued and revoked in another process.
type SharedPeer struct {
	Peer
	// Issue makes a new credential, and Revoke revokes the credential with the id. Both run in
	// another process than the guarded server.
	Issue  func(ctx context.Context) (id, credential string, err error)
	Revoke func(ctx context.Context, id string) error
}

// StartShared returns a peer that guards with a store. The other store issues and revokes keys.
func StartShared(ctx context.Context, store, other *keystore.Store) (*SharedPeer, error) {
	auth, err := interceptor.New(store)
	if err != nil {
		return nil, err
	}
	p := &SharedPeer{Peer: Peer{
		Name: Shared, How: "the default options, with a cache of 65,536 keys in each process",
		Options: auth.ServerOptions(),
		Check: func(ctx context.Context, credential string) error {
			_, err := store.Verify(ctx, credential)
			return err
		}}}
	p.Issue = func(ctx context.Context) (id, credential string, err error) {
		issued, err := other.Create(ctx, Spec())
		if err != nil {
			return "", "", err
		}
		return issued.Key.ID, issued.Secret.Reveal(), nil
	}
	p.Revoke = func(ctx context.Context, id string) error {
		return other.Revoke(ctx, id, "measured")
	}
	p.Bad = issueOne().credential
	return p, p.fill(ctx)
}

// A lookUpTable is where an engine has the digests of credentials that several processes look up.
type lookUpTable struct {
	engine string // for the names of the peers
	how    string // what a look-up is
	read   func(ctx context.Context, digest [sha256.Size]byte) (*principal, error)
	add    func(ctx context.Context, digest [sha256.Size]byte, id string) error
	remove func(ctx context.Context, digest [sha256.Size]byte) error
}

// start returns two peers: the first looks each credential up, and the second has a cache.
func (t *lookUpTable) start(ctx context.Context) ([]*SharedPeer, error) {
	each := guard(func(ctx context.Context, credential string) (*principal, error) {
		return t.read(ctx, sha256.Sum256([]byte(credential)))
	})
	each.Name = t.engine + " look-up"
	each.How = t.how + " by the SHA-256, for each call"

	cache := expirable.NewLRU[[sha256.Size]byte, *principal](1<<16, nil, TTL)
	cached := guard(func(ctx context.Context, credential string) (*principal, error) {
		digest := sha256.Sum256([]byte(credential))
		if p, ok := cache.Get(digest); ok {
			return p, nil
		}
		p, err := t.read(ctx, digest)
		if err == nil {
			cache.Add(digest, p)
		}
		return p, err
	})
	cached.Name = "LRU with a TTL before " + t.engine
	cached.How = fmt.Sprintf("golang-lru's expirable.LRU by SHA-256 in front of %s, with 65,536 "+
		"entries and a TTL of %v", t.engine, TTL)

	var all []*SharedPeer
	for _, guarded := range []*Peer{each, cached} {
		p := &SharedPeer{Peer: *guarded}
		p.Issue = func(ctx context.Context) (id, credential string, err error) {
			one := issueOne()
			return one.credential, one.credential, t.add(ctx, one.digest(), one.id)
		}
		p.Revoke = func(ctx context.Context, credential string) error {
			return t.remove(ctx, sha256.Sum256([]byte(credential)))
		}
		p.Bad = issueOne().credential
		if err := p.fill(ctx); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// StartEtcd returns the peers that read credentials from etcd.
func StartEtcd(ctx context.Context, client *clientv3.Client) ([]*SharedPeer, error) {
	key := func(digest [sha256.Size]byte) string { return fmt.Sprintf("/lookup/%x", digest) }
	t := &lookUpTable{
		engine: "etcd", how: "a linearizable read of etcd",
		read: func(ctx context.Context, digest [sha256.Size]byte) (*principal, error) {
			r, err := client.Get(ctx, key(digest)) // linearizable
			if err != nil {
				return nil, err
			}
			if len(r.Kvs) == 0 {
				return nil, errRefused
			}
			return &principal{string(r.Kvs[0].Value)}, nil
		},
		add: func(ctx context.Context, digest [sha256.Size]byte, id string) error {
			_, err := client.Put(ctx, key(digest), id)
			return err
		},
		remove: func(ctx context.Context, digest [sha256.Size]byte) error {
			_, err := client.Delete(ctx, key(digest))
			return err
		},
	}
	return t.start(ctx)
}

// StartPostgres returns the peers that read credentials from PostgreSQL.
func StartPostgres(ctx context.Context, pool *pgxpool.Pool) ([]*SharedPeer, error) {
	if err := fillPostgreSQL(ctx, pool, nil); err != nil {
		return nil, err
	}
	t := &lookUpTable{
		engine: "PostgreSQL", how: "a prepared SELECT of PostgreSQL",
		read: func(ctx context.Context, digest [sha256.Size]byte) (*principal, error) {
			return findPostgreSQL(ctx, pool, digest)
		},
		add: func(ctx context.Context, digest [sha256.Size]byte, id string) error {
			_, err := pool.Exec(ctx, "INSERT INTO api_keys (digest, id) VALUES ($1, $2)",
				digest[:], id)
			return err
		},
		remove: func(ctx context.Context, digest [sha256.Size]byte) error {
			_, err := pool.Exec(ctx, "UPDATE api_keys SET revoked_at = now() WHERE digest = $1",
				digest[:])
			return err
		},
	}
	return t.start(ctx)
}

// fill issues the credentials of the callers.
func (p *SharedPeer) fill(ctx context.Context) error {
	for range Clients {
		_, credential, err := p.Issue(ctx)
		if err != nil {
			return err
		}
		p.Good = append(p.Good, credential)
	}
	return nil
}
