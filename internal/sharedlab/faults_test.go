package sharedlab

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/etcdstore"
)

// A workload writes through several Backends while etcd fails, and reads a feed. Each writer owns a
// key. The workload knows which revisions were acknowledged, which were refused, and of which the
// outcome is unknown.
type workload struct {
	t       *testing.T
	ctx     context.Context
	stop    chan struct{} // closed to end the writers
	writers sync.WaitGroup
	reader  sync.WaitGroup

	mu       sync.Mutex
	acked    map[string]uint64 // the highest acknowledged revision of each key
	acks     int
	unknown  int
	wrong    []string
	seen     map[string]uint64 // the last revision of each key in the feed
	restarts int               // of the feed, after an error
	last     map[string]uint64 // what the writers know at the end
}

// attempt is the longest time for which a writer waits for one call. pause is the time between two
// attempts after an error.
const (
	attempt = 2 * time.Second
	pause   = 20 * time.Millisecond
)

// startWorkload starts a writer for each Backend, and a reader of a feed of another Backend.
func startWorkload(
	t *testing.T, reader *etcdstore.Backend, writers ...*etcdstore.Backend,
) *workload {
	ctx, cancel := context.WithCancel(context.Background())
	w := &workload{t: t, ctx: ctx, stop: make(chan struct{}), acked: make(map[string]uint64),
		seen: make(map[string]uint64), last: make(map[string]uint64)}
	started := make(chan struct{})
	w.reader.Go(func() { w.read(reader, started) })
	<-started
	for i, b := range writers {
		w.writers.Go(func() { w.write(b, fmt.Sprint("k", i)) })
	}
	t.Cleanup(func() {
		cancel()
		w.reader.Wait()
	})
	return w
}

func (w *workload) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrong = append(w.wrong, fmt.Sprintf(format, args...))
}

// write writes the next revision of a key, until stop is closed. After an unknown outcome, write
// reads the revision.
func (w *workload) write(b *etcdstore.Backend, key string) {
	revision, known := uint64(0), true
	for {
		select {
		case <-w.stop:
			if known {
				w.mu.Lock()
				w.last[key] = revision
				w.mu.Unlock()
				return
			}
		default:
		}
		ctx, cancel := context.WithTimeout(w.ctx, attempt)
		if !known {
			e, err := b.Get(ctx, []byte(key))
			switch {
			case err == nil && (e.Revision == revision || e.Revision == revision+1):
				revision, known = e.Revision, true
			case errors.Is(err, backend.ErrNotFound) && revision == 0:
				known = true
			case err == nil || errors.Is(err, backend.ErrNotFound):
				w.note("%s: revision %d was acknowledged, and Get returns %d, %v", key, revision,
					e.Revision, err)
				known = true
			}
		} else {
			err := b.Apply(ctx, backend.Change{Key: []byte(key), Expect: revision, Restricts: true})
			w.mu.Lock()
			switch {
			case err == nil:
				revision++
				w.acked[key] = revision
				w.acks++
			case errors.Is(err, backend.ErrConflict), errors.Is(err, backend.ErrFull),
				errors.Is(err, backend.ErrTooLarge):
				w.wrong = append(w.wrong, fmt.Sprintf("%s: nobody else writes: %v", key, err))
			default:
				known = false
				w.unknown++
			}
			w.mu.Unlock()
		}
		cancel()
		if !known {
			time.Sleep(pause)
		}
	}
}

// read reads the feed, and starts the feed again after an error, as internal/cluster does. Each
// revision of each key must come once, and in order.
func (w *workload) read(b *etcdstore.Backend, started chan struct{}) {
	after := backend.Position(0)
	for w.ctx.Err() == nil {
		for batch, err := range b.Feed(w.ctx, nil, nil, after) {
			w.mu.Lock()
			switch {
			case err != nil && w.ctx.Err() == nil:
				w.restarts++
				if errors.Is(err, backend.ErrGap) {
					w.wrong = append(w.wrong, err.Error())
				}
			case err == nil:
				if batch.Position <= after {
					w.wrong = append(w.wrong, "a position that does not ascend")
				}
				if after == 0 {
					close(started)
				}
				after = batch.Position
				for _, e := range batch.Changes {
					if key := string(e.Key); e.Revision == w.seen[key]+1 {
						w.seen[key] = e.Revision
					} else {
						w.wrong = append(w.wrong, fmt.Sprintf(
							"%s: the feed has revision %d after %d", key, e.Revision, w.seen[key]))
					}
				}
			}
			w.mu.Unlock()
		}
		time.Sleep(pause)
	}
}

// progress waits until each writer has n more acknowledgements.
func (w *workload) progress(n int) {
	w.t.Helper()
	w.mu.Lock()
	want := w.acks + n
	w.mu.Unlock()
	require.Eventually(w.t, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.acks >= want || len(w.wrong) > 0
	}, 2*patience, time.Millisecond, "no progress")
}

// end ends the writers, and checks that nothing that was acknowledged is lost, and that the feed
// has everything.
func (w *workload) end(b *etcdstore.Backend) {
	w.t.Helper()
	close(w.stop)
	w.writers.Wait()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for key, revision := range w.last {
		e, err := b.Get(ctx, []byte(key))
		require.NoError(w.t, err)
		require.Equal(w.t, revision, e.Revision, key)
		require.GreaterOrEqual(w.t, e.Revision, w.acked[key])
	}
	require.Eventually(w.t, func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for key, revision := range w.last {
			if w.seen[key] != revision && len(w.wrong) == 0 {
				return false
			}
		}
		return true
	}, patience, time.Millisecond, "the feed lacks changes")
	w.mu.Lock()
	defer w.mu.Unlock()
	require.Empty(w.t, w.wrong)
	w.t.Logf("%d acknowledged, %d unknown, the feed was started again %d times", w.acks, w.unknown,
		w.restarts)
}

// three starts three members, and opens four Backends with a client each.
func three(t *testing.T) (*Etcd, []*etcdstore.Backend) {
	l := StartEtcd(t, EtcdConfig{Members: 3})
	prefix := newPrefix()
	var all []*etcdstore.Backend
	for range 4 {
		all = append(all, open(t, l.Client(t), prefix))
	}
	return l, all
}

// The leader dies, comes back, and another member takes over by request.
func TestLeaderChange(t *testing.T) {
	t.Parallel()
	l, all := three(t)
	client := l.Client(t)
	w := startWorkload(t, all[0], all[1:]...)
	w.progress(20)
	leader := l.Leader(t, client)
	leader.Kill()
	w.progress(20)
	require.NoError(t, leader.Start())
	w.progress(20)

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	leader = l.Leader(t, client)
	for _, m := range l.Members {
		if m == leader {
			continue
		}
		r, err := client.Status(ctx, m.URL())
		require.NoError(t, err)
		only := l.Client(t, endpoints(leader.URL()))
		_, _ = only.MoveLeader(ctx, r.Header.MemberId) // may come too late
		break
	}
	w.progress(20)
	w.end(all[0])
}

// Without a majority, nothing is acknowledged, and no call returns an answer that could be wrong.
func TestLostQuorum(t *testing.T) {
	t.Parallel()
	l, all := three(t)
	w := startWorkload(t, all[0], all[1:]...)
	w.progress(20)
	for _, m := range l.Members[1:] {
		m.Kill()
	}
	ctx, cancel := context.WithTimeout(context.Background(), attempt)
	defer cancel()
	apply := all[0].Apply(ctx, backend.Change{Key: []byte("other"), Value: []byte("v")})
	_, get := all[0].Get(ctx, []byte("k0"))
	_, opened := etcdstore.Open(ctx, l.Client(t), newPrefix(), nil)
	for _, err := range []error{apply, get, opened} {
		require.Error(t, err)
		for _, not := range []error{backend.ErrNotFound, backend.ErrConflict, backend.ErrFull,
			backend.ErrTooLarge, backend.ErrFailed, backend.ErrGap} {
			require.NotErrorIs(t, err, not)
		}
	}
	w.mu.Lock()
	before := w.acks
	w.mu.Unlock()
	time.Sleep(attempt) // the writers make their attempts
	w.mu.Lock()
	require.LessOrEqual(t, w.acks, before, "acknowledged without a majority")
	w.mu.Unlock()
	for _, m := range l.Members[1:] {
		require.NoError(t, m.start())
	}
	for _, m := range l.Members[1:] {
		require.NoError(t, m.wait())
	}
	w.progress(20)
	w.end(all[0])
}

// The only server is killed while changes are on their way, and starts again.
func TestKill(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{})
	prefix := newPrefix()
	var all []*etcdstore.Backend
	for range 6 {
		all = append(all, open(t, l.Client(t), prefix))
	}
	w := startWorkload(t, all[0], all[1:]...)
	for range 4 {
		w.progress(30)
		l.Members[0].Kill()
		require.NoError(t, l.Members[0].Start())
	}
	w.progress(30)
	w.end(all[0])
	require.Positive(t, w.unknown, "no kill hit a change")
}

// A server that is stopped answers nothing: each call ends with its context.
func TestPausedServer(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{NoSync: true})
	b := open(t, l.Client(t), newPrefix())
	require.NoError(t, b.Apply(context.Background(), backend.Change{Key: []byte("k")}))
	require.NoError(t, l.Members[0].Pause())
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_, err := b.Get(ctx, []byte("k"))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorIs(t, b.Apply(ctx, backend.Change{Key: []byte("k"), Expect: 1}),
		context.DeadlineExceeded)
	closed := make(chan error, 1)
	go func() { closed <- b.Apply(context.Background(), backend.Change{Key: []byte("l")}) }()
	require.NoError(t, b.Close()) // before or after the call has begun
	select {
	case err := <-closed:
		require.ErrorIs(t, err, backend.ErrClosed)
	case <-time.After(patience):
		require.Fail(t, "Close does not end the call")
	}
	require.NoError(t, l.Members[0].Resume())
}

// A read through one member shows what was written through another member.
func TestReadsThroughAnotherMember(t *testing.T) {
	t.Parallel()
	l := StartEtcd(t, EtcdConfig{Members: 3, NoSync: true})
	prefix := newPrefix()
	var all []*etcdstore.Backend
	for _, m := range l.Members {
		all = append(all, open(t, l.Client(t, endpoints(m.URL())), prefix))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	key := []byte("k")
	for n := range uint64(100) {
		require.NoError(t, all[n%3].Apply(ctx, backend.Change{Key: key, Expect: n}))
		for _, b := range all {
			e, err := b.Get(ctx, key)
			require.NoError(t, err)
			require.Equal(t, n+1, e.Revision)
		}
		b := all[(n+1)%3]
		for _, entries := range []func(context.Context, []byte, []byte) iter.Seq2[backend.Entry,
			error]{b.Scan, b.ScanDown, b.Snapshot} {
			for e, err := range entries(ctx, nil, nil) {
				require.NoError(t, err)
				require.Equal(t, n+1, e.Revision)
			}
		}
	}
}
