package fence

// A Variant is a set of the steps that keep the cache consistent with the store.
//
// TwoPhase is the correct variant. The other variants leave out steps, as real systems do. Tests
// use them to show that the tests would detect such an error.
type Variant uint8

const (
	evictBefore   Variant = 1 << iota // phase A removes the cached value
	bumpBefore                        // phase A prevents installs of values read before phase A
	blockInstalls                     // no installs between phases A and C
	evictAfter                        // phase C removes the cached value
	bumpAfter                         // phase C prevents installs of values read before phase C
	careless                          // an error, not a step: Put always installs
)

const (
	TwoPhase   = evictBefore | bumpBefore | blockInstalls | evictAfter | bumpAfter
	LookAside  = evictAfter               // the usual way
	BumpBefore = evictBefore | bumpBefore // the generation moves before the commit only
	BumpAfter  = evictAfter | bumpAfter   // the generation moves after the commit only

	EvictLate  = TwoPhase &^ evictBefore               // the value is removed after the commit only
	EvictNever = TwoPhase &^ evictBefore &^ evictAfter // the value is not removed
	Careless   = TwoPhase | careless                   // Put may install old values
)

// Break makes f use the steps of v. Break is for tests, before the first use of f.
func (f *Fence[V]) Break(v Variant) { f.steps = v }
