package keystore

import (
	"context"
	"errors"
	"time"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// Verify returns the key that a token is the text of, if it admits its bearer now.
//
// Otherwise the error wraps ErrDenied and says why; or it is ErrUnavailable, ErrCorrupt or ErrClosed, when the store
// cannot tell; or that of a context that is done.
func (s *Store) Verify(ctx context.Context, text string) (*Key, error) {
	e, err := s.admit(ctx, text, nil)
	if err != nil {
		return nil, err
	}
	return &e.key, nil
}

// Bind is Verify for what lives longer than a call, such as a stream or a websocket. The context that it returns is
// derived from ctx and ends with the key: its cause (see [context.Cause]) is ErrRevoked or ErrDisabled, and then it
// was cancelled before the call that revoked or disabled the key returned; or ErrExpired, at the key's expiry; or
// ErrClosed. The key is what it was when bound.
//
// Call the CancelFunc when the work is over: until then the store keeps the context. The errors are those of Verify,
// and the other results are nil with them.
func (s *Store) Bind(ctx context.Context, text string) (context.Context, *Key, context.CancelFunc, error) {
	bound, cancel := context.WithCancelCause(ctx)
	b := &fence.Binding{Cancel: cancel}
	e, err := s.admit(ctx, text, b)
	if err != nil {
		cancel(err)
		return nil, nil, nil, err
	}
	var expiry *time.Timer
	if at := e.key.ExpiresAt; !at.IsZero() {
		expiry = time.AfterFunc(time.Until(at), func() { cancel(ErrExpired) })
	}
	id, _ := token.ParseID(e.key.ID)
	release := func() {
		if expiry != nil {
			expiry.Stop()
		}
		s.fence.Release(id, b)
		cancel(context.Canceled)
	}
	// It may have been cut since.
	if err := context.Cause(bound); err != nil {
		release()
		return nil, nil, nil, err
	}
	return bound, &e.key, release, nil
}

// bindAttempts is how often a Bind starts again because keys of its shard were cut while it read the store. One that
// meets a revocation in each of them is refused.
const bindAttempts = 8

// admit decides, and registers b, unless that is nil, for a token that admits. See fence.Fence for the steps.
func (s *Store) admit(ctx context.Context, text string, b *fence.Binding) (*entry, error) {
	if err := s.serving(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	id, ok := token.Parse(text)
	if !ok {
		return nil, ErrMalformed
	}
	for range bindAttempts {
		e, ticket := s.fence.Get(id, b)
		hit := e != nil
		if !hit {
			var err error
			if e, err = s.find(ctx, id, text); err != nil {
				return nil, err
			}
		}
		if err := s.decide(e, text); err != nil {
			if hit && b != nil {
				s.fence.Release(id, b)
			}
			return nil, err
		}
		if hit || s.fence.Put(id, e, ticket, b) {
			return e, nil
		}
		if err := s.serving(); err != nil {
			return nil, err
		}
	}
	return nil, trouble("bind", errors.New("keys are being revoked too fast"))
}

// decide says whether the text is the entry's token, and whether that admits now. It runs on every use, cached or not.
func (s *Store) decide(e *entry, text string) error {
	if s.hasher.Match(e.digest, text) == hashing.Mismatch {
		return ErrUnknown
	}
	switch {
	case !e.key.RevokedAt.IsZero():
		return ErrRevoked
	case e.key.disabled:
		return ErrDisabled
	case !e.key.ExpiresAt.IsZero() && !time.Now().Before(e.key.ExpiresAt):
		return ErrExpired
	}
	return nil
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
		s.hasher.Match(s.decoy, text)
		return nil, ErrUnknown
	}
	if err != nil {
		s.log.Error("API key could not be read", "id", id.String(), "error", err)
		return nil, err
	}
	return st.entry(), nil
}
