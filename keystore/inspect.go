package keystore

import (
	"context"
	"errors"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// ParseID returns the key ID in the text of a token, such as a leaked token, and true. ParseID
// needs no store. For a text that does not have the form of a token, ParseID returns "" and
// false.
//
// An ID is no secret, and anyone can write a text with any ID. So the ID does not prove that the
// sender holds the key. Before you revoke a key because of a stranger's report, call
// [Store.Inspect]. ParseID ignores the checksum, so ParseID also returns the ID of a token whose
// last characters are wrong.
func ParseID(text string) (id string, ok bool) {
	parsed, ok := token.Parse(text)
	if !ok {
		return "", false
	}
	return parsed.String(), true
}

// An Inspection is the result of Inspect for a token.
type Inspection struct {
	// KeyID is the ID in the token. The store may have no key with the ID. Empty means that the
	// text does not have the form of a token.
	KeyID string
	// Key is the key, with LastUsedAt and Live, if the token holds the key's secret. The secret may
	// be the current secret, or until the next rotation the previous secret. Nil means that the
	// token proves nothing, and Refusal is ErrMalformed or ErrUnknown.
	Key *Key
	// Refusal is the error that Verify would return now. Refusal wraps ErrDenied, or is a
	// *RateLimitError or a *CreditsError. Nil means that Verify would admit the token. Reason turns
	// a Refusal into a word.
	Refusal error
}

// Inspect returns the key of a token, and the reason if Verify would refuse the token. In contrast
// to Verify, Inspect has no effect: Inspect does not count as a use, takes nothing from the key's
// RateLimit and credits, does not call the Observer, changes no Stats, and caches nothing. Inspect
// always reads the storage, so Inspect is slower than Verify.
//
// As for Verify, the caller's address comes from ctx. For a key with AllowedNetworks, pass the
// address of the caller with WithClientAddr. Otherwise the Refusal is ErrNetworkNotAllowed. Inspect
// ignores WithCost, and answers for a Verify that takes one credit.
//
// The answer is for operators. To the sender of a token, every Inspection without a Key must look
// the same.
//
// An error means that the store cannot answer: ErrUnavailable, ErrCorrupt or ErrClosed, or the
// error of a context that has ended. The Inspection is nil then.
func (s *Store) Inspect(ctx context.Context, text string) (*Inspection, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	if !s.isFresh() {
		return nil, errStale // Verify refuses every token
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	i := new(Inspection)
	i.KeyID, _ = s.KeyID(text)
	err := s.tryToken(text, func(id token.ID, secret string) error {
		return s.inspect(ctx, i, id, secret)
	})
	if errors.Is(err, ErrDenied) {
		i.Refusal = err
		return i, nil
	}
	if err != nil {
		return nil, err
	}
	return i, nil
}

// inspect completes the Inspection of a token that holds the secret of a key. If the token does not
// hold the secret, inspect returns ErrUnknown.
func (s *Store) inspect(ctx context.Context, i *Inspection, id token.ID, secret string) error {
	kr, err := s.get(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return s.matchUnknown(ctx, id, secret)
	}
	if err != nil {
		return err
	}
	e := kr.cached()
	rotation, _, err := s.prove(ctx, e, secret, s.matchDigest(ctx, id, e.digest(), secret))
	if err == errLate {
		return s.inspect(ctx, i, id, secret)
	}
	if err != nil {
		return err
	}
	if e.key.LastUsedAt, err = s.lastUsed(ctx, id); err != nil {
		return err
	}
	e.key.Live = s.fence.BoundTo(id)
	i.KeyID, i.Key = e.key.ID, &e.key
	if i.Refusal = e.terms().permits(ctx, rotation); i.Refusal == nil {
		i.Refusal = s.limits.peek(id, i.Key)
	}
	if i.Refusal == nil && i.Key.Metered() {
		i.Refusal, err = s.peekCredits(ctx, id)
	}
	return err
}
