package keystore

import "time"

// An Observer is notified of what happens in a Store, for metrics. The Store calls the Observer on
// the goroutine of the event, at the moment of the event, with no lock held. So an Observer should
// be quick, and must be safe for concurrent use. The Store never gives a secret to an Observer.
//
// An Observer may call every method of the Store except Close. Close would wait for the call that
// notifies the Observer, so call Close in another goroutine.
//
// Once Close has returned, only a call of a method that still runs, such as Verify, may notify the
// Observer. Close waits until the Observer was notified of the ends that no call has made: by an
// expiry, a lost contact, or a change of another process. For these, Close waits for 5 seconds at
// most.
//
// A panic of an Observer changes nothing that the Store does. The Store recovers from the panic,
// and logs the type of the panic's value with the stack. The Store guards a Hasher, the handler of
// a Logger, and a backend in the same way.
type Observer interface {
	// Verified is called for each Verify and Bind that accepts the caller. Verified is on the fast
	// path: every nanosecond counts.
	Verified(Verification)
	// Refused is called for each Verify and Bind that refuses the caller.
	Refused(Refusal)
	// Changed is called for each change of a key, after the change has taken effect, and before the
	// call that made the change returns. Concurrent changes of one key may be reported in any
	// order. Event.Revision has the right order. If several processes have the store open, Changed
	// is called in the process that made the change: see Store.Follow for the changes of all.
	Changed(Event)
	// Ended is called for each session that the store has ended. If another process has changed the
	// key, Ended is called in another goroutine, and the change does not wait for Ended.
	Ended(BindEnd)
}

// A Verification describes a caller that Verify or Bind has accepted.
type Verification struct {
	// Key is the key that the caller gets.
	Key *Key
	// Bound is true for Bind, and false for Verify.
	Bound bool
}

// A Refusal describes a caller that Verify or Bind has refused.
type Refusal struct {
	// KeyID is the ID in the token. A key with the ID need not exist. KeyID is empty if the token
	// was malformed.
	KeyID string
	// Err is the error of Verify or Bind. Compare errors with errors.Is, because the texts vary.
	Err error
}

// A BindEnd describes the end of a session that the store has ended.
type BindEnd struct {
	// KeyID is the ID of the key of the session.
	KeyID string
	// Cause is the Cause of the session.
	Cause error
	// After is the time from Bind to the end.
	After time.Duration
}
