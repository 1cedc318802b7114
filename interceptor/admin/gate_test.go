package admin_test

import (
	"context"
	"iter"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A gate is a backend in memory that a test can stop, damage, and let fail. A gate counts the
// entries that scans have read.
type gate struct {
	backend.Backend
	entries   atomic.Int64
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
	var done atomic.Bool
	g.afterRead = func() { done.Store(true); f() }
	return done.Load
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

// damage replaces the stored record of a key by other bytes.
func (g *gate) damage(t testing.TB, k *keystore.Key) {
	t.Helper()
	g.replace(t, storageKey(t, k))
}

// storageKey returns the name under which a backend has a key.
func storageKey(t testing.TB, k *keystore.Key) []byte {
	t.Helper()
	id, ok := token.ParseID(k.ID)
	require.True(t, ok)
	return append([]byte{'k'}, id[:]...)
}

// damageEvent replaces the stored event number n, from 0, by other bytes.
func (g *gate) damageEvent(t testing.TB, n int) {
	t.Helper()
	for e, err := range g.Backend.Scan(t.Context(), []byte{'e'}, []byte{'f'}) {
		require.NoError(t, err)
		if n == 0 {
			g.replace(t, e.Key)
			return
		}
		n--
	}
	t.Fatal("there are fewer events")
}

func (g *gate) replace(t testing.TB, key []byte) {
	t.Helper()
	e, err := g.Backend.Get(t.Context(), key)
	require.NoError(t, err)
	require.NoError(t, g.Backend.Apply(t.Context(),
		backend.Change{Key: e.Key, Value: []byte("damaged"), Expect: e.Revision}))
}

// ScanDown implements backend.DownScanner.
func (g *gate) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return g.counted(g.Backend.(backend.DownScanner).ScanDown(ctx, from, to))
}

func (g *gate) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return g.counted(g.Backend.Scan(ctx, from, to))
}

func (g *gate) counted(
	entries iter.Seq2[backend.Entry, error],
) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range entries {
			g.entries.Add(1)
			if !yield(e, err) {
				return
			}
		}
	}
}

// A contextStream is a stream with another context.
type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (s *contextStream) Context() context.Context { return s.ctx }

func dialer(l *bufconn.Listener) func(context.Context, string) (net.Conn, error) {
	return func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }
}
