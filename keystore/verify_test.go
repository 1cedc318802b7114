package keystore

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// uses are the calls that decide about a token.
var uses = map[string]func(ctx context.Context, s *Store, text string) error{
	"Verify": func(ctx context.Context, s *Store, text string) error {
		_, err := s.Verify(ctx, text)
		return err
	},
	"Bind": func(ctx context.Context, s *Store, text string) error {
		_, _, release, err := parts(s.Bind(ctx, text))
		if err == nil {
			release()
		}
		return err
	},
	"Inspect": func(ctx context.Context, s *Store, text string) error {
		i, err := s.Inspect(ctx, text)
		if err == nil {
			err = i.Refusal
		}
		return err
	},
}

// Trouble comes before whatever is wrong with a text: what nobody can tell is no answer.
func TestErrorsOfTheStoreComeBeforeDenials(t *testing.T) {
	r := newRig(t, fence.TwoPhase)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	closed, err := New(backendtest.NewMemory(), nil)
	require.NoError(t, err)
	require.NoError(t, closed.Close())
	failed := newRig(t, fence.TwoPhase).store
	failed.noteFailure(backend.ErrFailed)
	why := failed.Err()
	failed.noteFailure(errors.Join(backend.ErrFailed, errors.New("a second one")))
	require.Equal(t, why, failed.Err(), "the first failure stays")
	closed.noteFailure(backend.ErrFailed) // of a write that was under way
	_, unknown := r.store.format.New()
	for name, use := range uses {
		for _, text := range []string{"", "nonsense", unknown[:len(unknown)-6] + "000000", unknown,
			r.issued.Secret.Reveal()} {
			require.ErrorIs(t, use(cancelled, r.store, text), context.Canceled, name)
			for s, want := range map[*Store]error{closed: ErrClosed, failed: ErrUnavailable} {
				err := use(t.Context(), s, text)
				require.ErrorIs(t, err, want, name)
				require.NotErrorIs(t, err, ErrDenied, name)
			}
		}
		require.ErrorIs(t, use(t.Context(), r.store, "nonsense"), ErrMalformed, name)
	}
}

// A counting hasher writes down what it is asked to match.
type countingHasher struct {
	hashing.Hasher
	mu      sync.Mutex
	matched []hashing.Digest
}

func (h *countingHasher) Match(d hashing.Digest, token string) hashing.Result {
	h.mu.Lock()
	h.matched = append(h.matched, d)
	h.mu.Unlock()
	return h.Hasher.Match(d, token)
}

func (h *countingHasher) take() (matched []hashing.Digest) {
	h.mu.Lock()
	defer h.mu.Unlock()
	matched, h.matched = h.matched, nil
	return matched
}

// A token of a key that does not exist costs as many digests as a wrong secret of one that does:
// one. With a hasher that is slow, the time would tell which keys exist.
func TestUnknownKeysCostADigest(t *testing.T) {
	h := &countingHasher{Hasher: hashing.SHA256()}
	s, err := New(backendtest.NewMemory(), &Options{Hasher: h})
	require.NoError(t, err)
	defer s.Close()
	issued, err := s.Create(t.Context(), Spec{Name: "test"})
	require.NoError(t, err)
	id, ok := token.ParseID(issued.Key.ID)
	require.True(t, ok)
	wrong := s.format.Renew(id)
	_, unknown := s.format.New()
	for name, use := range uses {
		h.take()
		require.ErrorIs(t, use(t.Context(), s, wrong), ErrUnknown, name)
		known := h.take()
		require.Len(t, known, 1, name)
		require.NotEqual(t, s.dummyDigest, known[0], name)
		require.ErrorIs(t, use(t.Context(), s, unknown), ErrUnknown, name)
		require.Equal(t, []hashing.Digest{s.dummyDigest}, h.take(), name)
	}
	_, err = s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	for name, use := range uses {
		h.take()
		require.ErrorIs(t, use(t.Context(), s, wrong), ErrUnknown, name)
		require.Len(t, h.take(), 1, "%s of a cached key", name)
	}
}

// A Bind that is refused leaves nothing behind: neither in the store's registry nor in its parent
// context.
func TestARefusedBindLeavesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, fence.TwoPhase)
		s := r.store
		make := func(spec Spec) (id, text string) {
			spec.Name = "test"
			issued, err := s.Create(t.Context(), spec)
			require.NoError(t, err)
			return issued.Key.ID, issued.Secret.Reveal()
		}
		parent := &watched{Context: t.Context()}
		refused := func(name, text string, want error) {
			t.Helper()
			var limited *RateLimitError
			_, err := s.Bind(parent, text)
			if want == nil {
				require.ErrorAs(t, err, &limited, name)
			} else {
				require.ErrorIs(t, err, want, name)
			}
			require.Zero(t, s.Stats().Live, name)
			require.Zero(t, parent.children.Load(), name)
		}
		cache := func(text string) {
			t.Helper()
			_, err := s.Verify(t.Context(), text)
			require.NoError(t, err)
		}

		_, unknown := s.format.New()
		refused("malformed", "nonsense", ErrMalformed)
		refused("unknown", unknown, ErrUnknown)
		id, text := make(Spec{})
		cache(text)
		parsed, _ := token.ParseID(id)
		refused("a wrong secret, cached", s.format.Renew(parsed), ErrUnknown)
		require.NoError(t, s.Revoke(t.Context(), id, ""))
		refused("revoked", text, ErrRevoked)
		refused("revoked, again", text, ErrRevoked)

		limit := RateLimit{PerSecond: 1e-6, Burst: 1}
		_, text = make(Spec{RateLimit: limit})
		cache(text)
		refused("over the limit, cached", text, nil)
		id, text = make(Spec{RateLimit: limit})
		cache(text)
		parsed, _ = token.ParseID(id)
		s.fence.Cut(parsed, nil)
		refused("over the limit, read", text, nil)

		_, text = make(Spec{})
		cancelled, cancel := context.WithCancel(t.Context())
		parent.Context = cancelled
		g := r.backend.set(&r.backend.afterGet)
		go func() {
			<-g.arrived
			cancel()
			close(g.open)
		}()
		refused("the caller has left meanwhile", text, context.Canceled)
		r.backend.clear(&r.backend.afterGet)

		parent.Context = t.Context()
		_, text = make(Spec{})
		ctx, _, release, err := parts(s.Bind(parent, text))
		require.NoError(t, err)
		require.NoError(t, ctx.Err())
		require.EqualValues(t, 1, parent.children.Load(), "the test can see one")
		require.Equal(t, 1, s.Stats().Live)
		release()
		require.Zero(t, s.Stats().Live)
		require.Zero(t, parent.children.Load())
	})
}

// A closing context closes the store once somebody looks at it.
type closing struct {
	context.Context
	once  sync.Once
	close func()
}

func (c *closing) Err() error {
	c.once.Do(c.close)
	return c.Context.Err()
}

// A Bind that has found the store serving, just before Close, is refused, although the key is
// cached: its context would never end.
func TestABindThatRacesCloseIsRefused(t *testing.T) {
	for _, cached := range []bool{true, false} {
		s, err := New(backendtest.NewMemory(), nil)
		require.NoError(t, err)
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		if cached {
			_, err = s.Verify(t.Context(), issued.Secret.Reveal())
			require.NoError(t, err)
		}
		ctx := &closing{Context: t.Context(), close: func() { require.NoError(t, s.Close()) }}
		_, err = s.Bind(ctx, issued.Secret.Reveal())
		require.ErrorIs(t, s.Err(), ErrClosed, "it was closed meanwhile")
		require.ErrorIs(t, err, ErrClosed)
		require.Zero(t, s.Stats().Live)
	}
}

// A Bind that Close overtakes says that the store is closed, also while Close has still to write,
// and storage answers.
func TestABindThatCloseOvertakes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &gated{Backend: backendtest.NewMemory()}
		s, err := New(b, nil)
		require.NoError(t, err)
		issued, err := s.Create(t.Context(), Spec{Name: "test"})
		require.NoError(t, err)
		_, err = s.Verify(t.Context(), issued.Secret.Reveal())
		require.NoError(t, err)
		id, _ := token.ParseID(issued.Key.ID)
		s.fence.Cut(id, nil) // out of the cache
		read := b.set(&b.afterGet)
		bind := start(func() error {
			_, err := s.Bind(context.Background(), issued.Secret.Reveal())
			return err
		})
		<-read.arrived
		b.clear(&b.afterGet)
		usage := b.set(&b.beforeApply)
		closed := start(s.Close)
		<-usage.arrived
		close(read.open)
		require.ErrorIs(t, bind(), ErrClosed)
		close(usage.open)
		require.NoError(t, closed())
	})
}

// A Bind that reads the store while keys of its shard are cut starts again, and gives up as
// trouble, never as a denial.
func TestABindThatIsOvertakenStartsAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, times := range []int{1, bindAttempts - 1, bindAttempts} {
			r := newRig(t, fence.TwoPhase)
			id, _ := token.ParseID(r.issued.Key.ID)
			g := r.backend.set(&r.backend.afterGet)
			wait := start(func() error { _, err := r.bind(); return err })
			for range times {
				<-g.arrived
				r.store.fence.Cut(id, ErrNarrowed)
				next := r.backend.set(&r.backend.afterGet)
				close(g.open)
				g = next
			}
			if times < bindAttempts {
				<-g.arrived
				r.backend.clear(&r.backend.afterGet)
				close(g.open)
				require.NoError(t, wait())
				require.Equal(t, 1, r.store.Stats().Live)
				continue
			}
			err := wait()
			r.backend.clear(&r.backend.afterGet)
			require.ErrorIs(t, err, ErrUnavailable)
			require.NotErrorIs(t, err, ErrDenied)
			require.Zero(t, r.store.Stats().Live)
		}
	})
}

// Once a silent backend is on, it answers no Get before the context of the call ends.
type silent struct {
	backend.Backend
	on atomic.Bool
}

func (b *silent) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if !b.on.Load() {
		return b.Backend.Get(ctx, key)
	}
	<-ctx.Done()
	return backend.Entry{}, ctx.Err()
}

// A Verify that reads the storage ends with the deadline of the caller or with Options.Timeout,
// whichever is earlier. Only the latter is trouble of the storage.
func TestAMissEndsAtTheEarlierTime(t *testing.T) {
	for _, tt := range []struct {
		deadline, timeout, ends time.Duration // deadline 0: none
		err                     error
	}{
		{0, 0, 10 * time.Second, ErrUnavailable},
		{20 * time.Second, 0, 10 * time.Second, ErrUnavailable},
		{9 * time.Second, 0, 9 * time.Second, context.DeadlineExceeded},
		{9 * time.Second, 3 * time.Second, 3 * time.Second, ErrUnavailable},
		{time.Minute, -1, time.Minute, context.DeadlineExceeded},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := &silent{Backend: backendtest.NewMemory()}
			s, err := New(b, &Options{Timeout: tt.timeout, CacheSize: -1})
			require.NoError(t, err)
			defer s.Close()
			issued, err := s.Create(t.Context(), Spec{Name: "k"})
			require.NoError(t, err)
			b.on.Store(true)
			defer b.on.Store(false)
			ctx := t.Context()
			if tt.deadline != 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, tt.deadline)
				defer cancel()
			}
			began := time.Now()
			_, err = s.Verify(ctx, issued.Secret.Reveal())
			require.ErrorIs(t, err, tt.err, tt)
			require.NotErrorIs(t, err, ErrDenied)
			require.Equal(t, tt.ends, time.Since(began), tt)
		})
	}
}

// A key has one limiter, with the limit of the latest revision that was read, in whatever order
// readers come.
func TestALimiterHasTheLimitOfTheNewestRevision(t *testing.T) {
	l := newLimits(new(usage))
	id := token.ID{1}
	key := func(revision uint64, limit float64, burst int) *Key {
		return &Key{Revision: revision, RateLimit: RateLimit{PerSecond: limit, Burst: burst}}
	}
	limiter := l.of(id, key(2, 20, 200))
	require.Same(t, limiter, l.of(id, key(1, 10, 100)))
	require.EqualValues(t, 20, limiter.Limit())
	require.Equal(t, 200, limiter.Burst())
	require.Same(t, limiter, l.of(id, key(4, 40, 400)))
	require.EqualValues(t, 40, limiter.Limit())
	require.Equal(t, 400, limiter.Burst())
	require.NoError(t, l.peek(id, key(3, 30, 300)))
	require.Same(t, limiter, l.of(id, key(3, 30, 300)))
	require.EqualValues(t, 40, limiter.Limit())
	require.Equal(t, 400, limiter.Burst())
}

// A use that is over the limit is no use, and one that is admitted is, of Bind as of Verify.
func TestOnlyAdmissionsAreUses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, use := range uses {
			if name == "Inspect" {
				continue
			}
			s := newRig(t, fence.TwoPhase).store
			issued, err := s.Create(t.Context(),
				Spec{Name: "test", RateLimit: RateLimit{PerSecond: 1e-6, Burst: 1}})
			require.NoError(t, err)
			id, _ := token.ParseID(issued.Key.ID)
			require.NoError(t, use(t.Context(), s, issued.Secret.Reveal()), name)
			require.NotZero(t, s.usage.pending(id), name)
			s.usage.mu.Lock()
			delete(s.usage.used, id)
			s.usage.mu.Unlock()
			s.usage.minute.Add(1)
			var limited *RateLimitError
			require.True(t, errors.As(use(t.Context(), s, issued.Secret.Reveal()), &limited), name)
			require.Zero(t, s.usage.pending(id), name)
			require.EqualValues(t, 1, s.Stats().Refused, name)
		}
	})
}
