package keystore

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A gated backend stops callers where a test wants them: a Get before and after its read, an Apply
// before and after its commit. Each gate that is set lets through what arrives once it is closed,
// and tells arrivals.
type gated struct {
	backend.Backend
	mu                                           sync.Mutex
	beforeGet, afterGet, beforeApply, afterApply *gate
}

type gate struct{ arrived, open chan struct{} }

func newGate() *gate { return &gate{make(chan struct{}, 8), make(chan struct{})} }

func (g *gate) pass() {
	if g != nil {
		g.arrived <- struct{}{}
		<-g.open
	}
}

// set puts a gate in a place, and returns it; whoever was there before is not affected by a later
// one.
func (b *gated) set(place **gate) *gate {
	b.mu.Lock()
	defer b.mu.Unlock()
	*place = newGate()
	return *place
}

func (b *gated) clear(place **gate) {
	b.mu.Lock()
	defer b.mu.Unlock()
	*place = nil
}

func (b *gated) take(place **gate) *gate {
	b.mu.Lock()
	defer b.mu.Unlock()
	return *place
}

func (b *gated) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	b.take(&b.beforeGet).pass()
	after := b.take(&b.afterGet)
	e, err := b.Backend.Get(ctx, key)
	after.pass()
	return e, err
}

func (b *gated) Apply(ctx context.Context, changes ...backend.Change) error {
	b.take(&b.beforeApply).pass()
	after := b.take(&b.afterApply)
	err := b.Backend.Apply(ctx, changes...)
	after.pass()
	return err
}

type rig struct {
	*testing.T
	store   *Store
	backend *gated
	issued  *Issued
}

func newRig(t *testing.T, v fence.Variant) *rig {
	b := &gated{Backend: backendtest.NewMemory()}
	s, err := New(b, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	s.fence.Break(v)
	issued, err := s.Create(t.Context(), Spec{Name: "test"})
	require.NoError(t, err)
	return &rig{t, s, b, issued}
}

func (r *rig) verify() error {
	_, err := r.store.Verify(context.Background(), r.issued.Secret.Reveal())
	return err
}

// bind returns a context that is released at the end of the test.
func (r *rig) bind() (context.Context, error) {
	ctx, _, release, err := parts(r.store.Bind(context.Background(), r.issued.Secret.Reveal()))
	if err == nil {
		r.Cleanup(release)
	}
	return ctx, err
}

// start runs f, and returns a function that waits for its result.
func start(f func() error) (wait func() error) {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return func() error { return <-done }
}

func (r *rig) revoke() error { return r.store.Revoke(context.Background(), r.issued.Key.ID, "") }

// A scenario forces one interleaving of a revocation with uses of its key, and returns what went
// wrong.
type scenario struct {
	name string
	play func(r *rig) string
}

var scenarios = []scenario{
	{"a reader is stopped between its store read and its install while a revocation commits and " +
		"returns", func(r *rig) string {
		g := r.backend.set(&r.backend.afterGet)
		reader := start(r.verify)
		<-g.arrived
		r.backend.clear(&r.backend.afterGet)
		require.NoError(r, r.revoke())
		close(g.open)
		require.NoError(r, reader(), "it began before the revocation, and may be let in")
		return r.mustBeDenied("after Revoke returned")
	}},
	{"a reader reads the old record before the commit, and installs it while the commit goes on",
		func(r *rig) string {
			before := r.backend.set(&r.backend.beforeApply)
			after := r.backend.set(&r.backend.afterApply)
			revocation := start(r.revoke)
			<-before.arrived
			// The revocation is between phase A and its commit.
			require.NoError(r, r.verify())
			close(before.open)
			<-after.arrived
			// It is committed, and before phase C.
			close(after.open)
			require.NoError(r, revocation())
			return r.mustBeDenied("after Revoke returned")
		}},
	{"one reader sees the new record in the store while another still has the old one in the cache",
		func(r *rig) string {
			// The first reader misses and waits to read.
			slow := r.backend.set(&r.backend.beforeGet)
			first := start(r.verify)
			<-slow.arrived
			r.backend.clear(&r.backend.beforeGet)
			require.NoError(r, r.verify()) // another fills the cache
			after := r.backend.set(&r.backend.afterApply)
			revocation := start(r.revoke)
			<-after.arrived
			// Committed, and before phase C: the first reader sees it now.
			close(slow.open)
			require.ErrorIs(r, first(), ErrRevoked)
			wrong := r.mustBeDenied("after somebody was told that it is revoked")
			close(after.open)
			require.NoError(r, revocation())
			return wrong
		}},
	{"a bind is stopped between its store read and its registration while a revocation commits " +
		"and returns", func(r *rig) string {
		g := r.backend.set(&r.backend.afterGet)
		var bound context.Context
		bind := start(func() (err error) { bound, err = r.bind(); return err })
		<-g.arrived
		r.backend.clear(&r.backend.afterGet)
		require.NoError(r, r.revoke())
		close(g.open)
		if bind() == nil && bound.Err() == nil {
			return "a bound context outlived its key"
		}
		return ""
	}},
	{"a bind registers between the commit and phase C", func(r *rig) string {
		g := r.backend.set(&r.backend.afterGet)
		var bound context.Context
		bind := start(func() (err error) { bound, err = r.bind(); return err })
		<-g.arrived
		r.backend.clear(&r.backend.afterGet)
		after := r.backend.set(&r.backend.afterApply)
		revocation := start(r.revoke)
		<-after.arrived
		close(g.open)
		require.NoError(r, bind(), "it read before the commit")
		require.NoError(r, bound.Err())
		close(after.open)
		require.NoError(r, revocation())
		if bound.Err() == nil {
			return "a bound context outlived its key"
		}
		return ""
	}},
	{"a key is disabled and enabled again, and the enabling comes through first",
		func(r *rig) string {
			bound, err := r.bind()
			require.NoError(r, err)
			after := r.backend.set(&r.backend.afterApply)
			disabling := start(func() error {
				return r.store.Disable(context.Background(), r.issued.Key.ID, "")
			})
			<-after.arrived
			r.backend.clear(&r.backend.afterApply)
			r.enableWithoutWaiting()
			close(after.open)
			require.NoError(r, disabling())
			if !errors.Is(context.Cause(bound), ErrDisabled) {
				return "a bound context outlived the disabling of its key"
			}
			return ""
		}},
	{"a second revocation finds the first one committed and not yet through", func(r *rig) string {
		bound, err := r.bind()
		require.NoError(r, err)
		after := r.backend.set(&r.backend.afterApply)
		revocation := start(r.revoke)
		<-after.arrived
		require.NoError(r, r.revoke())
		wrong := r.mustBeDenied("after the second Revoke returned")
		if bound.Err() == nil {
			wrong = "a bound context outlived its key"
		}
		close(after.open)
		require.NoError(r, revocation())
		return wrong
	}},
}

// enableWithoutWaiting enables the key as a write of many keys would, which does not wait for
// changes that restrict the key.
func (r *rig) enableWithoutWaiting() {
	id, err := parseID("", r.issued.Key.ID)
	require.NoError(r, err)
	kr, err := r.store.get(context.Background(), id)
	require.NoError(r, err)
	event := &record.Event{Action: record.Action_ACTION_ENABLE}
	batch := []*keyRecord{kr}
	enable := func(kr *keyRecord, _ bool) (bool, error) {
		kr.record.Status = record.Status_STATUS_ACTIVE
		kr.record.DisabledAt, kr.record.DisableReason = 0, ""
		return true, nil
	}
	_, err = r.store.changeTogether(context.Background(), batch, event, ErrNarrowed, enable)
	require.NoError(r, err)
}

func (r *rig) mustBeDenied(when string) string {
	if r.verify() == nil {
		return "the key is admitted " + when
	}
	return ""
}

// The right protocol passes every scenario; each wrong one is caught by at least one, and by the
// same code.
func TestForcedInterleavings(t *testing.T) {
	for _, tt := range []struct {
		name    string
		variant fence.Variant
		right   bool
	}{
		{"two-phase", fence.TwoPhase, true},
		{"look-aside", fence.LookAside, false},
		{"bump before only", fence.BumpBefore, false},
		{"bump after only", fence.BumpAfter, false},
		{"evicted after only", fence.EvictLate, false},
		{"never evicted", fence.EvictNever, false},
		{"installs what may be old", fence.Careless, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			caught := 0
			for _, sc := range scenarios {
				t.Run(sc.name, func(t *testing.T) {
					// In a bubble, the background does not pass a gate meanwhile.
					synctest.Test(t, func(t *testing.T) {
						wrong := sc.play(newRig(t, tt.variant))
						if wrong != "" {
							caught++
							t.Log(wrong)
						}
						if tt.right {
							require.Empty(t, wrong)
						}
					})
				})
			}
			if !tt.right {
				require.NotZero(t, caught, "nothing noticed that the protocol is wrong")
			}
		})
	}
	figures.Record(t, "%d interleavings on the real store: the right protocol is never wrong, "+
		"and each wrong protocol is caught", len(scenarios))
}
