package peers

import (
	"context"
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/hashicorp/golang-lru/v2/expirable"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/grpc-api-key/grpc-api-key/interceptor"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The names of the peers that share their credentials with other processes.
const (
	Shared     = "grpc-api-key, shared"
	EtcdLookUp = "etcd look-up"
	EtcdTTL    = "LRU with a TTL before etcd"
)

// TTL is the time to live of an entry in the cache of EtcdTTL. Services often choose a minute; a
// shorter time lets the workloads end sooner.
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

// StartEtcd returns the peers that read credentials from etcd.
func StartEtcd(ctx context.Context, client *clientv3.Client) ([]*SharedPeer, error) {
	lookUp := func(ctx context.Context, digest [sha256.Size]byte) (*principal, error) {
		r, err := client.Get(ctx, etcdKey(digest)) // linearizable
		if err != nil {
			return nil, err
		}
		if len(r.Kvs) == 0 {
			return nil, errRefused
		}
		return &principal{string(r.Kvs[0].Value)}, nil
	}
	each := guard(func(ctx context.Context, credential string) (*principal, error) {
		return lookUp(ctx, sha256.Sum256([]byte(credential)))
	})
	each.Name = EtcdLookUp
	each.How = "a linearizable read of etcd by the SHA-256, for each call"

	cache := expirable.NewLRU[[sha256.Size]byte, *principal](1<<16, nil, TTL)
	cached := guard(func(ctx context.Context, credential string) (*principal, error) {
		digest := sha256.Sum256([]byte(credential))
		if p, ok := cache.Get(digest); ok {
			return p, nil
		}
		p, err := lookUp(ctx, digest)
		if err == nil {
			cache.Add(digest, p)
		}
		return p, err
	})
	cached.Name = EtcdTTL
	cached.How = fmt.Sprintf("golang-lru's expirable.LRU by SHA-256 in front of etcd, with 65,536 "+
		"entries and a TTL of %v", TTL)

	var all []*SharedPeer
	for _, guarded := range []*Peer{each, cached} {
		p := &SharedPeer{Peer: *guarded}
		p.Issue = func(ctx context.Context) (id, credential string, err error) {
			one := issueOne()
			key := etcdKey(one.digest())
			_, err = client.Put(ctx, key, one.id)
			return key, one.credential, err
		}
		p.Revoke = func(ctx context.Context, key string) error {
			_, err := client.Delete(ctx, key)
			return err
		}
		p.Bad = issueOne().credential
		if err := p.fill(ctx); err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
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

func etcdKey(digest [sha256.Size]byte) string { return fmt.Sprintf("/lookup/%x", digest) }
