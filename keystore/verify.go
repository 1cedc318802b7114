package keystore

import (
	"context"
	"errors"
	"net/netip"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/clientaddr"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Verify returns the key that a token is the text of, if it admits its bearer now.
//
// Otherwise the error wraps ErrDenied and says why; or it is ErrUnavailable, ErrCorrupt or ErrClosed, when the store
// cannot tell; or that of a context that is done.
func (s *Store) Verify(ctx context.Context, text string) (*Key, error) {
	e, err := s.admit(ctx, text)
	if err != nil {
		return nil, s.refuse(text, err)
	}
	if s.observer != nil {
		s.observer.Verified(Verification{Key: &e.key})
	}
	return &e.key, nil
}

// admit decides about a token. See fence.Fence for the steps.
func (s *Store) admit(ctx context.Context, text string) (*entry, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	// A text that matches a digest is a token, and any other is parsed before it is refused. So a hit is spared parsing
	// more than the ID, which is sought where tokens of the store's own format have it.
	var e *entry
	if hi, lo, ok := s.format.Locate(text); ok {
		e = s.fence.Hit(hi, lo)
	}
	var id token.ID
	var ticket fence.Ticket
	hit := e != nil
	if !hit {
		var ok bool
		if id, ok = token.Parse(text); !ok {
			return nil, ErrMalformed
		}
		e, ticket = s.fence.Get(id, nil)
		hit = e != nil
	}
	if !hit || e.overwritten() {
		if hit {
			id = e.ID
		}
		var err error
		if e, err = s.find(ctx, id, text); err != nil {
			return nil, err
		}
	}
	result := s.hasher.Match(e.digest, text)
	plain := e.plain && result == hashing.Match
	if !plain {
		if _, err := s.decide(ctx, e, text, result); err != nil {
			return nil, err
		}
	}
	if !hit {
		s.noteProof(e, result)
		s.fence.Put(id, e, ticket, nil)
	}
	if !plain {
		if err := e.grants.allow(); err != nil {
			return nil, err
		}
	}
	if s.usage.due(e) && !s.usage.note(e.ID, &e.used) {
		return nil, ErrClosed
	}
	return e, nil
}

// refuse counts a refusal, and returns its error.
func (s *Store) refuse(text string, err error) error {
	s.refused.Add(1)
	if s.observer != nil {
		r := Refusal{Err: err}
		if id, ok := token.Parse(text); ok {
			r.KeyID = id.String()
		}
		s.observer.Refused(r)
	}
	return err
}

// Bind opens a session for what lasts longer than a call, such as a stream or a websocket. Bind
// admits the same tokens as Verify. The session ends with the key. Its cause is then
//
//   - ErrRevoked if the key, or the secret that was used, was revoked, ErrDisabled if the key was
//     disabled, or ErrNarrowed if the key was narrowed: the session has ended before the call that
//     did it returns;
//   - ErrExpired, at the key's expiry, or at the end of the grace of a secret that was replaced;
//   - ErrClosed, if the store was closed.
//
// The session also ends with ctx. Call Close of the session when the work is over: until then the
// store keeps the session.
//
// The errors are those of Verify, and ErrNarrowed if the key was narrowed meanwhile. The session is
// nil with an error.
func (s *Store) Bind(ctx context.Context, text string) (*Session, error) {
	id, ok := token.Parse(text)
	if !ok {
		return nil, s.refuse(text, s.malformed(ctx))
	}
	l := s.newLive(ctx, id)
	e, rotation, err := s.admitBound(ctx, id, text, &l.Binding)
	if err != nil {
		l.end(err)
		return nil, s.refuse(text, err)
	}
	l.admit(e, rotation)
	// It may have ended since. The cause of ctx is not the key's: it may be a denial of another one.
	err = l.Cause()
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		l.release()
		return nil, s.refuse(text, err)
	}
	if s.observer != nil {
		s.observer.Verified(Verification{Key: &e.key, Bound: true})
		l.given()
	}
	l.session = Session{l}
	return &l.session, nil
}

// malformed returns what to say of a text that is no token: trouble comes first.
func (s *Store) malformed(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	return ErrMalformed
}

// bindAttempts is how often a Bind starts again because keys of its shard were cut while it read the store. One that
// meets a revocation in each of them is refused.
const bindAttempts = 8

// admitBound is admit, and registers b for a token that admits. It returns by which of the key's secrets.
func (s *Store) admitBound(ctx context.Context, id token.ID, text string, b *fence.Binding[entry]) (*entry, uint32, error) {
	if err := s.ready(ctx); err != nil {
		return nil, 0, err
	}
	for range bindAttempts {
		e, ticket := s.fence.Get(id, b)
		hit := e != nil
		if !hit || e.overwritten() {
			// With a hit, b is registered already: it hears of every change after this read.
			var err error
			if e, err = s.find(ctx, id, text); err != nil {
				if hit {
					s.fence.Release(id, b)
				}
				return nil, 0, err
			}
		}
		result := s.hasher.Match(e.digest, text)
		rotation, err := s.decide(ctx, e, text, result)
		if err != nil {
			if hit {
				s.fence.Release(id, b)
			}
			return nil, 0, err
		}
		if !hit {
			s.noteProof(e, result)
		}
		if hit || s.fence.Put(id, e, ticket, b) {
			if err := e.grants.allow(); err != nil {
				s.fence.Release(id, b)
				return nil, 0, err
			}
			if s.usage.due(e) {
				s.usage.note(e.ID, &e.used)
			}
			return e, rotation, nil
		}
		if err := s.serving(); err != nil {
			return nil, 0, err
		}
	}
	return nil, 0, trouble("bind", errors.New("keys are being changed too fast"))
}

// decide says by which of the entry's secrets the text is its token, and whether that admits now, given how the text
// matches the digest of the present one. All of it is asked on every use, cached or not; where the entry is plain, a Match
// is the answer.
func (s *Store) decide(ctx context.Context, e *entry, text string, result hashing.Result) (rotation uint32, err error) {
	rotation, outdated, err := s.prove(e, text, result)
	if err != nil {
		return 0, err
	}
	if err := e.permits(ctx, rotation); err != nil {
		return 0, err
	}
	if outdated {
		old := e.digest
		if rotation != e.rotations {
			old = e.previous
		}
		s.rehashLater(e, old, text)
	}
	return rotation, nil
}

// prove returns the rotation of the entry's secret that the text holds, given how the text matches the digest of the
// present secret, and whether an earlier hasher has made the digest of that secret. Otherwise it returns ErrMalformed or
// ErrUnknown.
func (s *Store) prove(e *entry, text string, result hashing.Result) (rotation uint32, outdated bool, err error) {
	rotation = e.rotations
	digest := &e.digest
	if result == hashing.Mismatch && e.previous.Sum != nil {
		rotation--
		digest = &e.previous
		result = s.hasher.Match(*digest, text)
	}
	if result != hashing.Mismatch && result != hashing.Match && result != hashing.MatchOutdated {
		return 0, false, errHasher
	}
	if result == hashing.Mismatch {
		if _, ok := token.Parse(text); !ok {
			return 0, false, ErrMalformed
		}
		if digest.Scheme != s.decoy.Scheme && !s.hasEarlierHasher() {
			s.foreign.Do(func() {
				s.log.Warn("API key refused whose digest the Hasher does not make; if the Hasher was changed, all earlier keys are: "+
					"use a hashing.Keyring that holds the earlier one",
					"id", token.ID(e.ID).String(), "scheme", digest.Scheme, "hasher", s.decoy.Scheme)
			})
		}
		return 0, false, ErrUnknown
	}
	return rotation, result == hashing.MatchOutdated, nil
}

// WithClientAddr tells Verify and Bind the address that a caller's connection comes from, for keys with AllowedNetworks.
// The interceptors do so by themselves.
func WithClientAddr(ctx context.Context, addr netip.Addr) context.Context {
	return clientaddr.NewContext(ctx, addr)
}

// find reads the store for a token that is not cached.
func (s *Store) find(ctx context.Context, id token.ID, text string) (*entry, error) {
	// The checksum spares the store a read for what was mistyped. A hit does without: the digest covers the whole text.
	if !token.ChecksumOK(text) {
		return nil, ErrMalformed
	}
	if !s.patient {
		limited, cancel := s.limited(ctx)
		defer cancel()
		ctx = limited
	}
	st, err := s.get(ctx, id)
	if errors.Is(err, ErrNotFound) {
		// As much work as for a key that exists, so that a slow hasher does not tell which IDs do.
		if s.hasher.Match(s.decoy, text) == failedMatch {
			return nil, errHasher
		}
		return nil, ErrUnknown
	}
	if err != nil {
		s.log.Error("API key could not be read", "id", id.String(), "error", err)
		return nil, err
	}
	e := st.entry()
	if e.digest.Scheme == s.decoy.Scheme {
		e.digest.Scheme = s.decoy.Scheme // one text for all, that is always in the processor's cache
	}
	s.texts.share(&e.key)
	e.grants.limit = s.limits.of(id, &e.key)
	return e, nil
}
