package admin_test

import (
	"context"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A gate is a backend in memory that a test can stop: reads, and writes, and answers to writes.
type gate struct {
	backend.Backend
	mu        sync.Mutex
	afterRead func()
	readError error
	write     func(apply func() error) error
}

func newGate() *gate { return &gate{Backend: backendtest.NewMemory()} }

// afterNextRead calls f after the next Get has read its entry, and before Get returns. The result
// reports whether f was called.
func (g *gate) afterNextRead(f func()) (called func() bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	done := false
	g.afterRead = func() { done = true; f() }
	return func() bool { return done }
}

// onWrites lets f make the writes from now on. If f is nil, writes are as usual.
func (g *gate) onWrites(f func(apply func() error) error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.write = f
}

// failReads makes each Get fail from now on. If err is nil, reads are as usual.
func (g *gate) failReads(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.readError = err
}

func (g *gate) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	e, err := g.Backend.Get(ctx, key)
	g.mu.Lock()
	f := g.afterRead
	g.afterRead = nil
	if g.readError != nil {
		err = g.readError
	}
	g.mu.Unlock()
	if f != nil {
		f()
	}
	return e, err
}

func (g *gate) Apply(ctx context.Context, changes ...backend.Change) error {
	g.mu.Lock()
	f := g.write
	g.mu.Unlock()
	apply := func() error { return g.Backend.Apply(ctx, changes...) }
	if f != nil {
		return f(apply)
	}
	return apply()
}
