package badgerdb

import (
	"errors"
	"slices"

	"github.com/dgraph-io/badger/v4"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A found is what the store has under a key: the revision and the checksum of the entry. The zero
// found means that there is no entry.
type found struct{ revision, sum uint64 }

// A groupState is the state of the store for the committer while the committer gathers the writes
// of a commit: the state of Badger, and the writes of the group on top.
type groupState struct {
	ends    *ends
	parent  func(key []byte) []byte // Options.Parent
	txn     *badger.Txn             // reads Badger at the last commit
	written map[string]found        // what the group has written
}

// newGroupState returns the state before the writes of the requests.
func (db *DB) newGroupState(requests []*request) *groupState {
	g := &groupState{
		ends: &db.ends, parent: db.parent,
		txn: db.badger.NewTransactionAt(db.durable.Load(), false),
	}
	if len(requests) > 1 { // the changes of one request have different keys
		g.written = make(map[string]found, 4*len(requests))
	}
	return g
}

// wrote adds a write to the group. sum is the checksum of the entry.
func (g *groupState) wrote(c backend.Change, sum uint64) {
	switch {
	case g.written == nil:
	case c.Delete:
		g.written[string(c.Key)] = found{}
	default:
		g.written[string(c.Key)] = found{c.NewRevision(), sum}
	}
}

// look returns what the store has under the key of a change.
func (g *groupState) look(c backend.Change) (found, error) {
	if f, ok := g.written[string(c.Key)]; ok {
		return f, nil
	}
	beyond, err := g.ends.beyond(g.txn, c.Key)
	if err == nil && !beyond && c.Expect == 0 && g.parent != nil {
		if parent := g.parent(c.Key); parent != nil {
			beyond, err = g.ends.beyond(g.txn, parent)
		}
	}
	if err != nil || beyond {
		return found{}, err
	}
	e, sum, err := get(g.txn, c.Key)
	if errors.Is(err, backend.ErrNotFound) {
		return found{}, nil
	}
	return found{e.Revision, sum}, err
}

// expected returns a nil error only if every change finds what the change expects. So a request
// writes all or nothing. expected adds what each change finds to all.
func (g *groupState) expected(changes []backend.Change, all []found) ([]found, error) {
	for _, c := range changes {
		f, err := g.look(c)
		if err != nil {
			return all, err
		}
		if f.revision != c.Expect {
			return all, backend.ErrConflict
		}
		all = append(all, f)
	}
	return all, nil
}

// The ends are the last keys of Badger: for each first byte, a key such that Badger has no later
// key with the same first byte. New keys of API keys and of events come after all earlier ones. So
// most writes of new keys need no read, which would look for the key in every memtable and level.
// An entry whose parent is new needs no read either: see Options.Parent.
//
// The committer owns the ends, and calls extend after each commit. A deleted entry still has its
// key in Badger, so an end never moves back.
type ends [256]end

type end struct {
	known bool
	key   []byte // empty: no key has the first byte
}

// beyond reports whether a key comes after the last key of Badger with the same first byte. txn
// reads Badger at the last commit.
func (ends *ends) beyond(txn *badger.Txn, key []byte) (bool, error) {
	first := key[0]
	end := &ends[first]
	if !end.known {
		if first == 0xff {
			return false, nil // lastKey cannot begin after all such keys
		}
		var err error
		if end.key, err = lastKey(txn, first); err != nil {
			return false, err
		}
		end.known = true
	}
	return string(key) > string(end.key), nil
}

// extend adds a committed key.
func (ends *ends) extend(key []byte) {
	if end := &ends[key[0]]; end.known && string(key) > string(end.key) {
		end.key = append(end.key[:0], key...)
	}
}

// lastKey returns the last key of Badger with a first byte, of an entry or of a deleted entry. The
// result is nil if there is no such key.
func lastKey(txn *badger.Txn, first byte) ([]byte, error) {
	o := badger.DefaultIteratorOptions
	o.PrefetchValues = false
	o.Prefix = []byte{layout.KeyPrefix}
	o.Reverse = true
	it := txn.NewIterator(o)
	defer it.Close()
	for it.Seek([]byte{layout.KeyPrefix, first + 1}); it.Valid(); it.Next() {
		key := it.Item().Key()[1:]
		if len(key) > 0 && key[0] == first+1 {
			continue // Seek begins at the key to itself, if there is an entry
		}
		if len(key) == 0 || key[0] != first {
			return nil, nil
		}
		return slices.Clone(key), nil
	}
	return nil, nil
}
