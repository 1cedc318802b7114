package keystore

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Verify returns the key for a token if the key admits the bearer now.
//
// Otherwise Verify returns an error. If the token is refused, the error wraps ErrDenied and gives
// the reason, or is a *RateLimitError or a *CreditsError. If the store cannot decide, the error is
// ErrUnavailable, ErrCorrupt or ErrClosed. If ctx is done, the error is the error of ctx.
//
// Verify takes credits from a key that has Credits: one, or as many as WithCost says.
func (s *Store) Verify(ctx context.Context, text string) (*Key, error) {
	if s.processes != nil && !s.processes.cluster.Fresh() {
		return nil, s.refuse(text, s.refuseStale(ctx))
	}
	e, err := s.admit(ctx, text)
	if err != nil {
		return nil, s.refuse(text, err)
	}
	if s.observer != nil {
		s.observer.Verified(Verification{Key: &e.key})
	}
	return &e.key, nil
}

// admit returns the key for a token, or the reason for a refusal. The caller has asked the gate.
// For a key in the front of the fence, admit takes no lock. admit leaves every other key to
// admitBound.
func (s *Store) admit(ctx context.Context, text string) (*cachedKey, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	// A text that matches a digest is a token, and decide parses every other text before the
	// refusal. So a hit needs only the ID. Locate reads the ID at its position in tokens of the
	// store's own format.
	var sum *[sha256.Size]byte // of the text; nil: not computed
	if hi, lo, ok := s.format.Locate(text); ok && s.fence.MayHit(lo) {
		// The sum comes before the look-up. A processor works some hundred instructions ahead, so
		// in this order the processor fetches the memory of the key while it hashes. In the other
		// order, a hit among many keys would take half as long again. MayHit makes no hit wait,
		// because the processor does not wait for the result of a condition that is usually true.
		var memory [sha256.Size]byte
		if s.summer != nil {
			memory = s.summer.Sum256(text)
			sum = &memory
		}
		if e := s.fence.Hit(hi, lo); e != nil && !e.overwritten() {
			plain := !s.usage.due(&e.fresh) // fresh holds a mark only if the terms are plain
			var result hashing.Result
			if plain && sum != nil {
				result = matchSums(&e.sum, sum)
			} else {
				result = s.match(ctx, e, text, sum)
			}
			if plain && result == hashing.Match {
				s.counts.calls.Add(hitAdmitted)
				return e, nil // by far the most frequent case: nothing to decide or to note
			}
			rotation, err := s.decide(ctx, e, text, result)
			admits := err == nil
			if admits {
				err = s.use(ctx, e, rotation, false)
			}
			if err == errLate {
				if err := s.readyAgain(ctx); err != nil {
					return nil, err
				}
				return s.admitParsed(ctx, text, sum, admits)
			}
			if _, ok := token.Parse(text); !ok && err == ErrUnknown {
				err = ErrMalformed // Locate does not parse
			}
			if err != nil {
				s.counts.calls.Add(hitRefused)
				return nil, err
			}
			s.counts.calls.Add(hitAdmitted)
			return e, nil
		}
	}
	return s.admitParsed(ctx, text, sum, false)
}

// admitParsed is admit without the look at the front of the fence. limited is that of admitBound.
func (s *Store) admitParsed(
	ctx context.Context, text string, sum *[sha256.Size]byte, limited bool,
) (e *cachedKey, err error) {
	err = s.tryToken(text, func(id token.ID, secret string) error {
		if secret != text {
			sum = nil // the sum of the whole text
		}
		var err error
		e, _, err = s.admitBound(ctx, id, secret, sum, nil, limited)
		return err
	})
	if err != nil {
		return nil, err
	}
	s.counts.calls.Add(otherAdmitted)
	return e, nil
}

// A summer is a Hasher whose digests are the SHA-256 of the token.
type summer interface {
	Sum256(token string) [sha256.Size]byte
}

// match compares the text with the digest of the key's secret. sum is the SHA-256 of the text, or
// nil.
func (s *Store) match(
	ctx context.Context, e *cachedKey, text string, sum *[sha256.Size]byte,
) hashing.Result {
	if sum != nil && e.hasSum(s.dummyDigest.Scheme) {
		return matchSums(&e.sum, sum)
	}
	return s.matchDigest(ctx, e.ID, e.digest(), text)
}

// matchSums compares two sums in constant time.
func matchSums(a, b *[sha256.Size]byte) hashing.Result {
	var differ uint64
	for i := 0; i < len(a); i += 8 {
		differ |= binary.LittleEndian.Uint64(a[i:]) ^ binary.LittleEndian.Uint64(b[i:])
	}
	if differ != 0 {
		return hashing.Mismatch
	}
	return hashing.Match
}

// refuse counts a refusal, notifies the observer, and returns err.
func (s *Store) refuse(text string, err error) error {
	s.counts.calls.Add(reasonOf(err))
	if s.observer != nil {
		r := Refusal{Err: err}
		r.KeyID, _ = s.KeyID(text)
		s.observer.Refused(r)
	}
	return err
}

// Bind opens a session for a use of a key that lasts longer than a call, such as a stream or a
// websocket. Bind accepts the same tokens as Verify. The session ends with the key. The cause of
// the session is then
//
//   - ErrRevoked if the key, or the secret that was used, was revoked, ErrDisabled if the key was
//     disabled, ErrNotYetValid if NotBefore was set to a time in the future, or ErrNarrowed if the
//     key was narrowed: the session has ended before the call that changed the key returns;
//   - ErrExpired, at the key's expiry, or at the end of the grace of a secret that was replaced;
//   - ErrClosed, if the store was closed;
//   - ErrUnavailable, if several processes have the store open, and this process has lost contact
//     with the others: see Options.Freshness.
//
// The session also ends with ctx. Call Close of the session when the work is over. The store keeps
// the session until Close is called.
//
// Bind returns the same errors as Verify, and ErrNarrowed if the key was narrowed while Bind ran.
// With an error, the session is nil.
func (s *Store) Bind(ctx context.Context, text string) (*Session, error) {
	if err := s.ready(ctx); err != nil {
		return nil, s.refuse(text, err)
	}
	if !s.isFresh() {
		return nil, s.refuse(text, s.refuseStale(ctx))
	}
	var b *boundContext
	var e *cachedKey
	err := s.tryToken(text, func(id token.ID, secret string) error {
		b = s.newBoundContext(ctx, id)
		found, rotation, err := s.admitBound(ctx, id, secret, nil, &b.Binding, false)
		if err != nil {
			b.cancelContext(err)
			return err
		}
		e = found
		b.markAdmitted(e, rotation)
		return nil
	})
	if err != nil {
		return nil, s.refuse(text, err)
	}
	// The context may have ended after admitBound, and the gate may have closed: Cause asks the
	// gate again. Bind returns the error of ctx and not the cause of ctx, because the cause may be
	// a denial of another key.
	if s.isWrong(noSecondLook) {
		err = b.endCause()
	} else {
		err = b.Cause()
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		b.release()
		return nil, s.refuse(text, err)
	}
	s.counts.calls.Add(otherAdmitted)
	b.countsEnd.Store(true)
	b.countEnd()
	if s.observer != nil {
		s.observer.Verified(Verification{Key: &e.key, Bound: true})
		b.announced()
	}
	b.session = Session{b}
	return &b.session, nil
}

// bindAttempts is how many attempts a Bind makes. An attempt fails if contexts of keys in the same
// shard were ended while Bind read the store. A Bind that meets a revocation in each attempt is
// refused. An attempt of Bind or Verify that has waited may fail too: see errLate.
const bindAttempts = 8

// admitBound returns the key for a token and the rotation of the secret in the token, or the reason
// for a refusal. admitBound registers b for the key, unless b is nil or the token is refused.
// limited means that the call has taken a use from the key's RateLimit already. See fence.Fence for
// the steps.
func (s *Store) admitBound(
	ctx context.Context, id token.ID, text string, sum *[sha256.Size]byte,
	b *fence.Binding[cachedKey], limited bool,
) (_ *cachedKey, _ uint32, err error) {
	if b != nil {
		defer func() {
			if err != nil {
				s.fence.Release(id, b) // does nothing if b is not registered
			}
		}()
	}
	for range bindAttempts {
		e, ticket := s.fence.Get(id, b)
		hit := e != nil
		if !hit || e.overwritten() {
			// After a hit, b is registered already. So b is notified of every change after this
			// read.
			if e, err = s.find(ctx, id, text, sum); err != nil {
				return nil, 0, err
			}
		}
		result := s.match(ctx, e, text, sum)
		rotation, err := s.decide(ctx, e, text, result)
		if err == nil {
			if !hit {
				s.noteProof(e, result)
			}
			if !hit && !s.fence.Put(id, e, ticket, b) {
				if err := s.serving(); err != nil {
					return nil, 0, err
				}
				continue
			}
			err = s.use(ctx, e, rotation, limited)
			limited = true
		}
		if err != errLate {
			return e, rotation, err
		}
		if err := s.readyAgain(ctx); err != nil {
			return nil, 0, err
		}
	}
	return nil, 0, wrapErr("bind", errors.New("too many concurrent revocations, try again"))
}

// readyAgain returns nil if a call that has waited may look at the key again. The store may have
// been closed in the meantime, and the gate too.
func (s *Store) readyAgain(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	if !s.isFresh() {
		return errStale
	}
	return nil
}

// use takes one use of an admitted key from the key's RateLimit, takes the cost of the call from
// the key's credits, and notes the use. With limited, the call has taken the use from the RateLimit
// already. use returns a *RateLimitError if the limit is reached, the errors of Key.Spend, and
// ErrClosed if the use is too late to be noted. If the caller must read the record again, use
// returns errLate, and has taken no credits.
func (s *Store) use(ctx context.Context, e *cachedKey, rotation uint32, limited bool) error {
	if q := e.grants.quota; q != nil {
		cost, paid := int64(0), false
		if q.since != 0 {
			cost, paid = costOf(ctx)
		}
		if !limited && !paid {
			if err := e.grants.allow(); err != nil {
				return err
			}
		}
		if err := e.grants.spend(ctx, cost, decision{e.terms(), rotation}); err != nil {
			return err
		}
	}
	if recorded := e.recorded(); s.usage.due(recorded) && !s.usage.note(e.ID, recorded) {
		return ErrClosed
	}
	return nil
}

// decide returns the rotation of the key's secret that the text holds, or the reason why the
// secret does not admit the bearer now. The argument result says how the text matches the digest of
// the present secret. The store decides on every use, cached or not. If the caller must read the
// record again, decide returns errLate.
func (s *Store) decide(
	ctx context.Context, e *cachedKey, text string, result hashing.Result,
) (rotation uint32, err error) {
	rotation, outdated, err := s.prove(ctx, e, text, result)
	if err != nil {
		return 0, err
	}
	t := e.terms()
	if err := t.permits(ctx, rotation); err != nil {
		return 0, err
	}
	if outdated {
		old := e.digest()
		if rotation != t.rotations {
			old = t.previous.digest
		}
		if s.rehashLater(e, old, text) {
			return 0, errLate
		}
	}
	return rotation, nil
}

// prove returns the rotation of the key's secret that the text holds, and whether an earlier
// hasher has made the digest of the secret. The argument result says how the text matches the
// digest of the present secret. If the text holds no secret of the key, prove returns ErrUnknown.
// If the caller must read the record again, prove returns errLate.
func (s *Store) prove(
	ctx context.Context, e *cachedKey, text string, result hashing.Result,
) (rotation uint32, outdated bool, err error) {
	t := e.terms()
	rotation = t.rotations
	scheme := t.scheme
	if result == hashing.Mismatch && t.previous != nil {
		rotation--
		scheme = t.previous.digest.Scheme
		result = s.matchDigest(ctx, e.ID, t.previous.digest, text)
	}
	if result == busyMatch {
		return 0, false, busyError(ctx)
	}
	if result == lateMatch {
		return 0, false, errLate
	}
	if result != hashing.Mismatch && result != hashing.Match && result != hashing.MatchOutdated {
		return 0, false, errHasher
	}
	if result == hashing.Mismatch {
		if scheme != s.dummyDigest.Scheme && !s.hasEarlierHasher() {
			s.warnScheme.Do(func() {
				s.log.Warn("API key refused whose digest the Hasher does not make; if you changed "+
					"the Hasher, every earlier key is refused too: use a hashing.Keyring that "+
					"holds the earlier Hasher",
					"id", token.ID(e.ID).String(), "scheme", scheme,
					"hasher", s.dummyDigest.Scheme)
			})
		}
		return 0, false, ErrUnknown
	}
	return rotation, result == hashing.MatchOutdated, nil
}

// WithClientAddr returns a context that tells Verify and Bind the address of a caller's connection,
// for keys with AllowedNetworks. The interceptors set the address automatically.
func WithClientAddr(ctx context.Context, addr netip.Addr) context.Context {
	return clientaddr.NewContext(ctx, addr)
}

// find reads the key of an uncached token from the store.
func (s *Store) find(
	ctx context.Context, id token.ID, text string, sum *[sha256.Size]byte,
) (*cachedKey, error) {
	ctx, cancel := s.limitedMiss(ctx)
	defer cancel()
	kr, err := s.getForCaller(ctx, id)
	if errors.Is(err, ErrNotFound) {
		if sum != nil {
			return nil, ErrUnknown
		}
		return nil, s.matchUnknown(ctx, id, text)
	}
	if err != nil {
		if !errors.Is(err, errManyReads) { // one line for each call would make the trouble worse
			s.log.Error("API key could not be read", "id", id.String(), "error", err)
		}
		return nil, err
	}
	e := kr.cached()
	e.key.Owner = s.interner.Intern(e.key.Owner)
	t := e.terms()
	s.interner.InternAll(t.scopes)
	s.attachQuota(e)
	s.shareTerms(e)
	return e, nil
}

// matchUnknown returns the error for the token of a key that does not exist. The Hasher does as
// much work as for an existing key. Otherwise the time of a slow Hasher would reveal which IDs
// exist.
func (s *Store) matchUnknown(ctx context.Context, id token.ID, text string) error {
	switch s.matchDigest(ctx, id, s.dummyDigest, text) {
	case failedMatch:
		return errHasher
	case busyMatch:
		return busyError(ctx)
	default:
		return ErrUnknown
	}
}

// attachQuota connects a key from the backend with its limiter and its account.
func (s *Store) attachQuota(e *cachedKey) {
	t := e.terms()
	if t.limits == nil {
		return
	}
	if t.quota == nil {
		t.quota = new(quota)
	}
	q := t.quota
	q.limiter = s.limits.of(e.ID, &e.key)
	if q.since != 0 {
		q.accounts = s.accounts
		q.account.Store(s.accounts.of(e.ID, q.revision, q.since, t.stopped()))
	}
}

// getForCaller is get, for Verify and Bind.
func (s *Store) getForCaller(ctx context.Context, id token.ID) (*keyRecord, error) {
	if s.reads == nil {
		return s.get(ctx, id)
	}
	e, err := s.reads.read(ctx, id)
	return s.decode(ctx, e, err)
}
