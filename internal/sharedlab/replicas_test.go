package sharedlab

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

// replicas are three key stores on one etcd of three members. Each store has its own client, as
// each process has.
type replicas struct {
	lab    *Etcd
	stores []*keystore.Store
	prefix string
}

// freshness is D. The election timeout of etcd's defaults is a third of D.
const freshness = 3 * time.Second

func startReplicas(t testing.TB) *replicas {
	r := &replicas{lab: StartEtcd(t, EtcdConfig{Members: 3}), prefix: newPrefix()}
	for range 3 {
		s, err := keystore.New(open(t, r.lab.Client(t), r.prefix), &keystore.Options{
			Freshness: freshness, Timeout: patience,
		})
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		r.stores = append(r.stores, s)
	}
	return r
}

// A revocation in one store is in force in all stores once Revoke has returned: no call is
// admitted, and every session has ended.
func TestReplicas(t *testing.T) {
	t.Parallel()
	r := startReplicas(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	const rounds, sessions = 12, 5
	for n := range rounds {
		creator, revoker := r.stores[n%3], r.stores[(n+1+n/3%2)%3]
		issued, err := creator.Create(ctx, keystore.Spec{Name: fmt.Sprint("key ", n)})
		require.NoError(t, err)
		token := issued.Secret.Reveal()

		var bound []*keystore.Session
		for _, s := range r.stores {
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
		// Callers use the key in all stores, before, during and after the revocation.
		var revoked atomic.Bool
		var callers sync.WaitGroup
		wrong := make(chan string, 2*len(r.stores))
		stop := make(chan struct{})
		for i, s := range r.stores {
			callers.Go(func() {
				for {
					after := revoked.Load()
					_, err := s.Verify(ctx, token)
					if err == nil && after {
						wrong <- fmt.Sprintf("store %d admits a revoked key", i)
						return
					}
					if err != nil && !errors.Is(err, keystore.ErrRevoked) {
						wrong <- fmt.Sprintf("store %d: %v", i, err)
						return
					}
					select {
					case <-stop:
						return
					default:
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		require.NoError(t, revoker.Revoke(ctx, issued.Key.ID, "test"))
		for i, session := range bound {
			require.ErrorIs(t, session.Cause(), keystore.ErrRevoked, "session %d", i)
		}
		revoked.Store(true)
		for i, s := range r.stores {
			_, err := s.Verify(ctx, token)
			require.ErrorIs(t, err, keystore.ErrRevoked, "store %d", i)
			_, err = s.Bind(ctx, token)
			require.ErrorIs(t, err, keystore.ErrRevoked, "store %d", i)
		}
		close(stop)
		callers.Wait()
		select {
		case what := <-wrong:
			require.Fail(t, what)
		default:
		}
	}
	for _, s := range r.stores {
		require.Equal(t, 3, s.Stats().Processes)
		require.NoError(t, s.Err())
	}
}

// A watch notes what goes wrong for a key that stays active: refusals, and sessions that end.
type watch struct {
	stop     chan struct{}
	callers  sync.WaitGroup
	refusals atomic.Int64
	mu       sync.Mutex
	wrong    []string
}

// watchKey uses a key in all stores until end is called.
func (r *replicas) watchKey(ctx context.Context, token string) *watch {
	w := &watch{stop: make(chan struct{})}
	for i, s := range r.stores {
		w.callers.Go(func() {
			for {
				_, err := s.Verify(ctx, token)
				if err != nil {
					w.refusals.Add(1)
				}
				if err != nil && !errors.Is(err, keystore.ErrUnavailable) {
					w.mu.Lock()
					w.wrong = append(w.wrong, fmt.Sprintf("store %d: %v", i, err))
					w.mu.Unlock()
				}
				select {
				case <-w.stop:
					return
				default:
					time.Sleep(time.Millisecond)
				}
			}
		})
	}
	return w
}

// end returns the number of refusals. A refusal with another reason than ErrUnavailable is wrong.
func (w *watch) end(t *testing.T) int64 {
	close(w.stop)
	w.callers.Wait()
	require.Empty(t, w.wrong)
	return w.refusals.Load()
}

// A pulse writes to etcd all the time, and measures the longest time without a write. A pulse does
// not wait for long for one write, because a dead leader never answers.
type pulse struct {
	stop    chan struct{}
	done    chan struct{}
	longest time.Duration
}

func (r *replicas) startPulse(t *testing.T) *pulse {
	p := &pulse{stop: make(chan struct{}), done: make(chan struct{})}
	b := open(t, r.lab.Client(t), newPrefix())
	go func() {
		defer close(p.done)
		last := time.Now()
		for n := 0; ; n++ {
			ctx, cancel := context.WithTimeout(context.Background(), freshness/15)
			err := b.Apply(ctx, backend.Change{Key: fmt.Append(nil, n)})
			cancel()
			now := time.Now()
			p.longest = max(p.longest, now.Sub(last))
			if err == nil {
				last = now
			}
			select {
			case <-p.stop:
				return
			default:
				time.Sleep(10 * time.Millisecond)
			}
		}
	}()
	return p
}

// end returns the longest time without a write.
func (p *pulse) end() time.Duration {
	close(p.stop)
	<-p.done
	return p.longest
}

// The leader of etcd is killed. Etcd elects another leader before the gate of a store closes: no
// call is refused, no session ends, and a revocation returns and is in force.
func TestReplicasSurviveTheLeader(t *testing.T) {
	t.Parallel()
	r := startReplicas(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	client := r.lab.Client(t)
	active, err := r.stores[0].Create(ctx, keystore.Spec{Name: "active"})
	require.NoError(t, err)
	token := active.Secret.Reveal()
	for round := range 4 {
		var bound []*keystore.Session
		for _, s := range r.stores {
			session, err := s.Bind(ctx, token)
			require.NoError(t, err)
			defer session.Close()
			bound = append(bound, session)
		}
		leaked, err := r.stores[round%3].Create(ctx, keystore.Spec{Name: "leaked"})
		require.NoError(t, err)
		w, p := r.watchKey(ctx, token), r.startPulse(t)
		leader := r.lab.Leader(t, client)
		leader.Kill()
		require.NoError(t, r.stores[(round+1)%3].Revoke(ctx, leaked.Key.ID, "test"))
		for _, s := range r.stores {
			_, err := s.Verify(ctx, leaked.Secret.Reveal())
			require.Error(t, err, "Revoke has returned")
		}
		refusals, longest := w.end(t), p.end()
		ended := 0
		for _, session := range bound {
			if session.Cause() != nil {
				ended++
			}
		}
		t.Logf("%v without a write, %d calls refused, %d sessions ended", longest, refusals, ended)
		require.NoError(t, leader.Start())
		// A proof may be D/4 old when the leader dies, and a heartbeat may wait for D/4 for the
		// dead leader. So D/2 remains for the election. On a busy machine, etcd takes longer.
		if longest < freshness/2 {
			require.Zero(t, refusals, "a gate closed, and etcd was away for %v only", longest)
			require.Zero(t, ended, "a session ended, and etcd was away for %v only", longest)
			return
		}
		for _, s := range r.stores {
			require.Eventually(t, func() bool { return s.Stats().Fresh }, patience,
				time.Millisecond)
		}
	}
	t.Log("etcd never elected a leader in time")
}

// Without a majority, each store refuses everything within the freshness, as unavailable and not as
// denied, and ends its sessions. Once the majority is back, the stores come back without help.
func TestReplicasWithoutAMajority(t *testing.T) {
	t.Parallel()
	r := startReplicas(t)
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	issued, err := r.stores[0].Create(ctx, keystore.Spec{Name: "active"})
	require.NoError(t, err)
	token := issued.Secret.Reveal()
	var bound []*keystore.Session
	for _, s := range r.stores {
		session, err := s.Bind(ctx, token)
		require.NoError(t, err)
		defer session.Close()
		bound = append(bound, session)
	}
	for _, m := range r.lab.Members[1:] {
		m.Kill()
	}
	away := time.Now()
	for i, s := range r.stores {
		require.Eventually(t, func() bool {
			_, err := s.Verify(ctx, token)
			return err != nil
		}, patience, time.Millisecond, "store %d admits callers %v after the majority was lost", i,
			time.Since(away))
		_, err := s.Verify(ctx, token)
		require.ErrorIs(t, err, keystore.ErrUnavailable)
		require.NotErrorIs(t, err, keystore.ErrDenied)
		_, err = s.Bind(ctx, token)
		require.ErrorIs(t, err, keystore.ErrUnavailable)
		require.ErrorIs(t, bound[i].Cause(), keystore.ErrUnavailable)
		require.False(t, s.Stats().Fresh)
	}
	for _, m := range r.lab.Members[1:] {
		require.NoError(t, m.start())
	}
	for _, m := range r.lab.Members[1:] {
		require.NoError(t, m.wait())
	}
	for _, s := range r.stores {
		require.Eventually(t, func() bool {
			_, err := s.Verify(ctx, token)
			return err == nil
		}, patience, time.Millisecond)
	}
	require.NoError(t, r.stores[1].Revoke(ctx, issued.Key.ID, "test"))
	for _, s := range r.stores {
		_, err := s.Verify(ctx, token)
		require.ErrorIs(t, err, keystore.ErrRevoked)
	}
}
