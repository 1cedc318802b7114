// Package remotetest has tests of the Backends on servers, beyond the suites of backendtest. The
// tests of each Backend start its servers.
package remotetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// patience is the longest time for which a test waits for a server.
const patience = time.Minute

// A Backend is a Backend on a server.
type Backend interface {
	backend.Feeder
	backend.DownScanner
}

// UseEachMethod uses each method of an empty Backend, except Close, and leaves no entry.
func UseEachMethod(t *testing.T, b Backend) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	k := []byte("k")
	written := false
	for batch, err := range b.Feed(ctx, nil, nil, 0) {
		require.NoError(t, err)
		if written {
			require.Equal(t, []backend.Entry{{Key: k, Value: []byte("v"), Revision: 1}},
				batch.Changes)
			break
		}
		require.NoError(t, b.Apply(ctx, backend.Change{Key: k, Value: []byte("v")}))
		written = true
	}
	e, err := b.Get(ctx, k)
	require.NoError(t, err)
	require.Equal(t, uint64(1), e.Revision)
	for _, err := range b.Scan(ctx, nil, nil) {
		require.NoError(t, err)
	}
	for _, err := range b.ScanDown(ctx, nil, nil) {
		require.NoError(t, err)
	}
	for _, err := range b.Snapshot(ctx, nil, nil) {
		require.NoError(t, err)
	}
	require.NoError(t, b.Apply(ctx, backend.Change{Key: k, Expect: 1, Delete: true}))
}

// EndLoops ends loops over a Feed, a scan and a Snapshot in each way, and then closes the Backend,
// which has an entry. noneLeft requires that no goroutine of the loops is left. The caller checks
// what Close leaves.
func EndLoops(t *testing.T, b Backend, noneLeft func(after string)) {
	t.Helper()
	for name, end := range map[string]func(cancel context.CancelFunc) (stop bool){
		"break":  func(context.CancelFunc) bool { return true },
		"cancel": func(cancel context.CancelFunc) bool { cancel(); return false },
		"cancel later": func(cancel context.CancelFunc) bool {
			time.AfterFunc(20*time.Millisecond, cancel)
			return false
		},
	} {
		for range 5 {
			ctx, cancel := context.WithCancel(context.Background())
			for _, err := range b.Feed(ctx, nil, nil, 0) {
				if err != nil {
					require.ErrorIs(t, err, context.Canceled, name)
				} else if end(cancel) {
					break
				}
			}
			cancel()
		}
		noneLeft(name)
	}
	for range b.Scan(context.Background(), nil, nil) {
		break
	}
	for range b.Snapshot(context.Background(), nil, nil) {
		break
	}
	noneLeft("a scan and a snapshot")
	ended, started := make(chan error, 1), make(chan struct{}, 1)
	go func() {
		for _, err := range b.Feed(context.Background(), nil, nil, 0) {
			if err != nil {
				ended <- err
			} else {
				started <- struct{}{}
			}
		}
	}()
	<-started
	require.NoError(t, b.Close())
	require.ErrorIs(t, <-ended, backend.ErrClosed)
}

// RevokeInTurn makes a key in one of three stores that share their keys, and revokes the key in
// another, twelve times. Once Revoke has returned, no store admits the key, and every session has
// ended. A store may also refuse a call with one of the errors in tolerated.
func RevokeInTurn(ctx context.Context, t *testing.T, stores []*keystore.Store, tolerated ...error) {
	t.Helper()
	for n := range 12 {
		issued, err := stores[n%3].Create(ctx, keystore.Spec{Name: fmt.Sprint("key ", n)})
		require.NoError(t, err)
		revoke(ctx, t, issued, stores[(n+1+n/3%2)%3], stores, tolerated)
	}
	for _, s := range stores {
		require.Equal(t, 3, s.Stats().Processes)
		require.NoError(t, s.Err())
	}
}

// revoke revokes a key in one of the stores, while all stores use the key.
func revoke(ctx context.Context, t *testing.T, issued *keystore.Issued, revoker *keystore.Store,
	stores []*keystore.Store, tolerated []error,
) {
	t.Helper()
	const sessions = 5
	token := issued.Secret.Reveal()
	var bound []*keystore.Session
	for _, s := range stores {
		key, err := s.Verify(ctx, token)
		require.NoError(t, err)
		require.Equal(t, issued.Key.ID, key.ID)
		for range sessions {
			session, err := s.Bind(ctx, token)
			require.NoError(t, err)
			defer session.Close()
			bound = append(bound, session)
		}
	}
	var c callers
	c.start(ctx, stores, token, tolerated)
	defer c.end()
	require.NoError(t, revoker.Revoke(ctx, issued.Key.ID, "test"))
	for i, session := range bound {
		require.ErrorIs(t, session.Cause(), keystore.ErrRevoked, "session %d", i)
	}
	c.revoked.Store(true)
	for i, s := range stores {
		_, err := s.Verify(ctx, token)
		for isAny(err, tolerated) && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
			_, err = s.Verify(ctx, token)
		}
		require.ErrorIs(t, err, keystore.ErrRevoked, "store %d", i)
		_, err = s.Bind(ctx, token)
		require.ErrorIs(t, err, keystore.ErrRevoked, "store %d", i)
	}
	require.Empty(t, c.end())
}

// callers use a key in several stores, during and after its revocation.
type callers struct {
	revoked atomic.Bool // Revoke has returned
	ended   atomic.Bool
	running sync.WaitGroup
	mu      sync.Mutex
	wrong   []string // guarded by mu
}

// start starts a caller for each store. A caller stops after a wrong answer.
func (c *callers) start(
	ctx context.Context, stores []*keystore.Store, token string, tolerated []error,
) {
	for i, s := range stores {
		c.running.Go(func() {
			for !c.ended.Load() {
				after := c.revoked.Load()
				_, err := s.Verify(ctx, token)
				if err == nil && after {
					c.note("store %d admits a revoked key", i)
					return
				}
				if err != nil && !errors.Is(err, keystore.ErrRevoked) && !isAny(err, tolerated) {
					c.note("store %d: %v", i, err)
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
}

func (c *callers) note(text string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong = append(c.wrong, fmt.Sprintf(text, args...))
}

// end stops the callers, and returns the wrong answers.
func (c *callers) end() []string {
	c.ended.Store(true)
	c.running.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.wrong
}

func isAny(err error, targets []error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}
