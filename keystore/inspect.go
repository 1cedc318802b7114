package keystore

import (
	"context"
	"errors"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// ParseID returns the key ID in the text of a token, such as a token that has leaked, and true. It needs no store. A text
// that has not the form of a token gives "" and false.
//
// An ID is no secret, and anybody can write a text with any ID in it. So the ID does not prove that its sender holds
// the key: before a stranger's report revokes a key, ask [Store.Inspect]. ParseID does not look at the checksum, so a
// token whose last characters are wrong has its ID too.
func ParseID(text string) (id string, ok bool) {
	parsed, ok := token.Parse(text)
	if !ok {
		return "", false
	}
	return parsed.String(), true
}

// An Inspection is what Inspect has found out about a token.
type Inspection struct {
	// KeyID is the ID that the token names. The store need not have such a key. Empty means that the text has not the
	// form of a token.
	KeyID string
	// Key is the key, with its LastUsedAt, if the token holds the key's secret: the present secret, or the secret
	// before, until the next rotation. Nil means that the token proves nothing, and Refusal is ErrMalformed or
	// ErrUnknown.
	Key *Key
	// Refusal is the error that Verify would return now: it wraps ErrDenied, or is a *RateLimitError. Nil means that
	// Verify would admit the token. Reason turns a Refusal into a word.
	Refusal error
}

// Inspect returns which key a token is of, and why Verify would refuse the token, if so. In contrast to Verify, Inspect
// has no effect: it does not count as a use, takes nothing from the key's RateLimit, does not call the Observer, changes
// no Stats, and caches nothing. It always reads the storage, so it is slower than Verify.
//
// As for Verify, the caller's address is that of ctx: for a key with AllowedNetworks, say with WithClientAddr whose
// call is meant, or the Refusal is ErrNetworkNotAllowed.
//
// The answer is for operators. To the sender of a token, every Inspection without a Key must look the same.
//
// An error means that the store cannot tell: ErrUnavailable, ErrCorrupt or ErrClosed, or the error of a context that is
// done. The Inspection is nil then.
func (s *Store) Inspect(ctx context.Context, text string) (*Inspection, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	id, ok := token.Parse(text)
	if !ok {
		return &Inspection{Refusal: ErrMalformed}, nil
	}
	i := &Inspection{KeyID: id.String()}
	if !token.ChecksumOK(text) {
		i.Refusal = ErrMalformed
		return i, nil
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	st, err := s.get(ctx, id)
	if errors.Is(err, ErrNotFound) {
		if s.hasher.Match(s.decoy, text) == failedMatch { // see find
			return nil, errHasher
		}
		i.Refusal = ErrUnknown
		return i, nil
	}
	if err != nil {
		return nil, err
	}
	e := st.entry()
	rotation, _, err := s.prove(e, text, s.hasher.Match(e.digest, text))
	if errors.Is(err, errHasher) {
		return nil, err
	}
	if err != nil {
		i.Refusal = err
		return i, nil
	}
	if e.key.LastUsedAt, err = s.lastUsed(ctx, id); err != nil {
		return nil, err
	}
	i.Key = &e.key
	if i.Refusal = e.permits(ctx, rotation); i.Refusal == nil {
		i.Refusal = s.limits.peek(id, i.Key)
	}
	return i, nil
}
