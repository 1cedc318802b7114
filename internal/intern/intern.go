// Package intern saves memory: many keys in the cache have the same owner and the same scopes, and
// an Interner replaces equal strings by one shared copy.
package intern

import "sync"

// An Interner keeps one copy of each string. The zero Interner is ready for use. An Interner is
// safe for concurrent use.
//
// The invariant: an Interner keeps at most Max strings, so that the map takes less memory than the
// sharing saves. The Interner forgets strings that were not interned for long. Callers of a
// forgotten string keep their shared copy, and the next caller brings the copy that is shared from
// then on.
type Interner struct {
	mu     sync.Mutex // guards all below
	shared Recent[string]
}

// Intern returns the shared copy of a string.
func (n *Interner) Intern(s string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.internLocked(s)
}

// InternAll replaces each string of a slice by the shared copy. No other goroutine may use the
// slice at the same time.
func (n *Interner) InternAll(all []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, s := range all {
		all[i] = n.internLocked(s)
	}
}

func (n *Interner) internLocked(s string) string {
	if one, ok := n.shared.Get(s); ok {
		return one
	}
	n.shared.Put(s, s)
	return s
}
