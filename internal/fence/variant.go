package fence

// A Variant is a set of the steps that keep the cache consistent with the store.
//
// TwoPhase is the correct variant. The other variants leave out steps, as real systems do. Tests
// use them to show that the tests would detect such an error.
type Variant uint8

const (
	evictBefore   Variant = 1 << iota // phase A removes the cached value from the LRU
	clearBefore                       // phase A removes the cached value from the front
	bumpBefore                        // phase A prevents installs of values read before phase A
	blockInstalls                     // no installs between phases A and C
	evictAfter                        // phase C removes the cached value from the LRU
	clearAfter                        // phase C removes the cached value from the front
	bumpAfter                         // phase C prevents installs of values read before phase C
	careless                          // an error, not a step: Put always fills the front
)

const (
	cacheBefore = evictBefore | clearBefore
	cacheAfter  = evictAfter | clearAfter

	TwoPhase   = cacheBefore | bumpBefore | blockInstalls | cacheAfter | bumpAfter
	LookAside  = cacheAfter               // the usual way
	BumpBefore = cacheBefore | bumpBefore // the generation moves before the commit only
	BumpAfter  = cacheAfter | bumpAfter   // the generation moves after the commit only

	FrontLate     = TwoPhase &^ clearBefore               // the front is cleared after the commit only
	FrontNever    = TwoPhase &^ clearBefore &^ clearAfter // the front is not cleared
	FrontCareless = TwoPhase | careless                   // Put may fill the front with old values
)

// Break makes f use the steps of v. Break is for tests, before the first use of f.
func (f *Fence[V]) Break(v Variant) { f.steps = v }
