package sharedlab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

var chaosFor = flag.Duration("duration", 6*time.Second, "how long TestChaos injects faults")

// chaosFreshness is D of the stores of the chaos: short, so that cuts evict processes.
const chaosFreshness = 800 * time.Millisecond

// A chaos is some stores behind bad networks, and what was seen.
type chaos struct {
	lab      *Lab
	networks []Network
	stores   []*keystore.Store

	mu    sync.Mutex
	keys  []*chaosKey // those that the callers use
	wrong []string

	revocations, unknown, verified, refused, unavailable, cuts, leaders atomic.Int64
}

// A chaosKey is a key that one store will revoke.
type chaosKey struct {
	id, token string
	revoked   atomic.Bool // Revoke has returned nil

	mu       sync.Mutex
	sessions []*keystore.Session
}

func (c *chaos) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong = append(c.wrong, fmt.Sprintf(format, args...))
}

// Once Revoke has returned nil, no store admits the key, and every session of the key has ended,
// whatever networks and members do. -duration sets how long the test runs.
func TestChaos(t *testing.T) {
	t.Parallel()
	c := startChaos(t, 3, func(b *etcdstore.Backend) backend.Backend { return b })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var all sync.WaitGroup
	c.start(ctx, &all)
	for i := range c.stores {
		all.Go(func() { c.cutAtRandom(ctx, i) })
	}
	end := time.Now().Add(*chaosFor)
	seen := func() bool { return c.revocations.Load() > 0 && c.verified.Load() > 0 }
	for time.Now().Before(end) || !seen() && time.Now().Before(end.Add(patience)) {
		// A member dies and comes back.
		wait(ctx, time.Second+rand.N(2*time.Second))
		m := c.lab.Members[rand.IntN(len(c.lab.Members))]
		m.Kill()
		wait(ctx, rand.N(2*time.Second))
		require.NoError(t, m.Start())
		c.leaders.Add(1)
	}
	cancel()
	all.Wait()
	for _, n := range c.networks {
		n.Cut(Cut{})
	}
	t.Logf("%d revocations returned, %d failed; %d calls admitted, %d refused, %d unavailable; "+
		"%d cuts, %d kills of members", c.revocations.Load(), c.unknown.Load(), c.verified.Load(),
		c.refused.Load(), c.unavailable.Load(), c.cuts.Load(), c.leaders.Load())
	require.Empty(t, c.wrong)
	require.Positive(t, c.revocations.Load())
	require.Positive(t, c.verified.Load())

	// All stores come back without help.
	background, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, s := range c.stores {
		require.Eventually(t, func() bool { return s.Stats().Fresh }, patience, time.Millisecond)
	}
	for _, k := range c.keys {
		for i, s := range c.stores {
			require.Eventually(t, func() bool {
				_, err := s.Verify(background, k.token)
				return !errors.Is(err, keystore.ErrUnavailable)
			}, patience, time.Millisecond, "store %d", i)
			if _, err := s.Verify(background, k.token); k.revoked.Load() {
				require.Error(t, err, "store %d", i)
			}
		}
	}
}

// startChaos starts members, and three stores on them.
func startChaos(
	t *testing.T, members int, wrap func(*etcdstore.Backend) backend.Backend,
) *chaos {
	c := &chaos{lab: Start(t, Config{Members: members, NoSync: true})}
	prefix := newPrefix()
	for range 3 {
		n := c.lab.Network(t)
		b := open(t, c.lab.Client(t, endpoints(n.Endpoints()...)), prefix)
		s, err := keystore.New(wrap(b), &keystore.Options{Freshness: chaosFreshness,
			Timeout: 2 * time.Second})
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		c.networks, c.stores = append(c.networks, n), append(c.stores, s)
	}
	return c
}

// start starts the callers and the revocations, until ctx ends.
func (c *chaos) start(ctx context.Context, all *sync.WaitGroup) {
	for i := range c.stores {
		all.Go(func() { c.use(ctx, i) })
		all.Go(func() { c.revokeAtRandom(ctx, i) })
	}
}

// A forgetful Backend leaves the records of keys out of its feeds, and nothing else.
type forgetful struct{ *etcdstore.Backend }

func (b forgetful) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		for batch, err := range b.Backend.Feed(ctx, from, to, after) {
			batch.Changes = slices.DeleteFunc(batch.Changes, func(e backend.Entry) bool {
				return e.Key[0] == 'k'
			})
			if !yield(batch, err) {
				return
			}
		}
	}
}

// The control of TestChaos: with feeds that leave out the revocations, the same callers find calls
// and sessions that are wrong, without any fault.
func TestChaosCatchesAForgetfulFeed(t *testing.T) {
	t.Parallel()
	c := startChaos(t, 1, func(b *etcdstore.Backend) backend.Backend { return forgetful{b} })
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var all sync.WaitGroup
	c.start(ctx, &all)
	require.Eventually(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return slices.ContainsFunc(c.wrong, func(what string) bool {
			return strings.Contains(what, "admits a key after Revoke")
		}) && slices.Contains(c.wrong, "a session lives after Revoke has returned")
	}, patience, time.Millisecond, "the callers have noticed nothing")
	cancel()
	all.Wait()
}

// wait waits for d, or until the context ends.
func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// pick returns a key that the callers use, or nil.
func (c *chaos) pick() *chaosKey {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.keys) == 0 {
		return nil
	}
	return c.keys[rand.IntN(len(c.keys))]
}

// use verifies and binds keys in one store.
func (c *chaos) use(ctx context.Context, i int) {
	s := c.stores[i]
	for n := 0; ctx.Err() == nil; n++ {
		k := c.pick()
		if k == nil {
			wait(ctx, time.Millisecond)
			continue
		}
		after := k.revoked.Load()
		var err error
		if n%10 == 0 {
			var session *keystore.Session
			if session, err = s.Bind(ctx, k.token); err == nil {
				k.mu.Lock()
				k.sessions = append(k.sessions, session)
				k.mu.Unlock()
			}
		} else {
			_, err = s.Verify(ctx, k.token)
		}
		switch {
		case err == nil && after:
			c.note("store %d admits a key after Revoke has returned", i)
		case err == nil:
			c.verified.Add(1)
		case errors.Is(err, keystore.ErrRevoked):
			c.refused.Add(1)
		case errors.Is(err, keystore.ErrUnavailable), ctx.Err() != nil:
			c.unavailable.Add(1)
		default:
			c.note("store %d: %v", i, err)
		}
		if n%4 == 0 {
			wait(ctx, time.Millisecond)
		}
	}
}

// revokeAtRandom creates keys in one store, and revokes them in any store. For a revocation with an
// unknown outcome, nothing is required.
func (c *chaos) revokeAtRandom(ctx context.Context, w int) {
	for ctx.Err() == nil {
		issued, err := c.stores[w].Create(ctx, keystore.Spec{Name: "chaos"})
		if err != nil {
			wait(ctx, 20*time.Millisecond)
			continue
		}
		k := &chaosKey{id: issued.Key.ID, token: issued.Secret.Reveal()}
		c.mu.Lock()
		if c.keys = append(c.keys, k); len(c.keys) > 30 {
			c.keys = c.keys[1:]
		}
		c.mu.Unlock()
		wait(ctx, 20*time.Millisecond+rand.N(100*time.Millisecond)) // the callers cache the key
		err = c.stores[rand.IntN(len(c.stores))].Revoke(ctx, k.id, "chaos")
		if err != nil {
			c.unknown.Add(1)
			continue
		}
		// Sessions that a store has opened before Revoke returned have ended.
		k.mu.Lock()
		for _, session := range k.sessions {
			if session.Cause() == nil {
				c.note("a session lives after Revoke has returned")
			}
			session.Close()
		}
		k.sessions = nil
		k.mu.Unlock()
		k.revoked.Store(true)
		c.revocations.Add(1)
	}
}

// cutAtRandom cuts the network of one store, in one direction or both.
func (c *chaos) cutAtRandom(ctx context.Context, i int) {
	for ctx.Err() == nil {
		wait(ctx, time.Second+rand.N(3*time.Second))
		c.networks[i].Cut([]Cut{{true, true}, {true, false}, {false, true}}[rand.IntN(3)])
		c.cuts.Add(1)
		wait(ctx, rand.N(5*chaosFreshness)) // some cuts are long enough for an eviction
		c.networks[i].Cut(Cut{})
	}
}
