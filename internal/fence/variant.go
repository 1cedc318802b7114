package fence

// A Variant is a set of the steps that keep the cache in step with the store.
//
// TwoPhase is the right one. The others leave steps out, as real systems do, and exist so that tests can show that
// they would notice.
type Variant uint8

const (
	evictBefore Variant = 1 << iota // phase A removes the cached value
	bumpBefore                      // phase A stops installs of what was read before it
	hold                            // no installs between the phases
	evictAfter                      // phase C removes the cached value
	bumpAfter                       // phase C stops installs of what was read before it
)

const (
	TwoPhase   = evictBefore | bumpBefore | hold | evictAfter | bumpAfter
	LookAside  = evictAfter               // what everyone does
	BumpBefore = evictBefore | bumpBefore // a generation, moved before the commit only
	BumpAfter  = evictAfter | bumpAfter   // a generation, moved after the commit only
)

// Break makes f go by v. It is for tests, before the first use of f.
func (f *Fence[V]) Break(v Variant) { f.steps = v }
