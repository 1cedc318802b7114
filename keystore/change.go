package keystore

import (
	"context"
	"errors"
	"time"
	"unicode/utf8"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Issued is a new key with its secret.
type Issued struct {
	Key    *Key
	Secret Secret
}

// Create makes a key and returns it when it is durable.
//
// ErrInvalid says what is wrong with the Spec; nothing was written. After any other error the key may exist, but
// nobody holds its secret: create another.
func (s *Store) Create(ctx context.Context, spec Spec) (*Issued, error) {
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	now := time.Now()
	if err := spec.check(now); err != nil {
		return nil, err
	}
	id, text := s.format.New()
	st := &stored{id: id, record: newRecord(spec, s.format.Prefix(), s.hasher.Digest(text), now), revision: 1}
	value, err := encode(st.record)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	// No phases of the fence: nobody can have read or cached an ID that did not exist, and a miss is not cached.
	if err := s.apply(ctx, backend.Change{Key: storageKey(id), Value: value}, nil); err != nil {
		return nil, err
	}
	key := &st.entry().key
	s.log.Info("API key created", "id", key.ID, "name", key.Name, "owner", key.Owner)
	return &Issued{Key: key, Secret: newSecret(text)}, nil
}

// Revoke ends a key for good, and returns when nothing is admitted under it any more: see the package's comment.
// Revoking a revoked key changes nothing, the reason of the first time stays, and is no error. The reason is for
// people; it may be empty, and has at most 1,024 bytes.
//
// ErrNotFound means that there is no such key, ErrInvalid that an argument cannot be used; nothing was done. After
// any other error the key may be revoked or not, and this process's contexts under it are cancelled: call Revoke
// again.
func (s *Store) Revoke(ctx context.Context, id, reason string) error {
	parsed, err := parseID(id)
	if err != nil {
		return err
	}
	if len(reason) > maxReason || !utf8.ValidString(reason) {
		return invalid("the reason has %d bytes: at most %d of UTF-8 text are allowed", len(reason), maxReason)
	}
	if err := s.serving(); errors.Is(err, ErrClosed) {
		return err
	}
	err = s.revoke(ctx, parsed, reason)
	if err != nil && !errors.Is(err, ErrNotFound) {
		s.fence.Cut(parsed, ErrRevoked)
	}
	return err
}

func (s *Store) revoke(ctx context.Context, id token.ID, reason string) error {
	return s.change(ctx, id, func(r *record.Record) (cut error, changed bool) {
		if r.Status == record.Status_STATUS_REVOKED {
			return ErrRevoked, false
		}
		r.Status = record.Status_STATUS_REVOKED
		r.RevokedAt = toNanos(time.Now())
		r.RevokeReason = reason
		return ErrRevoked, true
	})
}

// changeAttempts is how often a change starts again because another one of the same key came first.
const changeAttempts = 16

// change commits what edit does to a record, through the phases of the fence: when it returns nil, the change is in
// force. What edit returns as cut, unless nil, ends the key's live contexts. Edit may be called several times, each
// time with a fresh record, and must only touch that.
func (s *Store) change(ctx context.Context, id token.ID, edit func(*record.Record) (cut error, changed bool)) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	for range changeAttempts {
		st, err := s.get(ctx, id)
		if err != nil {
			return err
		}
		cut, changed := edit(st.record)
		if !changed {
			// Whoever committed it may not have reached phase C yet, and this call must not return before.
			if cut != nil {
				s.fence.Cut(id, cut)
			}
			return nil
		}
		value, err := encode(st.record)
		if err != nil {
			return err
		}
		s.fence.Begin(id)
		err = s.apply(ctx, backend.Change{Key: storageKey(id), Value: value, Expect: st.revision}, func(err error) {
			switch {
			case err == nil:
				s.fence.End(id, cut)
			case errors.Is(err, backend.ErrConflict):
				s.fence.End(id, nil)
			default:
				// In doubt. Without an End the key stays out of the cache, and every use of it asks the store.
			}
		})
		if !errors.Is(err, backend.ErrConflict) {
			if err == nil {
				s.log.Info("API key "+st.entry().key.Status().String(), "id", id.String(), "revision", st.revision+1)
			}
			return err
		}
	}
	return trouble("change", errors.New("others keep changing the key"))
}

// ready returns why a change cannot start, if it cannot.
func (s *Store) ready(ctx context.Context) error {
	if err := s.serving(); err != nil {
		return err
	}
	return ctx.Err()
}

func encode(r *record.Record) ([]byte, error) {
	value, err := record.Encode(r)
	if err != nil {
		return nil, trouble("encode", err)
	}
	if len(value) > maxRecordSize {
		return nil, invalid("the key needs %d bytes of storage: at most %d are allowed; shorten its Metadata or Scopes", len(value), maxRecordSize)
	}
	return value, nil
}

// parseID reads an ID. What it refuses may be a secret in the wrong place, and is not repeated in the error.
func parseID(id string) (token.ID, error) {
	if parsed, ok := token.ParseID(id); ok {
		return parsed, nil
	}
	if _, ok := token.Parse(id); ok {
		return token.ID{}, invalid("the id is a whole key: take the 26 characters between its last two underscores")
	}
	return token.ID{}, invalid("the id is not the ID of a key: it has 26 characters, of 0-9 and a-z without i, l, o and u")
}
