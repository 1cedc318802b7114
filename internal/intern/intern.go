// Package intern saves memory: many keys in the cache have the same owner and the same scopes, and
// an Interner replaces equal strings by one shared copy.
package intern

import "sync"

// maxStrings is how many strings an Interner keeps.
const maxStrings = 4096

// An Interner keeps one copy of each string. The zero Interner is ready for use. An Interner is
// safe for concurrent use.
//
// The invariant: an Interner keeps at most maxStrings strings, so that the map takes less memory
// than the sharing saves. After the limit is reached, each caller keeps its own copy of a new
// string. An Interner never forgets a string.
type Interner struct {
	mu     sync.Mutex // guards all below
	shared map[string]string
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
	if one, ok := n.shared[s]; ok {
		return one
	}
	if n.shared == nil {
		n.shared = make(map[string]string)
	}
	if len(n.shared) < maxStrings {
		n.shared[s] = s
	}
	return s
}
