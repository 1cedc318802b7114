package keystore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// testFreshness is the freshness of the stores of these tests.
const testFreshness = time.Second

// realTime returns options for a test that runs several processes by the real clock. No process
// loses contact, even if the machine stands still for half a minute.
func realTime() *Options { return &Options{Freshness: time.Minute, Timeout: 10 * time.Minute} }

// A fleet is a store in memory, in a bubble, for several processes.
type fleet struct {
	*testing.T
	shared *backendtest.Shared
}

// fleetTest runs a test in a bubble.
func fleetTest(t *testing.T, test func(t *testing.T, f *fleet)) {
	synctest.Test(t, func(t *testing.T) { test(t, &fleet{t, backendtest.NewShared()}) })
}

// A member is one process of a fleet.
type member struct {
	*Store
	f     *fleet
	link  *badlink.Link
	apply *atomic.Pointer[applyHook] // runs instead of each Apply; nil: no hook
}

type applyHook func(ctx context.Context, changes []backend.Change,
	next func(context.Context) error) error

// onApply makes the hook run instead of each Apply from now on.
func (m *member) onApply(hook applyHook) { m.apply.Store(&hook) }

// open opens the store in a new process.
func (f *fleet) open(opts *Options) *member {
	f.Helper()
	return f.openWrong(opts, 0)
}

// openWrong is open for a process with an error. The error is there before the feed of the process
// begins: the goroutine of the feed reads it without a lock.
func (f *fleet) openWrong(opts *Options, wrong variant) *member {
	f.Helper()
	link := badlink.Open(f.shared)
	apply := new(atomic.Pointer[applyHook])
	link.OnApply = func(ctx context.Context, changes []backend.Change,
		next func(context.Context) error) error {
		if hook := apply.Load(); hook != nil {
			return (*hook)(ctx, changes, next)
		}
		return next(ctx)
	}
	s, err := openProcess(link, f.options(opts), processVariant{store: wrong}, nil)
	require.NoError(f, err)
	synctest.Wait() // the other processes have noticed the new process
	f.Cleanup(func() {
		link.Set(badlink.Faults{})
		_ = s.Close()
		link.Wait()
	})
	return &member{s, f, link, apply}
}

// openAt opens the store in a new process, whose wall clock is ahead by shift.
func (f *fleet) openAt(shift *atomic.Int64, opts *Options) *member {
	link, start := badlink.Open(f.shared), time.Now()
	s, err := openProcess(link, f.options(opts), rightProcesses,
		func() cluster.Instant {
			return cluster.Instant{Mono: int64(time.Since(start)) + 1,
				Wall: time.Now().UnixNano() + shift.Load()}
		})
	require.NoError(f, err)
	f.Cleanup(func() { _ = s.Close() })
	return &member{Store: s, f: f, link: link}
}

func (f *fleet) options(opts *Options) *Options {
	var o Options
	if opts != nil {
		o = *opts
	}
	if o.Freshness == 0 {
		o.Freshness = testFreshness
	}
	return &o
}

// members returns the number of entries in a key space of the store.
func (f *fleet) entries(space byte) (n int) {
	for e, err := range f.shared.Open().Scan(f.Context(), []byte{space}, []byte{space + 1}) {
		require.NoError(f, err)
		if len(e.Key) > 1 {
			n++
		}
	}
	return n
}

// create makes a key. Only the goroutine of the test may call create.
func (m *member) create(spec Spec) *Issued {
	m.f.Helper()
	if spec.Name == "" {
		spec.Name = "test"
	}
	issued, err := m.Create(m.f.Context(), spec)
	require.NoError(m.f, err)
	synctest.Wait() // the feeds have delivered the key, so that a Verify can cache the key
	return issued
}

// uses verifies a token.
func (m *member) uses(i *Issued) error {
	_, err := m.Verify(m.f.Context(), i.Secret.Reveal())
	return err
}

// binds opens a session that the end of the test closes.
func (m *member) binds(i *Issued) *Session {
	m.f.Helper()
	session, err := m.Bind(m.f.Context(), i.Secret.Reveal())
	require.NoError(m.f, err)
	m.f.Cleanup(session.Close)
	return session
}

// awaitFresh waits until the process may admit callers.
func (m *member) awaitFresh() {
	for !m.Stats().Fresh {
		time.Sleep(10 * time.Millisecond)
	}
}

// awaitStale waits until the process admits nothing.
func (m *member) awaitStale() {
	for m.isFresh() {
		time.Sleep(time.Millisecond)
	}
}

// inAGap makes a call while the feed leaves out changes, and waits until the process may admit
// callers again.
func (m *member) inAGap(call func()) {
	m.link.Set(badlink.Faults{Drop: true, FeedError: backend.ErrGap})
	m.awaitStale()
	call()
	m.link.Set(badlink.Faults{})
	m.awaitFresh()
}

// took returns how long a call takes.
func took(call func()) time.Duration {
	began := time.Now()
	call()
	return time.Since(began)
}

// A joining link calls a function once, before the Apply that begins a rebuild of the indexes.
type joining struct {
	*badlink.Link
	join func()
}

func (l *joining) Apply(ctx context.Context, changes ...backend.Change) error {
	for _, c := range changes {
		if string(c.Key) == string(stateKey) && l.join != nil {
			join := l.join
			l.join = nil
			join()
		}
	}
	return l.Link.Apply(ctx, changes...)
}

// A rebuild of the indexes is refused while another process has the store open, also if the other
// process joins just before the rebuild begins. After the other process has left, the rebuild runs,
// and a process that joins during the rebuild opens the store when the indexes are complete.
func TestRebuildIndexesWithOtherProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a := f.open(nil)
		for range 5 {
			a.create(Spec{Owner: "o"})
		}
		rebuild := f.options(&Options{RebuildIndexes: true})
		refused := func(b backend.Backend) {
			t.Helper()
			before := read(t, f.shared.Open(), ownerIndexSpace, eventIndexSpace)
			_, err := New(b, rebuild)
			require.ErrorIs(t, err, ErrInvalid)
			require.ErrorContains(t, err, "Options.RebuildIndexes is set, but")
			require.Equal(t, before, read(t, f.shared.Open(), ownerIndexSpace, eventIndexSpace))
		}
		refused(badlink.Open(f.shared))
		require.NoError(t, a.Close())
		// The other process has read that the indexes are complete, and has not written anything
		// but its member record.
		opened, hold := make(chan *Store, 1), make(chan struct{})
		open := func() {
			other := &joining{badlink.Open(f.shared), func() { <-hold }}
			go func() {
				s, err := New(other, f.options(nil))
				if err != nil {
					t.Error(err)
				}
				opened <- s
			}()
			synctest.Wait()
		}
		refused(&joining{badlink.Open(f.shared), open})
		close(hold)
		require.NoError(t, (<-opened).Close())

		for key := range read(t, f.shared.Open(), ownerIndexSpace) {
			remove(t, f.shared.Open(), []byte(key))
		}
		joined := make(chan *Store, 1)
		link := &joining{Link: badlink.Open(f.shared)}
		link.join = func() {
			link.join = func() { // the second write of the rebuild
				go func() {
					s, err := New(badlink.Open(f.shared), f.options(nil))
					if err != nil {
						t.Error(err)
					}
					joined <- s
				}()
				synctest.Wait()
			}
		}
		s, err := New(link, rebuild)
		require.NoError(t, err)
		for _, s := range []*Store{s, <-joined} {
			n, err := s.Count(t.Context(), Query{Owner: "o"})
			require.NoError(t, err)
			require.Equal(t, 5, n)
			require.NoError(t, s.CheckIntegrity(t.Context()))
			defer s.Close()
		}
	})
}

// Once Revoke has returned in one process, no process admits the key, and no session of any process
// is open. Without failures, Revoke takes a few round trips.
func TestRevokeInAnotherProcess(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b, c := f.open(nil), f.open(nil), f.open(nil)
		require.Equal(t, 3, a.Stats().Processes)
		issued := a.create(Spec{})
		var sessions []*Session
		for _, m := range []*member{a, b, c} {
			require.NoError(t, m.uses(issued))
			require.NoError(t, m.uses(issued), "from the cache")
			require.Equal(t, 1, m.Stats().Cached)
			sessions = append(sessions, m.binds(issued))
		}
		require.Zero(t, took(func() {
			require.NoError(t, b.Revoke(t.Context(), issued.Key.ID, ""))
		}))
		for i, m := range []*member{a, b, c} {
			require.ErrorIs(t, m.uses(issued), ErrRevoked)
			require.ErrorIs(t, sessions[i].Cause(), ErrRevoked)
			require.Error(t, sessions[i].Context().Err())
		}
	})
}

// Every change is in force in every process when the change returns.
func TestEveryChangeInAnotherProcess(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, b := f.open(nil), f.open(nil)
		issued := a.create(Spec{Scopes: []string{"read", "write"}})
		id := issued.Key.ID
		require.NoError(t, b.uses(issued))
		require.NoError(t, a.Disable(ctx, id, ""))
		require.ErrorIs(t, b.uses(issued), ErrDisabled)
		require.NoError(t, b.Enable(ctx, id))
		require.NoError(t, a.uses(issued))
		session := b.binds(issued)
		_, err := a.Update(ctx, id, func(s *Spec) error { s.Scopes = s.Scopes[:1]; return nil })
		require.NoError(t, err)
		require.ErrorIs(t, session.Cause(), ErrNarrowed)
		key, err := b.Verify(ctx, issued.Secret.Reveal())
		require.NoError(t, err)
		require.False(t, key.HasScope("write"))
		session = b.binds(issued)
		rotated, err := a.Rotate(ctx, id, 0)
		require.NoError(t, err)
		require.ErrorIs(t, session.Cause(), ErrRevoked)
		require.ErrorIs(t, b.uses(issued), ErrUnknown)
		require.NoError(t, b.uses(rotated))
		session = b.binds(rotated)
		n, err := a.RevokeAll(ctx, Query{}, "", &RevokeAllOptions{All: true})
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.ErrorIs(t, session.Cause(), ErrRevoked)
		require.ErrorIs(t, b.uses(rotated), ErrRevoked)
		time.Sleep(time.Millisecond)
		n, err = b.Purge(ctx, time.Now())
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.ErrorIs(t, a.uses(rotated), ErrUnknown)
	})
}

// A change waits for a process that does not answer until no proof of that process is valid any
// more. By then, the process refuses every call with ErrUnavailable, and has ended its sessions.
func TestAProcessThatIsCutOff(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, b := f.open(nil), f.open(nil)
		issued, other := a.create(Spec{}), a.create(Spec{})
		require.NoError(t, b.uses(issued))
		session, idle := b.binds(issued), b.binds(other)
		ended := make(chan struct{})
		idle.OnEnd(func() { close(ended) })
		b.link.Set(badlink.Faults{Drop: true, Silent: true})
		require.LessOrEqual(t, took(func() {
			require.NoError(t, a.Revoke(ctx, issued.Key.ID, ""))
		}), cluster.Bound(testFreshness))
		err := b.uses(issued)
		require.ErrorIs(t, err, ErrUnavailable)
		require.NotErrorIs(t, err, ErrDenied)
		require.ErrorIs(t, session.Cause(), ErrUnavailable)
		_, err = b.Bind(ctx, issued.Secret.Reveal())
		require.ErrorIs(t, err, ErrUnavailable)
		_, err = b.Inspect(ctx, issued.Secret.Reveal())
		require.ErrorIs(t, err, ErrUnavailable)
		<-ended
		require.ErrorIs(t, idle.Cause(), ErrUnavailable)
		require.False(t, b.Stats().Fresh)
		require.EqualValues(t, 2, b.Stats().Ended["unavailable"])
		require.NoError(t, b.Err(), "the trouble is temporary")

		b.link.Set(badlink.Faults{})
		b.awaitFresh()
		require.ErrorIs(t, b.uses(issued), ErrRevoked)
		require.NoError(t, b.uses(other))
		require.ErrorIs(t, idle.Cause(), ErrUnavailable, "an ended session stays ended")
	})
}

// A session that finds the gate closed has ended, even if the goroutine that ends the contexts has
// not run.
func TestASessionAsksTheGate(t *testing.T) {
	for name, look := range map[string]func(s *Session) error{
		"Cause": (*Session).Cause,
		"Err":   func(s *Session) error { return s.Context().Err() },
		"Done": func(s *Session) error {
			select {
			case <-s.Context().Done():
				return context.Cause(s.Context())
			default:
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			fleetTest(t, func(t *testing.T, f *fleet) {
				a := f.open(nil)
				session := a.binds(a.create(Spec{}))
				require.NoError(t, look(session))
				a.link.Set(badlink.Faults{Silent: true})
				// The gate closes at the end of the sleep. The test may run before the gate
				// watcher.
				a.awaitStale()
				require.Error(t, look(session))
				require.ErrorIs(t, session.Cause(), ErrUnavailable)
			})
		})
	}
}

// blockingHasher stops a Match where a test wants the match to wait.
type blockingHasher struct {
	hashing.Hasher
	mu            sync.Mutex
	arrived, open chan struct{}
}

func (h *blockingHasher) block() (arrived <-chan struct{}, open chan<- struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.arrived, h.open = make(chan struct{}), make(chan struct{})
	return h.arrived, h.open
}

func (h *blockingHasher) Match(d hashing.Digest, token string) hashing.Result {
	h.mu.Lock()
	arrived, open := h.arrived, h.open
	h.arrived = nil
	h.mu.Unlock()
	if arrived != nil {
		close(arrived)
		<-open
	}
	return h.Hasher.Match(d, token)
}

// gateAfterCache is a wrong Verify, which asks the gate after the look into the cache.
func gateAfterCache(s *Store, ctx context.Context, text string) (*Key, error) {
	e, err := s.admit(ctx, text)
	if err == nil && !s.isFresh() {
		err = errStale
	}
	if err != nil {
		return nil, err
	}
	return &e.key, nil
}

// staleHit begins a Verify while the gate is closed, and after a Revoke of the key has returned.
// If the Verify looks into the cache, the Verify then stops until the gate is open again. The key
// must not be admitted.
func staleHit(
	f *fleet, verify func(*Store, context.Context, string) (*Key, error),
) (admitted bool) {
	hasher := &blockingHasher{Hasher: hashing.SHA256()}
	a, b := f.open(nil), f.open(&Options{Hasher: hasher})
	issued := a.create(Spec{})
	require.NoError(f, b.uses(issued))
	b.link.Set(badlink.Faults{Drop: true, Silent: true})
	require.NoError(f, a.Revoke(f.Context(), issued.Key.ID, ""))
	arrived, open := hasher.block()
	result := make(chan error, 1)
	go func() {
		_, err := verify(b.Store, f.Context(), issued.Secret.Reveal())
		result <- err
	}()
	select {
	case <-arrived:
		b.link.Set(badlink.Faults{})
		b.awaitFresh()
		close(open)
		return <-result == nil
	case err := <-result:
		require.ErrorIs(f, err, ErrUnavailable)
		return false
	}
}

// The gate is asked before the look into the cache: a value from before the gate closed must not be
// admitted once the gate has opened again.
func TestTheGateComesBeforeTheCache(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		require.False(t, staleHit(f, (*Store).Verify))
	})
}

func TestAGateAfterTheCacheIsCaught(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		require.True(t, staleHit(f, gateAfterCache))
	})
}

// lateBind stops a Bind between its first look at the gate and its registration, until the gate has
// closed and all contexts were ended.
func lateBind(f *fleet, wrong variant) error {
	hasher := &blockingHasher{Hasher: hashing.SHA256()}
	a := f.openWrong(&Options{Hasher: hasher, CacheSize: -1}, wrong)
	issued := a.create(Spec{})
	arrived, open := hasher.block()
	result := make(chan error, 1)
	go func() {
		s, err := a.Bind(f.Context(), issued.Secret.Reveal())
		if err == nil {
			s.Close()
		}
		result <- err
	}()
	<-arrived
	a.link.Set(badlink.Faults{Drop: true, Silent: true})
	time.Sleep(2 * testFreshness)
	require.False(f, a.isFresh())
	close(open)
	return <-result
}

// Bind asks the gate again after the registration.
func TestBindLooksTwice(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) { require.ErrorIs(t, lateBind(f, 0), ErrUnavailable) })
}

func TestBindWithoutTheSecondLookIsCaught(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) { require.NoError(t, lateBind(f, noSecondLook)) })
}

// lateRevival delays a change in the network until the process that made the change was evicted.
// lateRevival reports whether the change was made nevertheless.
func lateRevival(f *fleet, wrong variant) (made bool) {
	a, b := f.open(nil), f.openWrong(&Options{Timeout: 1300 * time.Millisecond}, wrong)
	issued := a.create(Spec{})
	id := issued.Key.ID
	require.NoError(f, a.Disable(f.Context(), id, ""))
	arrive, arrived := make(chan struct{}), make(chan struct{})
	b.onApply(func(ctx context.Context, changes []backend.Change,
		next func(context.Context) error) error {
		if changes[0].Key[0] != keySpace {
			return next(ctx)
		}
		b.link.Set(badlink.Faults{Drop: true, Silent: true})
		go func() {
			defer close(arrived)
			<-arrive
			_ = f.shared.Open().Apply(context.Background(), changes...)
		}()
		<-ctx.Done()
		return ctx.Err()
	})
	require.Error(f, b.Enable(f.Context(), id))
	for a.Stats().Processes > 1 {
		time.Sleep(testFreshness / 4)
	}
	close(arrive)
	<-arrived
	key, err := a.Get(f.Context(), id)
	require.NoError(f, err)
	return key.Status() == StatusActive
}

// A process that was evicted changes nothing any more, however late its change arrives.
func TestAnEvictedProcessChangesNothing(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) { require.False(t, lateRevival(f, 0)) })
}

func TestAChangeWithoutItsGuardIsCaught(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) { require.True(t, lateRevival(f, noGuard)) })
}

// A change that was made, but whose call ends before all processes have answered, gives
// ErrNotEverywhere. A repeat waits for the other processes.
func TestErrNotEverywhere(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		issued := a.create(Spec{})
		id := issued.Key.ID
		require.NoError(t, b.uses(issued))
		b.link.Set(badlink.Faults{Silent: true})
		ctx, cancel := context.WithTimeout(t.Context(), testFreshness/8)
		defer cancel()
		rotated, err := a.Rotate(ctx, id, 0)
		require.ErrorIs(t, err, ErrNotEverywhere)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NotErrorIs(t, err, ErrDenied)
		require.EqualError(t, err, "keystore: rotate: the change is made, but may not be in force in "+
			"every process yet: 1.2s after the change, it is in force in every process: "+
			"context deadline exceeded")
		require.Equal(t, "not_everywhere", Reason(err))
		require.NoError(t, a.uses(rotated), "the secret is not lost")
		require.NoError(t, b.uses(issued))

		ctx, cancel = context.WithTimeout(t.Context(), testFreshness/8)
		defer cancel()
		session := a.binds(rotated)
		key, err := a.Update(ctx, id, func(s *Spec) error { s.Name = "new"; return nil })
		require.ErrorIs(t, err, ErrNotEverywhere)
		require.Equal(t, "new", key.Name)
		require.NoError(t, session.Cause(), "the outcome is known")

		ctx, cancel = context.WithCancel(t.Context())
		cancelled := start(func() error { return a.Revoke(ctx, id, "") })
		synctest.Wait()
		cancel()
		require.ErrorIs(t, cancelled(), ErrNotEverywhere)
		require.NoError(t, a.Revoke(t.Context(), id, ""))
		require.Error(t, b.uses(issued))
	})
}

// A change that finds nothing to change waits for the other processes too.
func TestARepeatedRevokeWaits(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b, c := f.open(nil), f.open(nil), f.open(nil)
		issued := a.create(Spec{})
		require.NoError(t, c.uses(issued))
		c.link.Set(badlink.Faults{Silent: true})
		first := start(func() error { return a.Revoke(t.Context(), issued.Key.ID, "") })
		synctest.Wait()
		require.NoError(t, c.uses(issued), "the revocation has not returned")
		require.NoError(t, b.Revoke(t.Context(), issued.Key.ID, ""))
		require.Error(t, c.uses(issued))
		require.NoError(t, first())
	})
}

// RevokeAll, Restore and Purge wait for the other processes once.
func TestOneBarrierForManyKeys(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a, b := f.open(nil), f.open(nil)
		for range 300 {
			a.create(Spec{Owner: "acme"})
		}
		var backup strings.Builder
		require.NoError(t, a.Backup(ctx, &backup))
		barriers := func() uint64 {
			st := a.processes.cluster.Stats()
			return st.Acked + st.Deadlines
		}
		before := barriers()
		n, err := a.RevokeAll(ctx, Query{Owner: "acme"}, "", nil)
		require.NoError(t, err)
		require.Equal(t, 300, n)
		require.Equal(t, before+1, barriers())

		time.Sleep(time.Millisecond)
		n, err = a.Purge(ctx, time.Now())
		require.NoError(t, err)
		require.Equal(t, 300, n)
		require.Equal(t, before+2, barriers())

		require.NoError(t, b.Close())
		other := &fleet{t, backendtest.NewShared()}
		c := other.open(nil)
		before = c.processes.cluster.Stats().Acked
		require.NoError(t, c.Restore(ctx, strings.NewReader(backup.String())))
		require.Equal(t, before+1, c.processes.cluster.Stats().Acked)
		n, err = c.Count(ctx, Query{})
		require.NoError(t, err)
		require.Equal(t, 300, n)
		require.NoError(t, c.CheckIntegrity(ctx))
	})
}

// The answer of a write is lost. The cache keeps the key, and readers of events in all processes
// get the truth.
func TestALostAnswer(t *testing.T) {
	for _, made := range []bool{true, false} {
		t.Run(fmt.Sprint("made ", made), func(t *testing.T) {
			fleetTest(t, func(t *testing.T, f *fleet) {
				ctx := t.Context()
				a, b := f.open(&Options{Timeout: 1300 * time.Millisecond}), f.open(nil)
				issued := a.create(Spec{})
				id := issued.Key.ID
				require.NoError(t, a.uses(issued))
				session := a.binds(issued)
				var lost atomic.Bool
				lost.Store(true)
				a.onApply(func(ctx context.Context, changes []backend.Change,
					next func(context.Context) error) error {
					if changes[0].Key[0] != keySpace || !lost.CompareAndSwap(true, false) {
						return next(ctx)
					}
					if made {
						if err := next(ctx); err != nil {
							t.Error(err)
						}
					}
					return errors.New("the connection is gone")
				})
				require.ErrorIs(t, a.Disable(ctx, id, ""), ErrUnavailable)
				require.ErrorIs(t, session.Cause(), ErrDisabled, "the session fails closed")
				for _, m := range []*member{a, b} {
					err := m.uses(issued)
					require.Equal(t, made, errors.Is(err, ErrDisabled))
					var actions []Action
					for e, err := range m.Events(ctx, EventQuery{}) {
						require.NoError(t, err)
						actions = append(actions, e.Action)
					}
					want := []Action{ActionCreate, ActionDisable}
					require.Equal(t, want[:len(actions)], actions)
					require.Equal(t, made, len(actions) == 2)
				}
				require.NoError(t, b.Enable(ctx, id))
				require.NoError(t, a.uses(issued))
				require.Equal(t, 1, a.Stats().Cached, "the ID does not stay out of the cache")
				require.NoError(t, a.CheckIntegrity(ctx))
			})
		})
	}
}

// Many processes change one key at the same time. Every change succeeds, and the events of the key
// ascend with the revision, although the clocks of the processes give the same stamps.
func TestManyProcessesChangeOneKey(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		var all []*member
		for range 4 {
			all = append(all, f.open(nil))
		}
		id := all[0].create(Spec{}).Key.ID
		var changes sync.WaitGroup
		const each = 40
		for _, m := range all {
			for range 3 {
				changes.Go(func() {
					for n := range each {
						_, err := m.Update(ctx, id, func(s *Spec) error {
							s.Metadata = map[string]string{"n": s.Metadata["n"] + "x"}
							return nil
						})
						if err == nil {
							_, err = m.Create(ctx, Spec{Name: fmt.Sprint(n)})
						}
						if err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
		}
		changes.Wait()
		key, err := all[1].Get(ctx, id)
		require.NoError(t, err)
		require.Len(t, key.Metadata()["n"], len(all)*3*each)
		for _, m := range all {
			next := uint64(1)
			for e, err := range m.Events(ctx, EventQuery{KeyID: id}) {
				require.NoError(t, err)
				require.Equal(t, next, e.Revision)
				next++
			}
			require.Equal(t, key.Revision+1, next)
			require.NoError(t, m.CheckIntegrity(ctx))
		}
	})
}

// Close leaves no member record, and no process waits for a closed process.
func TestCloseLeavesTheProcesses(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		a, b := f.open(nil), f.open(nil)
		issued := a.create(Spec{})
		session := b.binds(issued)
		require.Equal(t, 2, f.entries('m'))
		require.Equal(t, 2, f.entries('n'))
		require.NoError(t, b.Close())
		require.ErrorIs(t, session.Cause(), ErrClosed)
		require.ErrorIs(t, b.uses(issued), ErrClosed)
		require.False(t, b.Stats().Fresh)
		require.Equal(t, 1, f.entries('m'))
		require.Equal(t, 1, f.entries('n'))
		require.Zero(t, took(func() {
			require.NoError(t, a.Revoke(t.Context(), issued.Key.ID, ""))
		}))
		require.NoError(t, a.Close())
		require.Zero(t, f.entries('m'))
		require.Zero(t, f.entries('n'))
	})
}

// Options that cannot be used: each error says what is wrong and what to do.
func TestFreshnessOptions(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		refused := func(b backend.Backend, o Options, text string) {
			t.Helper()
			_, err := New(b, &o)
			require.ErrorIs(t, err, ErrInvalid)
			require.EqualError(t, err, "keystore: invalid argument: "+text)
		}
		open := f.shared.Open
		refused(backendtest.NewMemory(), Options{Freshness: time.Second}, "Options.Freshness is 1s, "+
			"but the backend is not a backend.Feeder: the store belongs to one process, so set "+
			"Freshness to 0")
		refused(open(), Options{Freshness: -1},
			"Options.Freshness is -1ns: it must be 0, or at least 400ms")
		refused(open(), Options{Freshness: time.Second, Timeout: 1200 * time.Millisecond},
			"Options.Timeout is 1.2s, and the freshness of the store is 1s: a change may wait for "+
				"other processes for 1.2s, so Timeout must be longer")
		refused(open(), Options{Timeout: time.Second},
			"Options.Timeout is 1s, and the freshness of the store is 3s: a change may wait for "+
				"other processes for 3.6s, so Timeout must be longer")
		require.Zero(t, f.entries('m'), "a refused store leaves nothing behind")

		a := f.open(nil)
		refused(open(), Options{Freshness: 2 * time.Second}, "Options.Freshness: the store has "+
			"another freshness: 1s, and this process is configured with 2s: configure all "+
			"processes with the same freshness, or with 0 to use the freshness of the store")
		b, err := New(open(), nil)
		require.NoError(t, err)
		require.Equal(t, testFreshness, b.processes.cluster.Freshness())
		require.NoError(t, b.Close())
		require.NoError(t, a.Close())
		c := f.open(&Options{Freshness: 2 * time.Second})
		require.Equal(t, 2*time.Second, c.processes.cluster.Freshness())
	})
}

// New waits for at most Options.Timeout.
func TestNewOnASilentBackend(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		link := badlink.Open(f.shared)
		link.Set(badlink.Faults{Silent: true})
		wait := took(func() {
			_, err := New(link, &Options{Timeout: 5 * time.Second})
			require.ErrorIs(t, err, ErrUnavailable)
			require.ErrorContains(t, err, "join the other processes")
		})
		require.GreaterOrEqual(t, wait, 5*time.Second)
		require.Less(t, wait, 8*time.Second)
	})
}

// The stores of one process have no gate.
func TestStatsOfOneProcess(t *testing.T) {
	s, err := New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	st := s.Stats()
	require.Equal(t, 1, st.Processes)
	require.True(t, st.Fresh)
	require.NotContains(t, st.Ended, "unavailable")
	require.NoError(t, s.Close())
	require.False(t, s.Stats().Fresh)
}
