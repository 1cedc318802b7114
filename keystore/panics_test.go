package keystore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"runtime"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/hashing"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A moodyHasher panics with the token, or answers nonsense, when told to.
type moodyHasher struct {
	hashing.Hasher
	panics   atomic.Bool
	nonsense atomic.Bool
}

// A holder is a value of a panic that holds a token. The Go runtime prints a struct as an address.
type holder struct{ token string }

func (h *moodyHasher) Digest(token string) hashing.Digest {
	if h.panics.Load() {
		panic(holder{token})
	}
	if h.nonsense.Load() {
		return hashing.Digest{Scheme: "empty"}
	}
	return h.Hasher.Digest(token)
}

func (h *moodyHasher) Match(d hashing.Digest, token string) hashing.Result {
	if h.panics.Load() {
		panic(&holder{token})
	}
	if h.nonsense.Load() {
		return hashing.MatchOutdated + 1
	}
	return h.Hasher.Match(d, token)
}

// A Hasher that fails refuses every caller with ErrUnavailable, and leaves nothing behind: no
// pending stamp, for which Events and RevokeAll would wait, and no binding.
func TestAFailingHasherIsUnavailable(t *testing.T) {
	for name, mood := range map[string]func(*moodyHasher) *atomic.Bool{
		"panics":   func(h *moodyHasher) *atomic.Bool { return &h.panics },
		"nonsense": func(h *moodyHasher) *atomic.Bool { return &h.nonsense },
	} {
		for _, cache := range []int{0, -1} {
			t.Run(fmt.Sprint(name, " with cache ", cache), func(t *testing.T) {
				h := &moodyHasher{Hasher: hashing.SHA256()}
				var out syncBuilder
				s, err := keystore.New(backendtest.NewMemory(), &keystore.Options{
					Hasher: h, CacheSize: cache,
					Logger: slog.New(slog.NewTextHandler(&out, nil)),
				})
				require.NoError(t, err)
				defer func() { require.NoError(t, s.Close()) }()
				issued := create(t, s, keystore.Spec{})
				other := create(t, inMemory(t), keystore.Spec{})
				token := issued.Secret.Reveal()
				require.NoError(t, verify(t, s, token))
				live := bind(t, s, token)

				mood(h).Store(true)
				ctx := t.Context()
				errs := make(map[string]error)
				_, errs["Verify"] = s.Verify(ctx, token)
				_, errs["Bind"] = s.Bind(ctx, token)
				_, errs["Inspect"] = s.Inspect(ctx, token)
				_, errs["Create"] = s.Create(ctx, keystore.Spec{Name: "n"})
				_, errs["Rotate"] = s.Rotate(ctx, issued.Key.ID, time.Hour)
				if name == "panics" {
					_, errs["Verify of another"] = s.Verify(ctx, other.Secret.Reveal())
					_, errs["Inspect of another"] = s.Inspect(ctx, other.Secret.Reveal())
				}
				for call, err := range errs {
					require.ErrorIs(t, err, keystore.ErrUnavailable, call)
					require.NotErrorIs(t, err, keystore.ErrDenied, call)
					require.NotContains(t, err.Error(), token)
				}
				require.Equal(t, 1, s.Stats().Live)
				require.NoError(t, live.Err())
				require.Len(t, events(t, s, keystore.EventQuery{}), 1)

				mood(h).Store(false)
				require.NoError(t, verify(t, s, token), "nothing was done")
				n, err := s.RevokeAll(ctx, keystore.Query{}, "",
					&keystore.RevokeAllOptions{All: true})
				require.NoError(t, err)
				require.Equal(t, 1, n)
				require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked)
				require.Zero(t, s.Stats().Live)

				log := out.String()
				require.NotContains(t, log, token[len(token)-40:])
				require.NotContains(t, log, other.Secret.Reveal()[40:])
				if name == "panics" {
					require.Contains(t, log, "callback=Hasher.Match")
					require.Contains(t, log, "callback=Hasher.Digest")
					require.Contains(t, log, "panic=*keystore_test.holder")
					require.Contains(t, log, "keystore_test.(*moodyHasher).Match", "the stack")
				}
			})
		}
	}
}

// A digest that cannot be replaced does not keep its key from being used.
func TestAHasherThatPanicsWhenADigestIsReplaced(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	token := create(t, s, keystore.Spec{}).Secret.Reveal()
	require.NoError(t, s.Close())

	current := &moodyHasher{Hasher: pepper(t, "a", 1)}
	s, err = keystore.Open(dir,
		&keystore.Options{Hasher: keyring(t, hashing.Hasher(onlyDigest{current}),
			hashing.SHA256())})
	require.NoError(t, err)
	current.panics.Store(true)
	for range 3 {
		require.NoError(t, verify(t, s, token))
	}
	require.NoError(t, s.Close())
}

// An onlyDigest panics in Digest only.
type onlyDigest struct{ *moodyHasher }

func (h onlyDigest) Match(d hashing.Digest, token string) hashing.Result {
	return h.Hasher.Match(d, token)
}

func TestAUselessHasherIsRefused(t *testing.T) {
	panics, empty := &moodyHasher{Hasher: hashing.SHA256()}, &moodyHasher{Hasher: hashing.SHA256()}
	panics.panics.Store(true)
	empty.nonsense.Store(true)
	for name, h := range map[string]hashing.Hasher{"panics": panics, "empty": empty,
		"nil": (*moodyHasher)(nil)} {
		_, err := keystore.New(backendtest.NewMemory(), &keystore.Options{Hasher: h})
		require.ErrorIs(t, err, keystore.ErrInvalid, name)
		require.ErrorContains(t, err, "Options.Hasher")
	}
}

// A panicky Observer panics each time, with what it was called with.
type panicky struct{}

func (panicky) Verified(v keystore.Verification) { panic(v) }
func (panicky) Refused(r keystore.Refusal)       { panic(r) }
func (panicky) Changed(e keystore.Event)         { panic(e) }
func (panicky) Ended(e keystore.BindEnd)         { panic(e) }

// An Observer that panics changes nothing of what the store does, on whatever goroutine it is
// called.
func TestAPanickyObserverChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out syncBuilder
		s, err := keystore.New(backendtest.NewMemory(), &keystore.Options{
			Observer: panicky{}, Logger: slog.New(slog.NewTextHandler(&out, nil)),
		})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		ctx := t.Context()
		var live []context.Context
		spec := keystore.Spec{ExpiresAt: time.Now().Add(time.Hour)}
		revoked, expired := create(t, s, spec), create(t, s, spec)
		many := fill(t, s, 5, func(int) keystore.Spec { return spec })
		for _, issued := range append(many, revoked, expired) {
			token := issued.Secret.Reveal()
			require.NoError(t, verify(t, s, token))
			for range 3 {
				live = append(live, bind(t, s, token))
			}
		}
		require.ErrorIs(t, verify(t, s, "nonsense"), keystore.ErrMalformed)
		_, err = s.Bind(ctx, "nonsense")
		require.ErrorIs(t, err, keystore.ErrMalformed)
		require.Equal(t, len(live), s.Stats().Live)

		require.NoError(t, s.Revoke(ctx, revoked.Key.ID, ""))
		require.Equal(t, len(live)-3, s.Stats().Live)
		_, err = s.Update(ctx, many[0].Key.ID, func(spec *keystore.Spec) error {
			spec.ExpiresAt = spec.ExpiresAt.Add(-time.Minute)
			return nil
		})
		require.NoError(t, err)
		require.NoError(t, s.Disable(ctx, many[1].Key.ID, ""))
		require.Equal(t, len(live)-9, s.Stats().Live)
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Zero(t, s.Stats().Live)
		for _, ctx := range live {
			require.Error(t, ctx.Err())
		}
		n, err := s.RevokeAll(ctx, keystore.Query{Status: keystore.StatusExpired}, "", nil)
		require.NoError(t, err)
		require.Equal(t, len(many), n, "all but those that are revoked and disabled")
		require.NotEmpty(t, events(t, s, keystore.EventQuery{}))
		for _, callback := range []string{"Verified", "Refused", "Changed", "Ended"} {
			require.Contains(t, out.String(), "callback=Observer."+callback)
		}
		require.Contains(t, out.String(), "keystore_test.panicky.Ended", "the stack")
	})
}

// A test that fails inside an Observer ends the goroutine that it is on. The call returns all the
// same.
func TestAnObserverThatEndsItsGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := new(told)
		s, err := keystore.New(backendtest.NewMemory(), &keystore.Options{Observer: o})
		require.NoError(t, err)
		o.changed = func(keystore.Event) { runtime.Goexit() }
		create(t, s, keystore.Spec{})
		require.NoError(t, s.Close())
	})
}

// A panickyHandler panics in each of its methods.
type panickyHandler struct{}

func (panickyHandler) Enabled(context.Context, slog.Level) bool {
	if calls.Add(1)%2 == 0 {
		panic("enabled")
	}
	return true
}
func (panickyHandler) Handle(context.Context, slog.Record) error { panic("handle") }
func (panickyHandler) WithAttrs([]slog.Attr) slog.Handler        { panic("attrs") }
func (panickyHandler) WithGroup(string) slog.Handler             { panic("group") }

var calls atomic.Int64

func TestAPanickyLoggerChangesNothing(t *testing.T) {
	for _, o := range []keystore.Observer{nil, panicky{}} {
		s := open(t, &keystore.Options{Logger: slog.New(panickyHandler{}), Observer: o})
		issued := create(t, s, keystore.Spec{})
		live := bind(t, s, issued.Secret.Reveal())
		for range 3 {
			require.NoError(t, verify(t, s, create(t, s, keystore.Spec{}).Secret.Reveal()))
		}
		require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
		require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
		require.Len(t, events(t, s, keystore.EventQuery{}), 5)
	}
}

// A panickyBackend panics where it is told to.
type panickyBackend struct {
	backend.Backend
	in atomic.Pointer[string]
}

func (b *panickyBackend) panicIn(method string) {
	if in := b.in.Load(); in != nil && (*in == method || *in == "all") {
		panic("the backend is broken")
	}
}

func (b *panickyBackend) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	b.panicIn("Get")
	return b.Backend.Get(ctx, key)
}

func (b *panickyBackend) Apply(ctx context.Context, c ...backend.Change) error {
	b.panicIn("Apply")
	return b.Backend.Apply(ctx, c...)
}

func (b *panickyBackend) Scan(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	b.panicIn("Scan")
	return b.list(b.Backend.Scan(ctx, from, to))
}

func (b *panickyBackend) ScanDown(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	b.panicIn("ScanDown")
	return b.list(b.Backend.(backend.DownScanner).ScanDown(ctx, from, to))
}

func (b *panickyBackend) Snapshot(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	b.panicIn("Snapshot")
	return b.list(b.Backend.Snapshot(ctx, from, to))
}

func (b *panickyBackend) list(all iter.Seq2[backend.Entry, error]) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		for e, err := range all {
			if !yield(e, err) {
				b.panicIn("after a break")
				return
			}
			b.panicIn("between")
		}
	}
}

func (b *panickyBackend) Check(context.Context) error {
	b.panicIn("Check")
	return nil
}

func TestAPanickyBackendIsUnavailable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &panickyBackend{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, &keystore.Options{
			CacheSize: -1, EventRetention: time.Minute, Hasher: keyring(t, pepper(t, "a", 1),
				hashing.SHA256()),
		})
		require.NoError(t, err)
		issued := create(t, s, keystore.Spec{})
		live := bind(t, s, issued.Secret.Reveal())
		in := "all"
		b.in.Store(&in)
		errs := everyCall(t.Context(), s, issued)
		errs["CheckIntegrity"] = s.CheckIntegrity(t.Context())
		for call, err := range errs {
			require.ErrorIs(t, err, keystore.ErrUnavailable, call)
			require.NotErrorIs(t, err, keystore.ErrDenied, call)
		}
		require.Error(t, live.Err(), "a Revoke that fails cuts all the same")
		require.Zero(t, s.Stats().Live)
		time.Sleep(2 * time.Hour) // the background works on
		in2 := "between"
		b.in.Store(&in2)
		for call, err := range everyCall(t.Context(), s, issued) {
			if call == "List" || call == "Backup" || call == "RevokeAll" {
				require.ErrorIs(t, err, keystore.ErrUnavailable, call)
			}
		}
		in3 := "after a break"
		b.in.Store(&in3)
		for _, err := range s.List(t.Context(), keystore.Query{Limit: 1}) {
			require.NoError(t, err)
		}
		b.in.Store(nil)
		require.NoError(t, s.Revoke(t.Context(), issued.Key.ID, ""))
		require.NoError(t, s.Close())
	})
}

// What the store calls on its caller's goroutine may panic: the caller gets the panic, and the
// store goes on.
func TestAPanicOfACallersFunctionPassesThrough(t *testing.T) {
	needsDirectory(t)
	boom := errors.New("boom")
	for name, call := range map[string]func(s *keystore.Store, id string){
		"Update": func(s *keystore.Store, id string) {
			_, _ = s.Update(context.Background(), id, func(*keystore.Spec) error { panic(boom) })
		},
		"Progress": func(s *keystore.Store, id string) {
			opts := &keystore.RevokeAllOptions{Progress: func(*keystore.Key, int) { panic(boom) }}
			_, _ = s.RevokeAll(context.Background(), keystore.Query{Owner: "first"}, "", opts)
		},
		"Progress of a dry run": func(s *keystore.Store, id string) {
			opts := &keystore.RevokeAllOptions{DryRun: true,
				Progress: func(*keystore.Key, int) { panic(boom) }}
			_, _ = s.RevokeAll(context.Background(), keystore.Query{Owner: "first"}, "", opts)
		},
		"List": func(s *keystore.Store, id string) {
			for range s.List(context.Background(), keystore.Query{}) {
				panic(boom)
			}
		},
		"Events": func(s *keystore.Store, id string) {
			for range s.Events(context.Background(), keystore.EventQuery{}) {
				panic(boom)
			}
		},
		"Backup": func(s *keystore.Store, id string) {
			_ = s.Backup(context.Background(), panickyIO{boom})
		},
		"Restore": func(s *keystore.Store, id string) {
			_ = s.Restore(context.Background(), panickyIO{boom})
		},
		"Restore, in the middle": func(s *keystore.Store, id string) {
			half := []byte(backupOfOne())
			_ = s.Restore(context.Background(), io.MultiReader(bytes.NewReader(half[:len(half)/2]),
				panickyIO{boom}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			for kind, open := range map[string]func() (*keystore.Store, error){
				"in a directory": func() (*keystore.Store, error) {
					return keystore.Open(t.TempDir(), nil)
				},
				"on a backend": func() (*keystore.Store, error) {
					return keystore.New(backendtest.NewMemory(), nil)
				},
			} {
				s, err := open()
				require.NoError(t, err)
				issued := create(t, s, keystore.Spec{Owner: "first"})
				fill(t, s, 100, func(int) keystore.Spec { return keystore.Spec{} })
				require.PanicsWithValue(t, boom, func() { call(s, issued.Key.ID) }, kind)
				_, err = s.Update(t.Context(), issued.Key.ID,
					func(spec *keystore.Spec) error { spec.Owner = "x"; return nil })
				if !errors.Is(err, keystore.ErrKeyRevoked) {
					require.NoError(t, err, kind)
				}
				require.NotEmpty(t, events(t, s, keystore.EventQuery{}))
				restore(t, s, backup(t, s))
				n, err := s.RevokeAll(t.Context(), keystore.Query{Status: keystore.StatusActive},
					"", nil)
				require.NoError(t, err)
				require.GreaterOrEqual(t, n, 100)
				require.NoError(t, s.Close())
			}
		})
	}
}

type panickyIO struct{ err error }

func (p panickyIO) Write([]byte) (int, error) { panic(p.err) }
func (p panickyIO) Read([]byte) (int, error)  { panic(p.err) }
