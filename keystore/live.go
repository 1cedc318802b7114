package keystore

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A live is a context that Bind gave out. It is registered with the fence before it is known whether the token admits,
// so that no change can pass it by, and hears of each change of the key until it ends.
//
// The invariants:
//
//  1. Once it has been admitted, it has heard of every change that is committed after the value that it was admitted by,
//     and has ended if one of them did not admit it. Two changes may tell it in either order; one that comes late is
//     judged all the same, because a key that was disabled and enabled again was disabled.
//  2. It has ended when cause is set: from then on Done is closed and Err is not nil, to whoever looks. To cancel a
//     context takes microseconds, which a Revoke of 10,000 has not; and only who has asked for Done can be waiting. So
//     where nobody has, the first look makes up for it, or else follow does. Done sets asked before it looks at cause,
//     and stop sets cause before it looks at asked: one of them sees the other.
//  3. Once the store has ended it, what OnEnd was given is called, unless its owner releases it first.
type live struct {
	context.Context      // derived from the caller's; what to look at is that of live
	fence.Binding[entry] // registered under id; its functions are those of this type

	store *Store
	id    token.ID
	since time.Time
	end   context.CancelCauseFunc // of Context
	cause atomic.Pointer[error]   // why the store, or its owner, has ended it
	asked atomic.Bool             // for Done

	session Session // what Bind returns; it points to this live

	mu       sync.Mutex // guards all below
	reported bool       // to the observer, or it is not to hear of it: it was not told of a Bind, or its owner released it
	over     bool       // what was to follow has followed
	onEnd    func()     // what is to follow; nil: nothing
	told     []*entry   // what it was told before it was admitted
	first    *entry     // by which it was admitted; nil until then
	latest   *entry     // by which it goes on
	rotation uint32     // the secret that it was opened with
	until    time.Time  // when the timer ends the context
	timer    *time.Timer
}

func (s *Store) newLive(ctx context.Context, id token.ID) *live {
	l := &live{store: s, id: id, since: time.Now()}
	l.reported = true // until Bind has returned it, as good as
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
// after that.
func (l *live) key() *Key { return &l.first.key }

func (l *live) allow() error { return l.first.grants.allow() }

// Cause is Session.Cause: it does not count the end of the parent.
func (l *live) Cause() error {
	if cause := l.cause.Load(); cause != nil {
		return *cause
	}
	return nil
}

// cancel makes up for what stop left.
func (l *live) cancel() {
	if cause := l.cause.Load(); cause != nil {
		l.end(*cause)
	}
}

// stop ends it. A second call does nothing.
func (l *live) stop(cause error) {
	if l.cause.CompareAndSwap(nil, &cause) {
		l.noteUse()
	}
	if l.asked.Load() {
		l.cancel()
	}
}

// noteUse notes the end of the context as a use of the key, if the key was admitted: until now, the
// context itself was one.
func (l *live) noteUse() {
	l.mu.Lock()
	e := l.first
	l.mu.Unlock()
	if e != nil && l.store.usage.due(e) {
		l.store.usage.note(e.ID, &e.used)
	}
}

// admit starts it, by what was decided about its token.
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

// changed is told of a new value of the key, and reports whether that ended it.
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

// given says that the observer has been told of it, and is to hear of its end: of one that has come already, now.
func (l *live) given() {
	l.mu.Lock()
	l.reported = false
	l.mu.Unlock()
	if l.Cause() != nil {
		l.report()
	}
}

// judgeLocked returns why the value ends it, if it does and it has not ended.
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

// armLocked sets the time at which it ends by itself; zero is never.
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

// clockCheck is the longest that a timer goes. Timers go by a clock that stands still while the machine sleeps, and is not
// set when that of the day is, which keys expire by.
const clockCheck = time.Minute

// cut ends it, and forgets it: it has nothing more to hear. It is called with no lock held.
func (l *live) cut(cause error) {
	l.stop(cause)
	l.store.fence.Release(l.id, &l.Binding)
	l.report()
	l.follow()
}

// report tells the observer, once, and only if it is the store that has ended it.
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

// follow does what nobody waits for. After follow, neither a timer nor the parent context refers to the context.
func (l *live) follow() {
	l.mu.Lock()
	l.armLocked(time.Time{}) // for good: judgeLocked sees the cause
	f := l.onEnd
	l.onEnd, l.over = nil, true
	l.mu.Unlock()
	l.cancel()
	if f != nil {
		f()
	}
}

// release ends it at its owner's wish.
func (l *live) release() {
	l.mu.Lock()
	l.reported, l.onEnd = true, nil
	l.mu.Unlock()
	l.cut(context.Canceled)
}

// endedByStore reports whether the store has ended the context, and not its owner or its parent.
func (l *live) endedByStore() bool {
	cause := l.Cause()
	return cause != nil && cause != context.Canceled
}

// OnEnd is Session.OnEnd: f is called when the store has ended the context.
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
