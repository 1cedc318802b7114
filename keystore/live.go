package keystore

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A live is the context of a session from Bind. Bind registers the context with the fence before
// Bind calls admit, so that the context misses no change. Until the context ends, the fence
// notifies the context of each change of the key.
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
//     follow does. Done sets asked before Done reads cause. stop sets cause before stop reads
//     asked. So at least one of Done and stop sees what the other has set.
//  3. Once the store has ended the context, the function given to OnEnd is called, unless the owner
//     releases the context first.
type live struct {
	context.Context      // derived from the caller's context; call the methods of live instead
	fence.Binding[entry] // registered under id; its functions are methods of live

	store *Store
	id    token.ID
	since time.Time
	end   context.CancelCauseFunc // of Context
	cause atomic.Pointer[error]   // why the store or the owner has ended the context; nil until then
	asked atomic.Bool             // a caller has called Done

	session Session // the session that Bind returns; bound in session is this live

	mu sync.Mutex // guards all below
	// The end was reported to the observer, or must not be reported: the observer was not notified of
	// a Bind, or the owner has released the context.
	reported bool
	over     bool      // follow has run
	onEnd    func()    // follow calls onEnd; nil: nothing to call
	told     []*entry  // the values that changed received before admit
	first    *entry    // the value that admitted the context; nil until admit
	latest   *entry    // the newest value that admits the context
	rotation uint32    // of the secret that opened the context
	until    time.Time // when the timer ends the context
	timer    *time.Timer
}

func (s *Store) newLive(ctx context.Context, id token.ID) *live {
	l := &live{store: s, id: id, since: time.Now()}
	l.reported = true // until Bind calls given
	l.Context, l.end = context.WithCancelCause(ctx)
	l.Binding = fence.Binding[entry]{Changed: l.changed, Cut: l.stop, AfterEnd: l.follow}
	if s.observer != nil {
		l.Ended = l.report
	}
	return l
}

func (l *live) Done() <-chan struct{} {
	l.asked.Store(true)
	l.cancel()
	return l.Context.Done()
}

func (l *live) Err() error {
	l.cancel()
	return l.Context.Err()
}

// key and allow serve the Session. Bind returns the Session after admit, and first does not change
// after admit.
func (l *live) key() *Key { return &l.first.key }

func (l *live) allow() error { return l.first.grants.allow() }

// Cause implements Session.Cause. The end of the parent context does not count.
func (l *live) Cause() error {
	if cause := l.cause.Load(); cause != nil {
		return *cause
	}
	return nil
}

// cancel cancels the embedded Context if cause is set. stop may have skipped this step.
func (l *live) cancel() {
	if cause := l.cause.Load(); cause != nil {
		l.end(*cause)
	}
}

// stop ends the context. A second call does nothing.
func (l *live) stop(cause error) {
	if l.cause.CompareAndSwap(nil, &cause) {
		l.noteUse()
	}
	if l.asked.Load() {
		l.cancel()
	}
}

// noteUse notes the end of the context as a use of the key, if the key was admitted: until now, the
// context itself was a use.
func (l *live) noteUse() {
	l.mu.Lock()
	e := l.first
	l.mu.Unlock()
	if e != nil && l.store.usage.due(e) {
		l.store.usage.note(e.ID, &e.used)
	}
}

// admit starts the context with the decision about the token: e is the value that admits, and
// rotation is that of the secret. Then admit judges the values that arrived earlier.
func (l *live) admit(e *entry, rotation uint32) {
	l.Admitted.Store(true)
	l.mu.Lock()
	l.first, l.latest, l.rotation = e, e, rotation
	l.armLocked(e.until(rotation))
	var err error
	for _, e := range l.told {
		if err = l.judgeLocked(e); err != nil {
			break
		}
	}
	l.told = nil
	l.mu.Unlock()
	if err != nil {
		l.cut(err)
	}
}

// changed receives a new value of the key, and reports whether the value ended the context. Before
// admit, changed keeps the value for admit.
func (l *live) changed(e *entry) bool {
	l.mu.Lock()
	if l.first == nil {
		l.told = append(l.told, e)
		l.mu.Unlock()
		return false
	}
	err := l.judgeLocked(e)
	l.mu.Unlock()
	if err != nil {
		l.stop(err)
	}
	return err != nil
}

// given marks the context as known to the observer, so that the end of the context is reported. If
// the context has already ended, given reports the end immediately.
func (l *live) given() {
	l.mu.Lock()
	l.reported = false
	l.mu.Unlock()
	if l.Cause() != nil {
		l.report()
	}
}

// judgeLocked returns why the value ends the context. judgeLocked returns nil if the value does not
// end the context, or if the context has already ended.
func (l *live) judgeLocked(e *entry) error {
	if l.Cause() != nil || e.revision <= l.first.revision {
		return nil
	}
	late := e.revision <= l.latest.revision
	before := l.latest
	if late {
		before = l.first
	}
	err := e.admits(l.rotation)
	if err == nil && narrows(before, e) {
		err = ErrNarrowed
	}
	if err == nil && !late {
		l.latest = e
		l.armLocked(e.until(l.rotation))
	}
	return err
}

// armLocked sets the time at which the timer ends the context; zero is never.
func (l *live) armLocked(until time.Time) {
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	l.until = until
	if until.IsZero() {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(min(time.Until(until), clockCheck), func() {
		l.mu.Lock()
		current := l.timer == timer
		expired := current && time.Until(l.until) <= 0
		if current && !expired {
			l.armLocked(l.until)
		}
		l.mu.Unlock()
		if expired {
			l.cut(ErrExpired)
		}
	})
	l.timer = timer
}

// clockCheck is the longest time that a timer runs. Keys expire by the time of day. Timers use a
// clock that stops while the machine sleeps, and does not change when the time of day is set.
const clockCheck = time.Minute

// cut ends the context, and releases the binding: an ended context needs no more notifications. The
// caller holds no lock.
func (l *live) cut(cause error) {
	l.stop(cause)
	l.store.fence.Release(l.id, &l.Binding)
	l.report()
	l.follow()
}

// report notifies the observer of the end, once, and only if the store has ended the context.
func (l *live) report() {
	l.mu.Lock()
	again := l.reported
	l.reported = true
	l.mu.Unlock()
	if !again && l.store.observer != nil {
		l.store.observer.Ended(BindEnd{
			KeyID: l.id.String(), Cause: l.Cause(), After: time.Since(l.since),
		})
	}
}

// follow closes Done and calls the function given to OnEnd. No caller waits for the end of follow.
// After follow, neither a timer nor the parent context refers to the context.
func (l *live) follow() {
	l.mu.Lock()
	// The timer stays off: judgeLocked sees the cause.
	l.armLocked(time.Time{})
	f := l.onEnd
	l.onEnd, l.over = nil, true
	l.mu.Unlock()
	l.cancel()
	if f != nil {
		f()
	}
}

// release ends the context for its owner.
func (l *live) release() {
	l.mu.Lock()
	l.reported, l.onEnd = true, nil
	l.mu.Unlock()
	l.cut(context.Canceled)
}

// endedByStore reports whether the store has ended the context, and not the owner or the parent.
func (l *live) endedByStore() bool {
	cause := l.Cause()
	return cause != nil && cause != context.Canceled
}

// OnEnd implements Session.OnEnd: f is called when the store has ended the context.
func (l *live) OnEnd(f func()) (stop func() bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.over:
		if l.endedByStore() {
			go f()
		}
		return func() bool { return false }
	case l.onEnd != nil: // the field has space for one function
		return context.AfterFunc(l, func() {
			if l.endedByStore() {
				f()
			}
		})
	}
	l.onEnd = f
	return func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.onEnd == nil || l.Cause() != nil {
			return false
		}
		l.onEnd = nil
		return true
	}
}
