package memory

import (
	"bytes"
	"math/rand/v2"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A tree holds entries in the order of their keys. The nil tree is empty. A tree never changes: the
// methods with and without return a new tree, and the new tree shares most nodes with the old tree.
// So a snapshot is a pointer.
//
// A tree is a treap: a search tree by key, and a heap by rank. The ranks are random, so the depth
// is about 2 ln n.
type tree struct {
	entry       backend.Entry
	rank        uint64
	left, right *tree
}

// find returns the node of a key, or nil.
func (t *tree) find(key []byte) *tree {
	if t = t.first(key); t != nil && bytes.Equal(t.entry.Key, key) {
		return t
	}
	return nil
}

// first returns the node with the smallest key that is not before from, or nil.
func (t *tree) first(from []byte) (least *tree) {
	for t != nil {
		if bytes.Compare(t.entry.Key, from) >= 0 {
			least, t = t, t.left
		} else {
			t = t.right
		}
	}
	return least
}

// last returns the node with the largest key that is before to, or nil. A nil to is after every
// key.
func (t *tree) last(to []byte) (greatest *tree) {
	for t != nil {
		if to == nil || bytes.Compare(t.entry.Key, to) < 0 {
			greatest, t = t, t.right
		} else {
			t = t.left
		}
	}
	return greatest
}

// with returns a tree that also has the entry e. The entry replaces an entry with the same key.
func (t *tree) with(e backend.Entry) *tree {
	before, from := t.split(e.Key)
	return before.join(&tree{entry: e, rank: rand.Uint64()}).join(from.after(e.Key))
}

// without returns a tree without the entry of key.
func (t *tree) without(key []byte) *tree {
	before, from := t.split(key)
	return before.join(from.after(key))
}

// after returns the part of the tree with keys greater than key.
func (t *tree) after(key []byte) *tree {
	_, after := t.split(append(bytes.Clone(key), 0))
	return after
}

// split returns the part of the tree with keys less than key, and the rest.
func (t *tree) split(key []byte) (before, from *tree) {
	if t == nil {
		return nil, nil
	}
	top := *t
	if bytes.Compare(t.entry.Key, key) < 0 {
		top.right, from = t.right.split(key)
		return &top, from
	}
	before, top.left = t.left.split(key)
	return before, &top
}

// join returns a tree with the entries of both trees. All keys of t must be less than all keys of
// other.
func (t *tree) join(other *tree) *tree {
	switch {
	case t == nil:
		return other
	case other == nil:
		return t
	case t.rank > other.rank:
		top := *t
		top.right = t.right.join(other)
		return &top
	default:
		top := *other
		top.left = t.join(other.left)
		return &top
	}
}
