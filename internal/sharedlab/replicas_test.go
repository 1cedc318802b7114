package sharedlab

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/internal/remote/remotetest"
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
	remotetest.RevokeInTurn(ctx, t, r.stores)
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

var leaders = flag.Int("leaders", 3, "how often TestReplicasSurviveTheLeader changes the leader")

// The leader of etcd changes: the leader is killed, stops, or hands over. The gates stay open: no
// call is refused, no session ends, and a revocation returns and is in force.
//
// A proof may be D/4 old when the leader dies, and a heartbeat may wait for D/4 for the dead
// leader. So D/2 remains for the election. On a busy machine, etcd takes longer: then the gates may
// close, and the table says so. A leader that stops keeps its connections open, so a heartbeat and
// its repeats may wait for the leader several times: the table shows these changes too.
func TestReplicasSurviveTheLeader(t *testing.T) {
	t.Parallel()
	r := startReplicas(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(*leaders)*12*patience)
	defer cancel()
	client := r.lab.Client(t)
	active, err := r.stores[0].Create(ctx, keystore.Spec{Name: "active"})
	require.NoError(t, err)
	token := active.Secret.Reveal()
	var changes []leaderChange
	// On a busy machine, etcd may be away for longer: more changes follow until one is in time.
	for round := 0; round < *leaders ||
		round < 4**leaders && !slices.ContainsFunc(changes, leaderChange.inTime); round++ {
		for _, s := range r.stores {
			require.Eventually(t, func() bool { return s.Stats().Fresh }, patience,
				time.Millisecond)
		}
		var bound []*keystore.Session
		for _, s := range r.stores {
			session, err := s.Bind(ctx, token)
			require.NoError(t, err)
			defer session.Close()
			bound = append(bound, session)
		}
		// The connection to a leader that was stopped may still end.
		var leaked *keystore.Issued
		require.Eventually(t, func() bool {
			leaked, err = r.stores[round%3].Create(ctx, keystore.Spec{Name: "leaked"})
			return err == nil
		}, patience, time.Millisecond)
		w, p := r.watchKey(ctx, token), r.startPulse(t)
		leader := r.lab.Leader(t, client)
		how, back := "killed", leader.Start
		switch round % 3 {
		case 0:
			leader.Kill()
		case 1:
			how, back = "hands over", func() error { return nil }
			require.NoError(t, r.lab.moveLeader(ctx, t, client))
		case 2:
			how, back = "stopped", leader.Resume
			require.NoError(t, leader.Pause())
		}
		require.NoError(t, r.stores[(round+1)%3].Revoke(ctx, leaked.Key.ID, "test"))
		for _, s := range r.stores {
			_, err := s.Verify(ctx, leaked.Secret.Reveal())
			require.Error(t, err, "Revoke has returned")
		}
		c := leaderChange{how: how, refused: w.end(t), away: p.end()}
		for _, session := range bound {
			if session.Cause() != nil {
				c.ended++
			}
		}
		changes = append(changes, c)
		require.NoError(t, back())
	}
	var table strings.Builder
	table.WriteString("\n| the leader | without a write | calls refused | sessions ended |\n" +
		"|---|---|---|---|\n")
	inTime, refused, ended := 0, int64(0), 0
	longest := time.Duration(0)
	for _, c := range changes {
		fmt.Fprintf(&table, "| %s | %v | %d | %d |\n", c.how, c.away.Round(time.Millisecond),
			c.refused, c.ended)
		if c.inTime() {
			inTime++
			refused += c.refused
			ended += c.ended
		}
		longest = max(longest, c.away)
	}
	t.Log(table.String())
	require.Zero(t, refused, "calls were refused, and etcd was away for less than D/2")
	require.Zero(t, ended, "sessions ended, and etcd was away for less than D/2")
	require.Positive(t, inTime, "etcd was never away for less than D/2")
	figures.Record(t, "%d changes of the leader, D %v: in %d of them, the leader did not stop, and "+
		"etcd was away for less than D/2: 0 calls refused, 0 sessions ended; in the others, %d "+
		"calls refused; away for %v at most", len(changes), freshness, inTime, sum(changes)-refused,
		longest.Round(time.Millisecond))
}

// A leaderChange is what happened while another member of etcd became the leader.
type leaderChange struct {
	how     string
	away    time.Duration // the longest time without a write
	refused int64
	ended   int // sessions
}

// inTime reports whether etcd was back so early that no gate may have closed.
func (c leaderChange) inTime() bool { return c.away < freshness/2 && c.how != "stopped" }

// sum returns the number of refused calls.
func sum(changes []leaderChange) (refused int64) {
	for _, c := range changes {
		refused += c.refused
	}
	return refused
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
