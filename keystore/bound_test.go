package keystore

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func bindInRig(t *testing.T, parent context.Context) *boundContext {
	r := newRig(t, fence.TwoPhase)
	ctx, _, release, err := parts(r.store.Bind(parent, r.issued.Secret.Reveal()))
	require.NoError(t, err)
	t.Cleanup(release)
	return ctx.(*boundContext)
}

// A context that nobody has asked for Done is only marked by stop. Whatever is looked at next shows
// that it has ended.
func TestEveryMethodShowsTheEndOfAContext(t *testing.T) {
	type key struct{}
	for name, look := range map[string]func(t *testing.T, b *boundContext){
		"Err": func(t *testing.T, b *boundContext) {
			require.ErrorIs(t, b.Err(), context.Canceled)
		},
		"Done": func(t *testing.T, b *boundContext) { <-b.Done() },
		"Cause": func(t *testing.T, b *boundContext) {
			require.ErrorIs(t, context.Cause(b), ErrRevoked)
		},
		"Err of a value's": func(t *testing.T, b *boundContext) {
			require.Error(t, context.WithValue(b, key{}, 1).Err())
		},
		"Cause of a value's": func(t *testing.T, b *boundContext) {
			require.ErrorIs(t, context.Cause(context.WithValue(b, key{}, 1)), ErrRevoked)
		},
		"a derived context": func(t *testing.T, b *boundContext) {
			ctx, cancel := context.WithCancel(b)
			defer cancel()
			require.ErrorIs(t, context.Cause(ctx), ErrRevoked)
		},
		"followUp": func(t *testing.T, b *boundContext) { b.followUp() },
	} {
		t.Run(name, func(t *testing.T) {
			b := bindInRig(t, t.Context())
			b.stop(ErrRevoked)
			require.NoError(t, b.Context.Err(), "nobody has looked yet")
			require.ErrorIs(t, b.Cause(), ErrRevoked)
			look(t, b)
			require.ErrorIs(t, context.Cause(b.Context), ErrRevoked)
			b.stop(ErrNarrowed)
			require.ErrorIs(t, context.Cause(b), ErrRevoked, "the first cause stays")
			require.ErrorIs(t, b.Cause(), ErrRevoked)
		})
	}
}

// Whoever has asked for Done, or derived a context, is woken by stop itself.
func TestStopClosesDoneForItsWaiters(t *testing.T) {
	for name, wait := range map[string]func(b *boundContext) <-chan struct{}{
		"Done": (*boundContext).Done,
		"Done of a derived context": func(b *boundContext) <-chan struct{} {
			ctx, cancel := context.WithCancel(b)
			t.Cleanup(cancel)
			return ctx.Done()
		},
		"AfterFunc": func(b *boundContext) <-chan struct{} {
			called := make(chan struct{})
			context.AfterFunc(b, func() { close(called) })
			return called
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := bindInRig(t, t.Context())
			woken := wait(b)
			b.stop(ErrRevoked)
			<-woken
			require.ErrorIs(t, context.Cause(b.Context), ErrRevoked)
		})
	}
}

// The two sides of the second invariant at once. One that misses the other waits for ever.
func TestDoneRacesStop(t *testing.T) {
	b := bindInRig(t, t.Context())
	for range 10000 {
		b := b.store.newBoundContext(t.Context(), b.id)
		go b.stop(ErrRevoked)
		<-b.Done()
	}
}

// A hooked hasher calls a hook once it has matched a token.
type hooked struct {
	hashing.Hasher
	hook func()
}

func (h *hooked) Match(d hashing.Digest, token string) hashing.Result {
	r := h.Hasher.Match(d, token)
	if f := h.hook; f != nil {
		h.hook = nil
		f()
	}
	return r
}

// A Bind under a context of Bind's, which ends meanwhile: that is no answer about the key that is
// bound.
func TestAnEndedParentIsNotADenial(t *testing.T) {
	h := &hooked{Hasher: hashing.SHA256()}
	s, err := New(backendtest.NewMemory(), &Options{Hasher: h})
	require.NoError(t, err)
	defer s.Close()
	outer, err := s.Create(t.Context(), Spec{Name: "outer"})
	require.NoError(t, err)
	inner, err := s.Create(t.Context(), Spec{Name: "inner"})
	require.NoError(t, err)
	parent, _, release, err := parts(s.Bind(t.Context(), outer.Secret.Reveal()))
	require.NoError(t, err)
	defer release()
	h.hook = func() { require.NoError(t, s.Revoke(t.Context(), outer.Key.ID, "")) }
	_, err = s.Bind(parent, inner.Secret.Reveal())
	require.ErrorIs(t, err, context.Canceled)
	require.NotErrorIs(t, err, ErrDenied)
	require.Zero(t, s.Stats().Live, "neither is left")
}

// counts is an Observer that counts, and calls a hook before it counts a Bind.
type counts struct {
	Observer
	bound, ended atomic.Int64
	hook         func()
}

func (*counts) Changed(Event)   {}
func (*counts) Refused(Refusal) {}
func (c *counts) Ended(BindEnd) { c.ended.Add(1) }
func (c *counts) Verified(v Verification) {
	if f := c.hook; f != nil && v.Bound {
		c.hook = nil
		f()
		c.ended.Add(100 * c.ended.Load()) // told too early
	}
	if v.Bound {
		c.bound.Add(1)
	}
}

// The observer hears of the end of what it was told of, after that, and of no other.
func TestEachReportedEndFollowsItsBind(t *testing.T) {
	c, h := new(counts), &hooked{Hasher: hashing.SHA256()}
	s, err := New(backendtest.NewMemory(), &Options{Hasher: h, Observer: c})
	require.NoError(t, err)
	defer s.Close()
	bind := func(revokeFrom *func()) (context.Context, error) {
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		_, err = s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		*revokeFrom = func() { require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, "")) }
		ctx, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		if err == nil {
			t.Cleanup(release)
		}
		return ctx, err
	}
	_, err = bind(&h.hook) // before it is admitted
	require.ErrorIs(t, err, ErrRevoked)
	require.Equal(t, []int64{0, 0}, []int64{c.bound.Load(), c.ended.Load()})
	ctx, err := bind(&c.hook) // while the observer is told
	require.NoError(t, err)
	require.ErrorIs(t, context.Cause(ctx), ErrRevoked)
	require.Equal(t, []int64{1, 1}, []int64{c.bound.Load(), c.ended.Load()})
	revoke := func() {}
	_, err = bind(&revoke) // after it has been
	require.NoError(t, err)
	revoke()
	require.Equal(t, []int64{2, 2}, []int64{c.bound.Load(), c.ended.Load()})
}

// The observer hears of what the store ends, once, and not of what its owner or its parent ends.
func TestOnlyEndsByTheStoreAreReported(t *testing.T) {
	for name, tt := range map[string]struct {
		end    func(s *Store, id string, cancelParent, release context.CancelFunc)
		report bool
	}{
		"release": {func(_ *Store, _ string, _, release context.CancelFunc) { release() },
			false},
		"release, twice": {func(_ *Store, _ string, _, release context.CancelFunc) {
			release()
			release()
		}, false},
		"the parent": {func(_ *Store, _ string, cancel, _ context.CancelFunc) { cancel() },
			false},
		"parent, release": {func(_ *Store, _ string, cancel, release context.CancelFunc) {
			cancel()
			release()
		}, false},
		"release, Revoke": {func(s *Store, id string, _, release context.CancelFunc) {
			release()
			require.NoError(t, s.Revoke(context.Background(), id, ""))
		}, false},
		"Revoke, release": {func(s *Store, id string, _, release context.CancelFunc) {
			require.NoError(t, s.Revoke(context.Background(), id, ""))
			release()
		}, true},
		"Disable, Revoke": {func(s *Store, id string, _, _ context.CancelFunc) {
			require.NoError(t, s.Disable(context.Background(), id, ""))
			require.NoError(t, s.Revoke(context.Background(), id, ""))
		}, true},
		"expiry": {func(*Store, string, context.CancelFunc, context.CancelFunc) {
			time.Sleep(time.Hour)
		}, true},
		"release, expiry": {func(_ *Store, _ string, _, release context.CancelFunc) {
			release()
			time.Sleep(time.Hour)
		}, false},
		"Close": {func(s *Store, _ string, _, _ context.CancelFunc) {
			require.NoError(t, s.Close())
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := new(counts)
				s, err := New(backendtest.NewMemory(), &Options{Observer: c})
				require.NoError(t, err)
				defer s.Close()
				issued, err := s.Create(t.Context(),
					Spec{Name: "test", ExpiresAt: time.Now().Add(time.Hour)})
				require.NoError(t, err)
				parent, cancel := context.WithCancel(t.Context())
				defer cancel()
				_, _, release, err := parts(s.Bind(parent, issued.Secret.Reveal()))
				require.NoError(t, err)
				defer release()
				tt.end(s, issued.Key.ID, cancel, release)
				synctest.Wait()
				want := int64(0)
				if tt.report {
					want = 1
				}
				require.Equal(t, want, c.ended.Load())
				if name != "the parent" { // which the store does not watch
					require.Zero(t, s.Stats().Live)
				}
			})
		})
	}
}

// What a context is told before it is admitted counts, in the order in which it comes, and does not
// end what comes later.
func TestChangesBeforeTheAdmissionCount(t *testing.T) {
	h := &hooked{Hasher: hashing.SHA256()}
	s, err := New(backendtest.NewMemory(), &Options{Hasher: h})
	require.NoError(t, err)
	defer s.Close()
	bind := func(before func(id string) error) (id string, ctx context.Context, err error) {
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		// so that Bind is registered when it decides
		_, err = s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		h.hook = func() { require.NoError(t, before(issued.Key.ID)) }
		ctx, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		if err == nil {
			t.Cleanup(release)
		}
		return issued.Key.ID, ctx, err
	}
	rename := func(id string) error {
		_, err := s.Update(t.Context(), id, func(spec *Spec) error { spec.Name += "x"; return nil })
		return err
	}
	_, _, err = bind(func(id string) error {
		return errors.Join(s.Disable(t.Context(), id, ""), s.Enable(t.Context(), id), rename(id))
	})
	require.ErrorIs(t, err, ErrDisabled, "it was, for a moment")
	require.Zero(t, s.Stats().Live)

	id, ctx, err := bind(func(id string) error { return errors.Join(rename(id), rename(id)) })
	require.NoError(t, err)
	require.NoError(t, ctx.Err())
	require.NoError(t, s.Revoke(t.Context(), id, ""))
	require.ErrorIs(t, context.Cause(ctx), ErrRevoked)
}

// A change that was committed before a context was bound is no change to it, however late it is
// told.
func TestALateNotificationOfAnEarlierChangeEndsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, fence.TwoPhase)
		id := r.issued.Key.ID
		after := r.backend.set(&r.backend.afterApply)
		expire := func(ctx context.Context, at time.Time) error {
			_, err := r.store.Update(ctx, id,
				func(spec *Spec) error { spec.ExpiresAt = at; return nil })
			return err
		}
		narrowing := start(func() error {
			return expire(context.Background(), time.Now().Add(time.Hour))
		})
		<-after.arrived
		r.backend.clear(&r.backend.afterApply)
		require.NoError(t, expire(t.Context(), time.Time{}))
		bound, err := r.bind()
		require.NoError(t, err)
		close(after.open)
		require.NoError(t, narrowing())
		require.NoError(t, bound.Err(), "it has been bound since")
	})
}

// Of two changes that come in the wrong order, the earlier one is judged by what the key was when
// bound, and the later one's expiry stays.
func TestNotificationsInTheWrongOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, fence.TwoPhase)
		expires := time.Now().Add(time.Hour)
		update := func(change func(*Spec)) error {
			_, err := r.store.Update(context.Background(), r.issued.Key.ID,
				func(spec *Spec) error { change(spec); return nil })
			return err
		}
		require.NoError(t, update(func(spec *Spec) { spec.ExpiresAt = expires }))
		bound, err := r.bind()
		require.NoError(t, err)
		after := r.backend.set(&r.backend.afterApply)
		first := start(func() error {
			return update(func(spec *Spec) { spec.ExpiresAt = expires.Add(time.Hour) })
		})
		<-after.arrived
		r.backend.clear(&r.backend.afterApply)
		require.NoError(t, update(func(spec *Spec) {
			spec.ExpiresAt, spec.Scopes = expires.Add(2*time.Hour), []string{"more"}
		}))
		close(after.open)
		require.NoError(t, first())
		require.NoError(t, bound.Err())
		time.Sleep(3*time.Hour - time.Nanosecond)
		synctest.Wait()
		require.NoError(t, bound.Err())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.ErrorIs(t, context.Cause(bound), ErrExpired)
	})
}

// A timer that has fired, and waits for the lock while the expiry is taken away, ends nothing.
func TestATimerThatFiresLateEndsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := bindInRig(t, t.Context())
		b.mu.Lock()
		b.armLocked(time.Now().Add(time.Second))
		time.Sleep(time.Second)
		b.armLocked(time.Time{})
		b.mu.Unlock()
		synctest.Wait()
		require.NoError(t, b.Err())
		require.Nil(t, b.timer)
	})
}

// A timer that fires while a change ends the context does not report the end again, and nothing
// follows twice.
func TestAnEndIsReportedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := new(counts)
		s, err := New(backendtest.NewMemory(), &Options{Observer: c})
		require.NoError(t, err)
		defer s.Close()
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		ctx, _, _, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		require.NoError(t, err)
		b := ctx.(*boundContext)
		followed := 0
		b.OnEnd(func() { followed++ })
		require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
		synctest.Wait()
		b.cut(ErrExpired) // as the timer does
		synctest.Wait()
		require.EqualValues(t, 1, c.ended.Load())
		require.Equal(t, 1, followed)
		require.ErrorIs(t, b.Cause(), ErrRevoked)
	})
}

// A BindEnd says for how long a context lived.
func TestBindEndSaysHowLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &lastBindEnd{}
		s, err := New(backendtest.NewMemory(), &Options{Observer: o})
		require.NoError(t, err)
		defer s.Close()
		issued, err := s.Create(t.Context(),
			Spec{Name: "test", ExpiresAt: time.Now().Add(time.Hour)})
		require.NoError(t, err)
		time.Sleep(time.Minute)
		_, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
		require.NoError(t, err)
		defer release()
		time.Sleep(time.Hour)
		synctest.Wait()
		want := BindEnd{KeyID: issued.Key.ID, Cause: ErrExpired, After: 59 * time.Minute}
		require.Equal(t, want, o.BindEnd)
	})
}

type lastBindEnd struct {
	Observer
	BindEnd
}

func (*lastBindEnd) Changed(Event)         {}
func (*lastBindEnd) Verified(Verification) {}
func (o *lastBindEnd) Ended(e BindEnd)     { o.BindEnd = e }

// A change that has found a context before its owner released it tells it afterwards.
func TestAReleasedContextIsNotArmedAgain(t *testing.T) {
	s := newRig(t, fence.TwoPhase).store
	issued, err := s.Create(t.Context(), Spec{Name: "test", ExpiresAt: time.Now().Add(time.Hour)})
	require.NoError(t, err)
	ctx, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
	require.NoError(t, err)
	b := ctx.(*boundContext)
	release()
	kr, err := s.get(t.Context(), b.id)
	require.NoError(t, err)
	kr.revision++
	require.False(t, b.changed(kr.cached()))
	require.Nil(t, b.timer)
}

// A context that the store has ended is not held by its timer or by its parent until the key
// expires, even if its owner never releases it.
func TestAnEndedContextIsNotReferenced(t *testing.T) {
	for name, end := range map[string]func(s *Store, id string) error{
		"Revoke": func(s *Store, id string) error { return s.Revoke(context.Background(), id, "") },
		"Cut": func(s *Store, id string) error {
			parsed, err := parseID("", id)
			s.fence.Cut(parsed, ErrRevoked)
			return err
		},
		"Close": func(s *Store, _ string) error { return s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newRig(t, fence.TwoPhase).store
				issued, err := s.Create(t.Context(),
					Spec{Name: "test", ExpiresAt: time.Now().Add(time.Hour)})
				require.NoError(t, err)
				parent := &watched{Context: t.Context()}
				ctx, _, _, err := parts(s.Bind(parent, issued.Secret.Reveal()))
				require.NoError(t, err)
				b := ctx.(*boundContext)
				require.NotNil(t, b.timer)
				require.EqualValues(t, 1, parent.children.Load())
				require.NoError(t, end(s, issued.Key.ID))
				synctest.Wait()
				require.Nil(t, b.timer)
				require.Zero(t, parent.children.Load())
			})
		})
	}
}

// A watched context counts the contexts that are derived from it, and not cancelled yet: package
// context calls AfterFunc for each.
type watched struct {
	context.Context
	children atomic.Int64
}

func (*watched) Value(any) any { return nil }
func (w *watched) AfterFunc(func()) (stop func() bool) {
	w.children.Add(1)
	return func() bool { return w.children.Add(-1) >= 0 }
}

// A timer runs by a clock that stands still while the machine sleeps, and that is not set as the
// clock of the day is. So a context looks at the clock of the day every minute. The test moves the
// end of the key instead of the clock.
func TestExpiryFollowsTheWallClock(t *testing.T) {
	for name, tt := range map[string]struct{ set, after time.Duration }{
		"ahead, past the end":   {2 * time.Hour, clockCheck},
		"ahead, before the end": {30 * time.Minute, 30 * time.Minute},
		"back":                  {-time.Hour, 2 * time.Hour},
		"not at all":            {0, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newRig(t, fence.TwoPhase).store
				issued, err := s.Create(t.Context(),
					Spec{Name: "test", ExpiresAt: time.Now().Add(time.Hour)})
				require.NoError(t, err)
				ctx, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
				require.NoError(t, err)
				defer release()
				b := ctx.(*boundContext)
				b.mu.Lock()
				b.until = b.until.Add(-tt.set)
				b.mu.Unlock()
				time.Sleep(tt.after - time.Nanosecond)
				synctest.Wait()
				require.NoError(t, b.Err())
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				require.ErrorIs(t, context.Cause(b), ErrExpired)
			})
		})
	}
}

// A Close that comes while another one is at work waits for it, and takes nothing away under it.
func TestASecondCloseWaitsForTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &gated{Backend: backendtest.NewMemory()}
		s, err := New(b, nil)
		require.NoError(t, err)
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		_, err = s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		g := b.set(&b.beforeApply) // of the last use
		closed := make(chan error, 2)
		for range 2 {
			go func() { closed <- s.Close() }()
		}
		<-g.arrived
		synctest.Wait()
		require.Empty(t, closed)
		close(g.open)
		require.NoError(t, <-closed)
		require.NoError(t, <-closed)
	})
}

func TestOnEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		parent, cancel := context.WithCancel(t.Context())
		var calls atomic.Int64
		call := func() { calls.Add(1) }

		b := bindInRig(t, parent)
		stop := b.OnEnd(call)
		require.True(t, stop())
		require.False(t, stop(), "it has been kept from it already")
		b.cut(ErrRevoked)
		synctest.Wait()
		require.Zero(t, calls.Load())
		require.False(t, b.OnEnd(call)(), "it had ended")
		synctest.Wait()
		require.EqualValues(t, 1, calls.Load())

		b = bindInRig(t, parent)
		stop, second := b.OnEnd(call), b.OnEnd(call)
		b.stop(ErrRevoked)
		require.False(t, stop(), "it has ended, and what follows is under way")
		require.False(t, second())
		b.cut(ErrRevoked)
		synctest.Wait()
		require.EqualValues(t, 3, calls.Load())

		b = bindInRig(t, parent)
		stop = b.OnEnd(call)
		cancel()
		synctest.Wait()
		require.Error(t, b.Err())
		require.NoError(t, b.Cause())
		require.True(t, stop(), "the end of its parent is not its own")
		b.release()
		synctest.Wait()
		require.EqualValues(t, 3, calls.Load())

		b = bindInRig(t, t.Context())
		b.OnEnd(call)
		b.release()
		synctest.Wait()
		require.EqualValues(t, 3, calls.Load(), "its owner has ended it")

		release := make(chan struct{})
		require.False(t, b.OnEnd(func() { <-release })(), "what blocks does not hold up who asks")
		close(release)
	})
}

// slow takes longer to hear of things than a change may take.
type slow struct{ Observer }

func (slow) Ended(BindEnd)         { time.Sleep(time.Minute) }
func (slow) Changed(Event)         { time.Sleep(time.Minute) }
func (slow) Verified(Verification) {}

// The outcome of a change is known as soon as the backend has answered. However long it takes to
// tell everybody, it is not reported as unknown, neither for the store's timeout nor for the
// caller's.
func TestASlowObserverDoesNotMakeAnOutcomeUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, deadline := range map[string]time.Duration{"the store's timeout": time.Hour,
			"the caller's": time.Second} {
			b := backendtest.NewMemory()
			s, err := New(b, &Options{Observer: slow{}, Timeout: 10 * time.Second})
			require.NoError(t, err)
			issued, err := s.Create(t.Context(), Spec{Name: "test"})
			require.NoError(t, err, name)
			bound, _, release, err := parts(s.Bind(t.Context(), issued.Secret.Reveal()))
			require.NoError(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			begin := time.Now()
			require.NoError(t, s.Revoke(ctx, issued.Key.ID, ""), name)
			require.Equal(t, 2*time.Minute, time.Since(begin))
			require.ErrorIs(t, context.Cause(bound), ErrRevoked)
			cancel()
			release()
			require.NoError(t, s.Close())
		}
	})
}
