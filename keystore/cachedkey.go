package keystore

import (
	"net/netip"
	"slices"
	"sync/atomic"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A cachedKey is the value that the fence caches: a key as callers see the key, and the fields by
// which the store decides. A cachedKey is immutable, except for the atomic fields, and for key.
// Callers must not write to key, but nothing prevents a write.
//
// If many keys are used at random, a hit spends most of its time waiting for the memory of the
// cachedKey. So the fields that a hit reads come first, in two cache lines. A hit reads both lines
// before hashing the token. The first line also holds the sum, and the memory is fetched during
// the hashing.
type cachedKey struct {
	fence.Node // the ID

	rotations uint32       // the number of earlier secrets
	used      atomic.Int64 // the minute of the last use that usage has recorded
	sum       [32]byte     // the memory of digest.Sum, if the sum fits

	digest       hashing.Digest // of the secret
	unrestricted bool           // the current secret is always admitted, from everywhere
	rehashing    atomic.Bool    // a new digest is queued or being written

	// The store decides by the fields below, by unrestricted and by the digests: see policy.go.
	// Callers get key, and can write to key. Callers cannot reach the fields below, so the store
	// decides by these fields and not by key.
	revoked, disabled bool
	grants            *grants // the initial value of key.grants

	key Key

	previous             hashing.Digest // of the previous secret; no Sum if the secret has ended
	notBefore, expiresAt int64          // nanoseconds since the Unix epoch; 0: no limit
	previousUntil        int64          // nanoseconds since the Unix epoch
	rateLimit            *RateLimit     // nil: no limit
	revision             uint64
}

func (e *cachedKey) node() *fence.Node { return &e.Node }

func (kr *keyRecord) cached() *cachedKey {
	r := kr.record
	hint := token.HintOf(r.Prefix, kr.id)
	g := &grants{scopes: slices.Clip(r.Scopes), metadata: r.Metadata}
	e := &cachedKey{
		Node:   fence.Node{ID: kr.id},
		grants: g,
		key: Key{
			grants:        g,
			ID:            token.IDInHint(hint),
			Name:          r.Name,
			Owner:         r.Owner,
			Hint:          hint,
			CreatedAt:     fromNanos(r.CreatedAt),
			ExpiresAt:     fromNanos(r.ExpiresAt),
			RevokedAt:     fromNanos(r.RevokedAt),
			RevokeReason:  r.RevokeReason,
			Revision:      kr.revision,
			DisabledAt:    fromNanos(r.DisabledAt),
			DisableReason: r.DisableReason,
			NotBefore:     fromNanos(r.NotBefore),
		},
		digest:    hashing.Digest{Scheme: r.DigestScheme, Sum: r.Digest},
		rotations: r.Rotations,
		revoked:   r.RevokedAt != 0 || kr.purged(),
		disabled:  r.DisabledAt != 0,
		notBefore: r.NotBefore,
		expiresAt: r.ExpiresAt,
		revision:  kr.revision,
	}
	if len(r.Digest) == len(e.sum) {
		e.digest.Sum = append(e.sum[:0], r.Digest...)
	}
	for _, network := range r.AllowedNetworks {
		// record.Decode has already parsed the network.
		g.networks = append(g.networks, netip.MustParsePrefix(network))
	}
	g.networks = slices.Clip(g.networks)
	if l := r.RateLimit; l != nil {
		e.key.RateLimit = RateLimit{PerSecond: l.PerSecond, Burst: int(l.Burst)}
		if limit := e.key.RateLimit; limit != (RateLimit{}) {
			e.rateLimit = &limit
		}
	}
	if kr.purged() {
		e.key.RevokedAt = fromNanos(r.PurgedAt) // in case a caller asks
	}
	if p := r.Previous; p != nil {
		e.previous = hashing.Digest{Scheme: p.DigestScheme, Sum: p.Digest}
		e.previousUntil = p.Until
		e.key.PreviousUntil = fromNanos(p.Until)
	}
	e.unrestricted = e.admits(e.rotations) == nil && e.unlimited()
	return e
}
