package keystore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"
)

// Get returns the key with an ID, whatever the status of the key. ErrNotFound means that the
// store has no key with the ID. ErrInvalid means that id is not an ID.
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
	kr, err := s.get(ctx, parsed)
	if errors.Is(err, ErrNotFound) {
		err = noKey("get", parsed)
	}
	if err != nil {
		return nil, err
	}
	key := &kr.cached().key
	if key.LastUsedAt, err = s.lastUsed(ctx, parsed); err != nil {
		return nil, err
	}
	key.Live = s.fence.BoundTo(parsed)
	return key, nil
}

// A Query selects keys. The zero Query selects all keys. RevokeAll refuses a Query that selects
// all keys: see RevokeAllOptions.All.
type Query struct {
	// Owner selects the keys of one owner. An empty Owner selects the keys of every owner. So
	// before you select the keys to change by a variable, make sure that the variable is not
	// empty. The store has an index of the keys by owner: a query with an Owner reads only the keys
	// of this owner, however many keys the store has. Any other query reads every key.
	Owner string
	// Status selects the keys that have the status at the moment when the keys are read. Zero
	// selects the keys of every status.
	Status Status
	// Scope selects the keys that have the scope: exactly, or covered by a '*'. An empty Scope
	// selects the keys of every scope.
	Scope string
	// CreatedBefore selects the keys that were created before this time, and CreatedAfter the keys
	// that were created after this time. Zero selects keys of every age. With CreatedAfter, the
	// store does not read the older keys, because IDs sort by creation. The store reads all
	// imported keys, whose IDs sort before all other IDs.
	CreatedBefore, CreatedAfter time.Time
	// ExpiresBefore selects the keys whose ExpiresAt is before this time, in the past or in the
	// future. A key that never expires is not selected. Zero selects all keys.
	ExpiresBefore time.Time
	// Text selects the keys with this text in the name, the owner or the ID. Upper and lower case
	// are the same. A text of fewer than 6 bytes is not looked for in the IDs, because many IDs
	// contain a short text by chance. An empty Text selects all keys. The store reads every key
	// that the other fields select.
	Text string
	// UnusedSince selects the keys that were created before this time and were not used since. An
	// imported key counts as created at the import. Zero selects all keys. A key with an open
	// session, such as a stream, is in use now. The store records uses to the minute. So a key that
	// was last used in the minute of this time, or in the minute before, is not selected.
	//
	// A key is not selected if a use of the key may be unknown. The store knows every use only
	// since a certain time:
	//
	//   - A crash loses the uses of the last minutes. After Open of a store that was not closed,
	//     or that lost data and was recovered (see Options.Recover), the store knows every use only
	//     since the Open.
	//   - After Restore, the store knows every use only since the Restore.
	//   - If more than 1,048,576 keys are used within a minute, the store knows every use only
	//     since the minute.
	//
	// If several processes have the store open, a use in another process is known within two
	// minutes. When a process dies, its uses of the last minutes are lost, and the store knows
	// every use only since the other processes have removed the dead process.
	//
	// If UnusedSince is earlier, the first key that would be selected gives ErrInvalid instead,
	// and ends the list. The text of the error says since when all uses are known. To decide
	// without the unknown uses, List the keys, look at LastUsedAt, and Revoke each key by ID.
	UnusedSince time.Time
	// Newest reverses the order: the key that was created last comes first, and imported keys come
	// last. The backend must be a backend.DownScanner, as the store's own directory is. Otherwise
	// Newest gives ErrInvalid.
	Newest bool
	// Cursor is the ID of the last key that the caller has read. The list begins after this key in
	// the order of the list: with Newest, at the next older key. With an empty Cursor, the list
	// begins at the first key.
	Cursor string
	// Limit is the largest number of keys to yield. 0 or less means no limit.
	Limit int
}

// selects reports whether the query selects the key. selects ignores the last use, because the
// last use is stored separately.
func (q *Query) selects(k *Key) bool {
	return (q.Owner == "" || k.Owner == q.Owner) &&
		(q.Status == 0 || k.Status() == q.Status) &&
		(q.Scope == "" || k.HasScope(q.Scope)) &&
		(q.CreatedBefore.IsZero() || k.CreatedAt.Before(q.CreatedBefore)) &&
		(q.CreatedAfter.IsZero() || k.CreatedAt.After(q.CreatedAfter)) &&
		(q.ExpiresBefore.IsZero() ||
			!k.ExpiresAt.IsZero() && k.ExpiresAt.Before(q.ExpiresBefore)) &&
		(q.UnusedSince.IsZero() || k.CreatedAt.Before(q.UnusedSince)) &&
		(q.Text == "" || k.hasText(q.Text))
}

// onlyOwner reports whether the query selects by the Owner alone, or selects every key.
func (q *Query) onlyOwner() bool {
	without := *q
	without.Owner = ""
	return without.selectsAll()
}

// knowsUses reports whether the store had the key at UnusedSince. The store does not know the uses
// of an imported key before the import.
func (q *Query) knowsUses(kr *keyRecord) bool {
	return q.UnusedSince.IsZero() || kr.record.ImportedAt < stampAt(q.UnusedSince)
}

// hasText reports whether the name, the owner or the ID of the key contains a text: see Query.Text.
func (k *Key) hasText(text string) bool {
	const leastOfID = 6
	text = strings.ToLower(text)
	return strings.Contains(strings.ToLower(k.Name), text) ||
		strings.Contains(strings.ToLower(k.Owner), text) ||
		len(text) >= leastOfID && strings.Contains(k.ID, text)
}

// selectsAll reports whether the query selects every key, apart from Cursor and Limit. A time that
// IsZero may differ from the zero Time, so selectsAll compares field by field.
func (q *Query) selectsAll() bool {
	return q.Owner == "" && q.Status == 0 && q.Scope == "" && q.Text == "" &&
		q.CreatedBefore.IsZero() && q.CreatedAfter.IsZero() && q.ExpiresBefore.IsZero() &&
		q.UnusedSince.IsZero()
}

// List yields the imported keys, in the order of their IDs, and then the other keys, in the order
// of creation. Query.Newest reverses the order. List reads during the iteration, and holds no lock
// between keys. List shows each key as the key is at the moment of the read. A key that is created
// during the iteration usually comes at the end. But if several keys are created at the same time,
// one of them may appear before keys that were already read. A list that continues after the read
// keys misses the new key. A later List finds the new key. With Newest, the list misses most of the
// keys that are created during the iteration.
//
// An error comes with a nil key. ErrCorrupt concerns one key: the list can continue. Any other
// error ends the list. If storage cannot read past the damage, the list ends after ErrCorrupt
// too, and the text of the error says that keys were not read.
func (s *Store) List(ctx context.Context, q Query) iter.Seq2[*Key, error] {
	return func(yield func(*Key, error) bool) {
		err := s.list(ctx, q, true, func(l listedKey, err error) bool {
			if err != nil {
				return yield(nil, err)
			}
			k := l.key()
			k.Live = s.fence.BoundTo(l.id)
			return yield(k, nil)
		})
		if err != nil {
			yield(nil, err)
		}
	}
}

// Count returns how many keys List would yield, and takes less memory. Count honours every field of
// the query: with a Cursor, only the keys after the cursor count, and a Limit is the highest count.
// Count reads the keys, so Count takes as long as List.
//
// ErrCorrupt means that a key could not be read. Count has counted the other keys, unless the text
// of the error says that keys were not read. After any other error, the number is meaningless.
func (s *Store) Count(ctx context.Context, q Query) (n int, err error) {
	var corrupt error
	err = s.list(ctx, q, false, func(_ listedKey, err error) bool {
		if err != nil {
			corrupt = err
		} else {
			n++
		}
		return true
	})
	if err == nil {
		err = corrupt
	}
	return n, err
}

// A listedKey is a key that a list has found.
type listedKey struct {
	*keyRecord
	made *Key // nil until the first call of key
}

// key returns the Key of the record. To make a Key takes time, and many lists need none.
func (l *listedKey) key() *Key {
	if l.made == nil {
		l.made = &l.cached().key
	}
	return l.made
}

// list returns the error that ends the list. If the consumer ended the list, list returns nil. With
// ErrCorrupt, yield gets a listedKey whose keyRecord is nil or may have only the ID. list fills in
// LastUsedAt if used is true, or if the query has UnusedSince.
func (s *Store) list(
	ctx context.Context, q Query, used bool, yield func(listedKey, error) bool,
) error {
	return s.listFound(ctx, s.candidates, q, used, yield)
}

// listFound is list with another way to find the candidates.
func (s *Store) listFound(
	ctx context.Context, find finder, q Query, used bool, yield func(listedKey, error) bool,
) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	used = used || !q.UnusedSince.IsZero()
	if s.processes != nil && !q.UnusedSince.IsZero() {
		if err := s.syncUsage(ctx); err != nil {
			return err
		}
	}
	left := q.Limit
	var failed error
	err := find(ctx, &q, used, func(c candidate, err error) bool {
		l := listedKey{keyRecord: c.keyRecord}
		switch {
		case err != nil:
			return yield(l, err)
		case used || !q.onlyOwner():
			if !q.selects(l.key()) || !q.knowsUses(l.keyRecord) {
				return true
			}
		case q.Owner != "" && l.record.Owner != q.Owner:
			return true
		}
		if used {
			l.key().LastUsedAt, err = s.lastUsedOf(ctx, c)
		}
		if errors.Is(err, ErrCorrupt) {
			return yield(l, fmt.Errorf("key %s: %w", l.id, err))
		}
		unused := true
		if err == nil && !q.UnusedSince.IsZero() {
			unused, err = s.usage.unused(q.UnusedSince, l.key().LastUsedAt)
		}
		if err != nil {
			failed = err
			return false
		}
		if !unused {
			return true
		}
		left--
		return yield(l, nil) && left != 0
	})
	if failed != nil {
		return failed
	}
	return err
}
