package keystore

import "context"

// A Session is a use of a key that lasts longer than a call, such as a stream or a websocket. Bind
// opens a Session. Work under the context from Context, and call Close when the work is over.
//
// A Session is safe for concurrent use.
type Session struct {
	// ctx is the only field, so that a Session inside a boundContext takes little memory.
	ctx sessionContext
}

// A sessionContext is the context of a Session: a boundContext, or a freeContext of NewSession. The
// methods of the Session call the methods of the sessionContext.
type sessionContext interface {
	context.Context
	key() *Key
	allow() error
	spend(ctx context.Context, credits int64) error
	Cause() error
	OnEnd(f func()) (stop func() bool)
	release()
}

// NewSession returns a session that no store has opened: for tests, and for Verifiers other than a
// Store. The session ends with Close, and when ctx ends. After the end of ctx, the session has the
// cause of ctx. To end the session as a revocation does, cancel ctx with ErrRevoked: see
// [context.WithCancelCause].
func NewSession(ctx context.Context, key *Key) *Session {
	f := &freeContext{parent: ctx, of: key, grants: &nothing}
	if key != nil {
		f.grants = key.granted()
	}
	f.Context, f.cancel = context.WithCancelCause(ctx)
	return &Session{f}
}

// Key returns the key as it was when the session began.
func (s *Session) Key() *Key {
	if s.ctx == nil {
		return nil // the zero Session
	}
	return s.ctx.key()
}

// Context returns the context for the work of the session. The context is derived from the caller's
// context, and ends with the session. The context then has the cause of the session, or the cause
// of the caller's context if the caller's context has ended too.
func (s *Session) Context() context.Context {
	if s.ctx == nil {
		return nil // the zero Session
	}
	return s.ctx
}

// Cause returns why the session has ended, or nil. For a session from Bind, Cause stays nil when
// only the caller's context has ended. Cause is fast: the interceptors call it twice for each
// message.
func (s *Session) Cause() error { return s.ctx.Cause() }

// OnEnd calls f when the session has ended. For a session from Bind, f is not called when Close or
// the caller's context has ended the session. If the session has ended already, OnEnd calls f
// immediately. The function f runs in another goroutine than OnEnd, and may block.
//
// One change may end many sessions. In contrast to [context.AfterFunc], OnEnd does not start a
// goroutine for each session, and calls no f before all these sessions have ended.
//
// The function stop reports whether stop has prevented the call of f. Once the session has ended,
// stop returns false, even if f has not begun.
func (s *Session) OnEnd(f func()) (stop func() bool) { return s.ctx.OnEnd(f) }

// Allow takes one use from the RateLimit of the session's key, as Key.Allow does. If the session
// has ended, Allow takes nothing, and returns the cause.
func (s *Session) Allow() error {
	if err := s.Cause(); err != nil {
		return err
	}
	return s.ctx.allow()
}

// Spend takes credits from the session's key, as Key.Spend does. If the session has ended, Spend
// takes nothing, and returns the cause. Spend may wait for the storage. If the session ends
// during the wait, Spend returns the cause, and may have taken the credits.
func (s *Session) Spend(ctx context.Context, credits int64) error {
	if err := s.Cause(); err != nil {
		return err
	}
	if err := s.ctx.spend(ctx, credits); err != nil {
		return err
	}
	return s.Cause()
}

// Close ends the session. The cause is context.Canceled, unless the session has ended before. The
// store keeps the session in memory until Close is called. A second Close does nothing.
func (s *Session) Close() {
	if s.ctx != nil {
		s.ctx.release()
	}
}

// A freeContext is the context of a session that no store has opened.
type freeContext struct {
	context.Context
	parent context.Context
	cancel context.CancelCauseFunc // of Context
	of     *Key
	grants *grants // the grants of the key when the session began
}

func (f *freeContext) key() *Key { return f.of }

func (f *freeContext) allow() error { return f.grants.allow() }

func (f *freeContext) spend(ctx context.Context, credits int64) error {
	return f.grants.spend(ctx, credits, decision{})
}

// Cause checks the parent too. If package context does not know the type of the parent, the parent
// ends before the derived context ends.
func (f *freeContext) Cause() error {
	switch {
	case f.Err() != nil:
		return context.Cause(f.Context)
	case f.parent.Err() != nil:
		return context.Cause(f.parent)
	default:
		return nil
	}
}

func (f *freeContext) OnEnd(call func()) (stop func() bool) {
	return context.AfterFunc(f.Context, call)
}

func (f *freeContext) release() { f.cancel(context.Canceled) }
