package fence

// A Variant is a set of the steps that keep the cache in step with the store.
//
// TwoPhase is the right one. The others leave steps out, as real systems do, and exist so that tests can show that
// they would notice.
type Variant uint8

const (
	evictBefore   Variant = 1 << iota // phase A removes the cached value from the LRU
	clearBefore                       // and from the front
	bumpBefore                        // phase A stops installs of what was read before it
	blockInstalls                     // no installs between the phases
	evictAfter                        // phase C removes the cached value from the LRU
	clearAfter                        // and from the front
	bumpAfter                         // phase C stops installs of what was read before it
	careless                          // not a step: the front is filled whatever may have changed
)

const (
	cacheBefore = evictBefore | clearBefore
	cacheAfter  = evictAfter | clearAfter

	TwoPhase   = cacheBefore | bumpBefore | blockInstalls | cacheAfter | bumpAfter
	LookAside  = cacheAfter               // what everyone does
	BumpBefore = cacheBefore | bumpBefore // a generation, moved before the commit only
	BumpAfter  = cacheAfter | bumpAfter   // a generation, moved after the commit only

	FrontLate     = TwoPhase &^ clearBefore               // the front is cleared after the commit only
	FrontNever    = TwoPhase &^ clearBefore &^ clearAfter // the front is not cleared
	FrontCareless = TwoPhase | careless                   // the front is filled with what may be old
)

// Break makes f go by v. It is for tests, before the first use of f.
func (f *Fence[V]) Break(v Variant) { f.steps = v }
