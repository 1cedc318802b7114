package intern

// A Recent is a map that keeps the entries that were used last, and forgets others when the Recent
// is full. The zero Recent is ready for use. A Recent is not safe for concurrent use.
//
// The invariants:
//
//  1. Each entry is in one of two generations. A use moves an entry of the old generation to the
//     young generation. Both generations together have at most Max entries.
//  2. When the young generation has Max/2 entries, the young generation becomes the old generation,
//     and the old generation is forgotten. So the Recent keeps an entry if fewer than Max/2 other
//     names were used since the last use of the entry.
type Recent[V any] struct{ young, old map[string]V }

// Max is the largest number of entries of a Recent.
const Max = 4096

// Get returns the value of a name, and whether the Recent has the name.
func (r *Recent[V]) Get(name string) (v V, ok bool) {
	if v, ok = r.young[name]; ok {
		return v, true
	}
	if v, ok = r.old[name]; ok {
		delete(r.old, name)
		r.Put(name, v)
	}
	return v, ok
}

// Put adds an entry. The Recent does not have the name.
func (r *Recent[V]) Put(name string, v V) {
	if len(r.young) >= Max/2 {
		r.old, r.young = r.young, nil
	}
	if r.young == nil {
		r.young = make(map[string]V)
	}
	r.young[name] = v
}

// Len returns the number of entries.
func (r *Recent[V]) Len() int { return len(r.young) + len(r.old) }
