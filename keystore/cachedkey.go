package keystore

import (
	"net/netip"
	"slices"
	"sync/atomic"
	"unsafe"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A cachedKey is the value that the fence caches: a key as callers see the key, the sum of the
// secret, and the terms by which the store decides. A cachedKey is immutable, except for the atomic
// fields, and for key. Callers must not write to key, but nothing prevents a write.
//
// If many keys are used at random, a hit spends most of its time waiting for memory. So everything
// that most hits read is in the first 64 bytes. A cachedKey takes 416 bytes, a size class of Go.
type cachedKey struct {
	fence.Node // the ID

	// fresh is the mark of the minute of the last use that usage has recorded, if the terms are
	// plain. Otherwise fresh is 0, which is no mark. So one comparison tells a hit that the sum
	// decides alone, and that the use is recorded already.
	fresh atomic.Uint32
	sum   [32]byte // of the digest of the secret, if the terms name SHA256

	key Key // begins with the pointer to grants, the last of the first 64 bytes

	grants keyGrants // key.grants is its address, unless a caller has overwritten key
	text   [48]byte  // the memory of the texts of key, as long as there is space
}

// The terms of a key are what the store decides by, see policy.go, and the other things that are
// the same for many keys. Terms are immutable when a cachedKey is published, except for the atomic
// fields. Callers cannot reach the terms, so the store decides by the terms and not by key. Several
// cachedKeys share terms: see shareTerms.
type terms struct {
	grants // must be the first field: see cachedKey.terms

	scheme string // of the digest of the secret
	sum    []byte // of the digest of the secret, unless inline is set

	inline bool // cachedKey.sum is the sum of the digest
	// plain says that a matching digest alone admits the bearer, always, from everywhere and at any
	// rate, and that the digest is inline and has the scheme of the Hasher.
	plain             bool
	revoked, disabled bool
	rehashing         atomic.Bool   // a new digest is queued or being written
	used              atomic.Uint32 // like cachedKey.fresh, if the terms are not plain

	rotations            uint32          // the number of earlier secrets
	previous             *previousSecret // nil if the previous secret has ended
	notBefore, expiresAt int64           // nanoseconds since the Unix epoch; 0: no limit
	limits               *useLimits      // nil: no limits
	revision             uint64
}

// useLimits say how often a key may be used.
type useLimits struct {
	rate  RateLimit // zero: no limit
	since uint64    // the revision at which the credits were set; 0: no credits
}

type previousSecret struct {
	digest hashing.Digest
	until  int64 // nanoseconds since the Unix epoch
}

func (e *cachedKey) node() *fence.Node { return &e.Node }

// terms returns the terms of the key. The grants of a cachedKey are always the first field of
// terms. A Key points to its grants, and not to the terms: reflect.DeepEqual and dumps follow
// pointers, and would compare and show the digest and marks. A second pointer would make every
// cachedKey larger by a size class.
func (e *cachedKey) terms() *terms { return (*terms)(unsafe.Pointer(e.grants.grants)) }

// digest returns the digest of the secret.
func (e *cachedKey) digest() hashing.Digest {
	t := e.terms()
	if t.inline {
		return hashing.Digest{Scheme: t.scheme, Sum: e.sum[:]}
	}
	return hashing.Digest{Scheme: t.scheme, Sum: t.sum}
}

// since returns the revision at which the credits of the key were set, or 0 if the key has none.
func (e *cachedKey) since() uint64 {
	if l := e.terms().limits; l != nil {
		return l.since
	}
	return 0
}

// hasSum reports whether the digest of the secret has the scheme, and sum is the sum of the digest.
func (e *cachedKey) hasSum(scheme string) bool {
	t := e.terms()
	return t.inline && t.scheme == scheme
}

// recorded returns where usage keeps the mark of the last use that usage has recorded.
func (e *cachedKey) recorded() *atomic.Uint32 {
	if t := e.terms(); !t.plain {
		return &t.used
	}
	return &e.fresh
}

func (kr *keyRecord) cached() *cachedKey {
	r := kr.record
	t := &terms{
		grants:    grants{scopes: slices.Clip(r.Scopes), metadata: r.Metadata},
		scheme:    r.DigestScheme,
		rotations: r.Rotations,
		revoked:   r.RevokedAt != 0 || kr.purged(),
		disabled:  r.DisabledAt != 0,
		notBefore: r.NotBefore,
		expiresAt: r.ExpiresAt,
		revision:  kr.revision,
	}
	e := &cachedKey{Node: fence.Node{ID: kr.id}, grants: keyGrants{&t.grants}}
	free := e.text[:0]
	hint := e.keep(&free, token.HintOf(r.Prefix, kr.id))
	e.key = Key{
		grants:        &e.grants,
		ID:            token.IDInHint(hint),
		Name:          e.keep(&free, r.Name),
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
	}
	if len(r.Digest) == len(e.sum) {
		t.inline = true
		copy(e.sum[:], r.Digest)
	} else {
		t.sum = r.Digest
	}
	for _, network := range r.AllowedNetworks {
		// record.Decode has already parsed the network.
		t.networks = append(t.networks, netip.MustParsePrefix(network))
	}
	t.networks = slices.Clip(t.networks)
	if l := r.RateLimit; l != nil {
		e.key.RateLimit = RateLimit{PerSecond: l.PerSecond, Burst: int(l.Burst)}
	}
	if e.key.RateLimit != (RateLimit{}) || r.CreditsRevision != 0 {
		t.limits = &useLimits{e.key.RateLimit, r.CreditsRevision}
	}
	if r.CreditsRevision != 0 {
		t.quota = &quota{revision: kr.revision, since: r.CreditsRevision}
	}
	if kr.purged() {
		e.key.RevokedAt = fromNanos(r.PurgedAt) // in case a caller asks
	}
	if p := r.Previous; p != nil {
		if len(p.Digest) > 0 {
			digest := hashing.Digest{Scheme: p.DigestScheme, Sum: p.Digest}
			t.previous = &previousSecret{digest, p.Until}
		}
		e.key.PreviousUntil = fromNanos(p.Until)
	}
	return e
}

// keep returns a copy of the text in the memory of e. free is the unused memory. If the text does
// not fit, keep returns the text itself.
func (e *cachedKey) keep(free *[]byte, text string) string {
	begin := len(*free)
	if text == "" || begin+len(text) > len(e.text) {
		return text
	}
	*free = append(*free, text...)
	return unsafe.String(&e.text[begin], len(text)) // these bytes are never written again
}

// shareTerms prepares a cachedKey for the cache. If the terms of the key are plain, and are those
// of another key too, the two share the terms. The cachedKey must not be published yet.
func (s *Store) shareTerms(e *cachedKey) {
	t := e.terms()
	if t.scheme == s.dummyDigest.Scheme {
		// All cached keys share one string, so the string is always in the processor's cache.
		t.scheme = s.dummyDigest.Scheme
		t.plain = t.inline && t.unlimited() && t.admits(t.rotations) == nil
	}
	if t.plain && t.previous == nil && t.metadata == nil {
		e.grants.grants = &s.shared.share(t).grants
	}
}
