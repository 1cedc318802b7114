package keystore

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A boundContext is the context of a session from Bind. Bind registers the context with the fence
// before Bind calls markAdmitted, so that the context misses no change. Until the context ends, the
// fence notifies the context of each change of the key.
//
// A context passes through four states, and skips admitted if it ends before Bind has decided:
//
//	state         in this state                          the step to the next state
//	-----         -------------                          --------------------------
//	binding       changed collects values in pending     markAdmitted, under mu
//	   |
//	   v
//	admitted      changed judges each value, under mu;   stop, without a lock: the first call sets
//	   |          the timer waits for the expiry         cause, and later calls change nothing
//	   v
//	ended         Done, Err and Cause show the end;      followUp, under mu
//	   |          the fence releases the binding;
//	   v          report notifies the observer
//	followed up   Done is closed; onEnd was called;      -
//	              no timer and no parent refers to
//	              the context
//
// These functions call stop:
//
//	changed        the fence publishes a value that does not admit the context
//	Cut            the fence ends all contexts of the key: the outcome of a write is unknown,
//	               or the store closes
//	markAdmitted   a value in pending does not admit the context
//	the timer      the key, or the secret of the session, has expired
//	release        the owner closes the session
//	endStale       Cause, Err or Done has found the gate closed: see processes
//
// After changed and Cut, the fence releases the binding, calls report, and calls followUp in the
// background. The timer and endStale use EndOne of the fence, and the other two use cut, which do
// the same without delay. The lock mu is not held while stop, report or the function given to OnEnd
// runs: each may run code of the caller.
//
// The invariants:
//
//  1. An admitted context is notified of every change that is committed after the value that
//     admitted the context. The context ends if a change does not admit the context. Two changes
//     may notify the context in either order. A change that arrives late is judged too, because a
//     key that was disabled and enabled again was disabled.
//  2. A context has ended once cause is set. From then on, every caller finds Done closed and Err
//     not nil. To cancel the embedded Context takes microseconds, too slow when a Revoke ends
//     10,000 contexts, and only a caller of Done can be waiting. So stop cancels the Context only
//     if a caller has called Done. Otherwise the next call of Done or Err cancels the Context, or
//     followUp does. Done sets doneUsed before Done reads cause. stop sets cause before stop reads
//     doneUsed. So at least one of Done and stop sees what the other has set.
//  3. Once the store has ended the context, the function given to OnEnd is called, unless the owner
//     releases the context first.
type boundContext struct {
	context.Context          // derived from the caller's context; see the methods Done and Err
	fence.Binding[cachedKey] // registered under id; its functions are methods of boundContext

	store         *Store
	id            token.ID
	since         time.Time
	cancelContext context.CancelCauseFunc // of Context
	cause         atomic.Pointer[error]   // why the store or the owner ended the context, or nil
	doneUsed      atomic.Bool             // a caller has called Done
	countsEnd     atomic.Bool             // the end has to be counted: see countEnd

	session Session // the session that Bind returns; its field ctx is this boundContext

	mu sync.Mutex // guards all below
	// The end was reported to the observer, or must not be reported: the observer was not notified
	// of a Bind, or the owner has released the context.
	reported   bool
	followedUp bool         // followUp has run
	onEnd      func()       // followUp calls onEnd; nil: nothing to call
	pending    []*cachedKey // the values that arrived before markAdmitted
	admittedBy *cachedKey   // the value that admitted the context; nil until markAdmitted
	current    *cachedKey   // the newest value that admits the context
	rotation   uint32       // of the secret that opened the context
	until      time.Time    // when the timer ends the context
	timer      *time.Timer
}

func (s *Store) newBoundContext(ctx context.Context, id token.ID) *boundContext {
	b := &boundContext{store: s, id: id, since: time.Now()}
	b.reported = true // until Bind calls announced
	b.Context, b.cancelContext = context.WithCancelCause(ctx)
	b.Binding = fence.Binding[cachedKey]{Changed: b.changed, Cut: b.stop, AfterEnd: b.followUp}
	if s.observer != nil {
		b.Ended = b.report
	}
	return b
}

func (b *boundContext) Done() <-chan struct{} {
	b.doneUsed.Store(true)
	_ = b.Cause()
	b.cancel()
	return b.Context.Done()
}

func (b *boundContext) Err() error {
	_ = b.Cause()
	b.cancel()
	return b.Context.Err()
}

// key, allow and spend serve the Session. Bind returns the Session after markAdmitted, and
// admittedBy does not change after markAdmitted.
func (b *boundContext) key() *Key { return &b.admittedBy.key }

func (b *boundContext) allow() error { return b.admittedBy.grants.allow() }

func (b *boundContext) spend(ctx context.Context, credits int64) error {
	return b.admittedBy.grants.spend(ctx, credits, decision{})
}

// Cause implements Session.Cause. The end of the parent context does not count.
//
// Cause asks the gate of a store of several processes: no message of a stream passes while the gate
// is closed, even if the goroutine that ends the contexts has not run yet. The functions of this
// file call endCause instead, because some of them hold mu.
func (b *boundContext) Cause() error {
	if cause := b.endCause(); cause != nil || b.store.isFresh() {
		return cause
	}
	return b.endStale()
}

// endCause returns why the context has ended, or nil.
func (b *boundContext) endCause() error {
	if cause := b.cause.Load(); cause != nil {
		return *cause
	}
	return nil
}

// endStale ends the context because the gate is closed, and returns why the context has ended. The
// context stays ended when the gate opens again. The caller may hold a lock that the observer or
// the function given to OnEnd takes, so these run in another goroutine.
func (b *boundContext) endStale() error {
	b.stop(errStale)
	go b.store.fence.EndOne(b.id, &b.Binding, errStale)
	return b.endCause()
}

// cancel cancels the embedded Context if cause is set. stop may have skipped this step.
func (b *boundContext) cancel() {
	if cause := b.cause.Load(); cause != nil {
		b.cancelContext(*cause)
	}
}

// stop ends the context. A second call does nothing.
func (b *boundContext) stop(cause error) {
	if b.cause.CompareAndSwap(nil, &cause) {
		b.countEnd()
		b.noteUse()
	}
	if b.doneUsed.Load() {
		b.cancel()
	}
}

// countEnd counts the end of the context, once, if the store has ended the context and Bind returns
// the session. stop calls countEnd after stop has set cause, and Bind calls countEnd after Bind has
// set countsEnd. So at least one of the two calls sees both.
func (b *boundContext) countEnd() {
	if b.endedByStore() && b.countsEnd.CompareAndSwap(true, false) {
		b.store.counts.ended[reasonOf(b.endCause())].Add(1)
	}
}

// noteUse notes the end of the context as a use of the key, if the key was admitted: until now, the
// context itself was a use.
func (b *boundContext) noteUse() {
	b.mu.Lock()
	e := b.admittedBy
	b.mu.Unlock()
	if e == nil {
		return
	}
	if recorded := e.recorded(); b.store.usage.due(recorded) {
		b.store.usage.note(e.ID, recorded)
	}
}

// markAdmitted starts the context with the decision about the token: e is the value that admits,
// and rotation is that of the secret. Then markAdmitted judges the values that arrived earlier.
func (b *boundContext) markAdmitted(e *cachedKey, rotation uint32) {
	b.Admitted.Store(true)
	if err := b.judgePending(e, rotation); err != nil {
		b.cut(err)
	}
}

// judgePending moves the context from binding to admitted, and returns why one of the pending
// values ends the context, or nil.
func (b *boundContext) judgePending(e *cachedKey, rotation uint32) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.admittedBy, b.current, b.rotation = e, e, rotation
	b.armLocked(e.terms().until(rotation))
	pending := b.pending
	b.pending = nil
	for _, e := range pending {
		if err := b.judgeLocked(e); err != nil {
			return err
		}
	}
	return nil
}

// changed receives a new value of the key, and reports whether the value ended the context.
func (b *boundContext) changed(e *cachedKey) bool {
	err := b.judge(e)
	if err != nil {
		b.stop(err)
	}
	return err != nil
}

// judge returns why the value ends the context, or nil. Before markAdmitted, judge keeps the value
// for markAdmitted.
func (b *boundContext) judge(e *cachedKey) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.admittedBy == nil {
		b.pending = append(b.pending, e)
		return nil
	}
	return b.judgeLocked(e)
}

// announced marks the context as known to the observer, so that the end of the context is reported.
// If the context has already ended, announced reports the end immediately.
func (b *boundContext) announced() {
	b.mu.Lock()
	b.reported = false
	b.mu.Unlock()
	if b.endCause() != nil {
		b.report()
	}
}

// judgeLocked returns why the value ends the context. judgeLocked returns nil if the value does not
// end the context, or if the context has already ended.
func (b *boundContext) judgeLocked(e *cachedKey) error {
	t, first, current := e.terms(), b.admittedBy.terms(), b.current.terms()
	if b.endCause() != nil || t.revision <= first.revision {
		return nil
	}
	late := t.revision <= current.revision
	before := current
	if late {
		before = first
	}
	err := t.admits(b.rotation)
	if err == nil && narrows(before, t) {
		err = ErrNarrowed
	}
	if err == nil && !late {
		b.current = e
		b.armLocked(t.until(b.rotation))
	}
	return err
}

// armLocked sets the time at which the timer ends the context; zero is never.
func (b *boundContext) armLocked(until time.Time) {
	if b.timer != nil {
		b.timer.Stop()
		b.timer = nil
	}
	b.until = until
	if until.IsZero() {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(min(time.Until(until), clockCheck), func() {
		b.mu.Lock()
		armed := b.timer == timer
		expired := armed && time.Until(b.until) <= 0
		if armed && !expired {
			b.armLocked(b.until)
		}
		b.mu.Unlock()
		if expired {
			b.store.fence.EndOne(b.id, &b.Binding, ErrExpired)
		}
	})
	b.timer = timer
}

// clockCheck is the longest time that a timer runs. Keys expire by the time of day. Timers use a
// clock that stops while the machine sleeps, and does not change when the time of day is set.
const clockCheck = time.Minute

// cut ends the context, and releases the binding: an ended context needs no more notifications. The
// caller holds no lock.
func (b *boundContext) cut(cause error) {
	b.stop(cause)
	b.store.fence.Release(b.id, &b.Binding)
	b.report()
	b.followUp()
}

// report notifies the observer of the end, once, and only if the store has ended the context.
func (b *boundContext) report() {
	b.mu.Lock()
	again := b.reported
	b.reported = true
	b.mu.Unlock()
	if !again && b.store.observer != nil {
		b.store.observer.Ended(BindEnd{
			KeyID: b.id.String(), Cause: b.endCause(), After: time.Since(b.since),
		})
	}
}

// followUp closes Done and calls the function given to OnEnd. No caller waits for the end of
// followUp. After followUp, neither a timer nor the parent context refers to the context.
func (b *boundContext) followUp() {
	b.mu.Lock()
	// The timer stays off: judgeLocked sees the cause.
	b.armLocked(time.Time{})
	f := b.onEnd
	b.onEnd, b.followedUp = nil, true
	b.mu.Unlock()
	b.cancel()
	if f != nil {
		f()
	}
}

// release ends the context for its owner.
func (b *boundContext) release() {
	b.mu.Lock()
	b.reported, b.onEnd = true, nil
	b.mu.Unlock()
	b.cut(context.Canceled)
}

// endedByStore reports whether the store has ended the context, and not the owner or the parent.
func (b *boundContext) endedByStore() bool {
	cause := b.endCause()
	return cause != nil && cause != context.Canceled
}

// OnEnd implements Session.OnEnd: f is called when the store has ended the context.
func (b *boundContext) OnEnd(f func()) (stop func() bool) {
	if stop := b.setOnEnd(f); stop != nil {
		return stop
	}
	// The caller does not hold mu: AfterFunc calls Done, and Done may end the context.
	return context.AfterFunc(b, func() {
		if b.endedByStore() {
			f()
		}
	})
}

// setOnEnd is OnEnd if onEnd has no function yet. Otherwise setOnEnd returns nil: the field has
// space for one function.
func (b *boundContext) setOnEnd(f func()) (stop func() bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.followedUp:
		if b.endedByStore() {
			go f()
		}
		return func() bool { return false }
	case b.onEnd != nil:
		return nil
	}
	b.onEnd = f
	return func() bool {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.onEnd == nil || b.endCause() != nil {
			return false
		}
		b.onEnd = nil
		return true
	}
}
