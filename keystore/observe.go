package keystore

import "time"

// An Observer is told of what happens in a Store, for metrics. It is called by the goroutine that the thing happens in,
// at the moment when it does, with no lock held; so it should be quick, and must be safe for concurrent use. It may call
// the Store, but for Close, which would wait for the very call that it is made in: leave that to another goroutine. It is
// never given a secret.
//
// A panic of an Observer changes nothing of what the Store does: the Store recovers from the panic,
// and logs the type of the panic's value with the stack. A Hasher, the handler of a Logger, and a
// backend are guarded in the same way.
type Observer interface {
	// Verified is told of each Verify and Bind that admits. It is on the fast path: each nanosecond of it counts.
	Verified(Verification)
	// Refused is told of each that does not.
	Refused(Refusal)
	// Changed is told of each change of a key, when it is in force and before the call that made it returns. Changes of
	// one key that are made at the same time may be told in any order: Event.Revision has the right one.
	Changed(Event)
	// Ended is told of each context of Bind's that the store has ended.
	Ended(BindEnd)
}

// A Verification is a caller who was admitted.
type Verification struct {
	Key *Key
	// Bound tells Bind from Verify.
	Bound bool
}

// A Refusal is a caller who was not.
type Refusal struct {
	// KeyID is the one that the token claimed, which need not exist; empty if the token was malformed.
	KeyID string
	// Err is the error of Verify or Bind. Tell errors apart with errors.Is: their texts vary.
	Err error
}

// A BindEnd describes the end of a context that Bind returned, when the store has ended it.
type BindEnd struct {
	KeyID string
	// Cause is the context's.
	Cause error
	// After is for how long it lived.
	After time.Duration
}
