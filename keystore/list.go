package keystore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"
)

// Get returns the key with an ID, whatever its status. ErrNotFound means that there is none, ErrInvalid that id is
// not an ID.
func (s *Store) Get(ctx context.Context, id string) (*Key, error) {
	parsed, err := parseID("", id)
	if err != nil {
		return nil, err
	}
	if err := s.ready(ctx); err != nil {
		return nil, err
	}
	ctx, cancel := s.limited(ctx)
	defer cancel()
	st, err := s.get(ctx, parsed)
	if errors.Is(err, ErrNotFound) {
		err = noKey("get", parsed)
	}
	if err != nil {
		return nil, err
	}
	key := &st.entry().key
	if key.LastUsedAt, err = s.lastUsed(ctx, parsed); err != nil {
		return nil, err
	}
	return key, nil
}

// A Query selects keys. The zero Query selects all. RevokeAll refuses a Query that selects all
// keys: see RevokeAllOptions.All.
type Query struct {
	// Owner selects the keys of one owner. An empty Owner selects the keys of every owner, so make
	// sure that a variable is not empty before you select by it what you will change.
	Owner string
	// Status selects the keys that have it at the moment they are read; zero, those of every status.
	Status Status
	// Scope selects the keys that have the scope, to the letter or by a '*'; empty, those of every scope.
	Scope string
	// CreatedBefore selects the keys that were made before; zero, those of every age.
	CreatedBefore time.Time
	// UnusedSince selects the keys that were created before this time and have not been used since;
	// zero, all. A key with a live context from Bind, such as an open stream, is in use now. Uses
	// are known to the minute, so a key that was last used in the minute of this time, or in the
	// minute before, is not selected.
	//
	// No key is selected whose use may be unknown. The uses of the last minutes before a crash are
	// lost, so after Open of a store that was not closed, the store knows of every use only since
	// then; after Restore, only since the Restore; and if more than 1,048,576 keys are used within
	// a minute, only since that minute. If this time is earlier than that, the first key that would
	// be selected gives ErrInvalid instead, and ends the list; the text says since when all uses
	// are known. To decide without them, List the keys, look at LastUsedAt, and Revoke each key by
	// its ID.
	UnusedSince time.Time
	// Cursor is the ID of the last key that the caller has read. The list begins after this key.
	// With an empty Cursor, the list begins at the first key.
	Cursor string
	// Limit is the most keys to yield. 0 or less means no limit.
	Limit int
}

// selects decides by all but the last use, which is kept elsewhere.
func (q *Query) selects(k *Key) bool {
	return (q.Owner == "" || k.Owner == q.Owner) &&
		(q.Status == 0 || k.Status() == q.Status) &&
		(q.Scope == "" || k.HasScope(q.Scope)) &&
		(q.CreatedBefore.IsZero() || k.CreatedAt.Before(q.CreatedBefore)) &&
		(q.UnusedSince.IsZero() || k.CreatedAt.Before(q.UnusedSince))
}

// selectsAll reports whether the query selects every key that Cursor and Limit leave.
func (q *Query) selectsAll() bool {
	return q.Owner == "" && q.Status == 0 && q.Scope == "" && q.CreatedBefore.IsZero() && q.UnusedSince.IsZero()
}

// List yields keys in the order of their creation. It reads as it goes, holds no lock between keys, and shows each as
// it is at the moment when it is read; a key that is created meanwhile comes at the end. Of keys that are created at the
// same time, one may appear when those behind it have been read already, and a list that goes on behind them misses it.
//
// An error comes with a nil key. After ErrCorrupt, which is about one key, the list can go on; after any other it ends.
// If storage cannot read on behind what is damaged, it ends after ErrCorrupt too, and the text says so.
func (s *Store) List(ctx context.Context, q Query) iter.Seq2[*Key, error] {
	return func(yield func(*Key, error) bool) {
		err := s.list(ctx, q, true, func(_ *stored, k *Key, err error) bool { return yield(k, err) })
		if err != nil {
			yield(nil, err)
		}
	}
}

// list returns the error that ends the list, unless the consumer ended it. With ErrCorrupt, the stored may have no more
// than its ID, or be nil. LastUsedAt is filled in if that is said, or the query asks for it.
func (s *Store) list(ctx context.Context, q Query, used bool, yield func(*stored, *Key, error) bool) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	from := []byte{keySpace}
	if q.Cursor != "" {
		cursor, err := parseID("Query.Cursor: ", q.Cursor)
		if err != nil {
			return err
		}
		from = append(storageKey(cursor), 0) // the least storage key after the cursor
	}
	used = used || !q.UnusedSince.IsZero()
	left := q.Limit
	for e, err := range s.backend.Scan(ctx, from, []byte{keySpace + 1}) {
		if err != nil {
			err = s.scanError(ctx, "list", err)
			if errors.Is(err, ErrCorrupt) {
				return fmt.Errorf("%w; the keys behind it were not read", err)
			}
			return err
		}
		st, err := parseStored(e)
		if err != nil {
			if !yield(st, nil, err) {
				return nil
			}
			continue
		}
		key := &st.entry().key
		if st.purged() || !q.selects(key) {
			continue
		}
		if used {
			key.LastUsedAt, err = s.lastUsed(ctx, st.id)
		}
		if errors.Is(err, ErrCorrupt) {
			if !yield(st, nil, fmt.Errorf("key %s: %w", key.ID, err)) {
				return nil
			}
			continue
		}
		if err != nil {
			return err
		}
		if !q.UnusedSince.IsZero() {
			if unused, err := s.usage.unused(q.UnusedSince, key.LastUsedAt); err != nil {
				return err
			} else if !unused {
				continue
			}
		}
		if !yield(st, key, nil) {
			return nil
		}
		if left--; left == 0 {
			return nil
		}
	}
	return nil
}
