package keystore_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

var races = flag.Int("races", 10_000, "how many times binds race what ends their key")

func verify(t testing.TB, s *keystore.Store, token string) error {
	t.Helper()
	_, err := s.Verify(t.Context(), token)
	return err
}

func bind(t testing.TB, s *keystore.Store, token string) context.Context {
	t.Helper()
	ctx, _, release, err := parts(s.Bind(t.Context(), token))
	require.NoError(t, err)
	t.Cleanup(release)
	return ctx
}

func TestDisableAndEnable(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	issued := create(t, s, keystore.Spec{})
	id, token := issued.Key.ID, issued.Secret.Reveal()
	require.NoError(t, s.Enable(t.Context(), id), "it is already")
	live := bind(t, s, token)

	require.NoError(t, s.Disable(t.Context(), id, "holiday"))
	require.ErrorIs(t, context.Cause(live), keystore.ErrDisabled)
	require.NoError(t, s.Disable(t.Context(), id, "again"))
	require.ErrorIs(t, verify(t, s, token), keystore.ErrDisabled)
	_, err = s.Bind(t.Context(), token)
	require.ErrorIs(t, err, keystore.ErrDisabled)

	require.NoError(t, s.Close())
	s, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	defer s.Close()
	require.ErrorIs(t, verify(t, s, token), keystore.ErrDisabled)
	key, err := s.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, keystore.StatusDisabled, key.Status())
	require.Equal(t, "holiday", key.DisableReason)
	require.False(t, key.DisabledAt.IsZero())
	for key, err := range s.List(t.Context(), keystore.Query{Status: keystore.StatusDisabled}) {
		require.NoError(t, err)
		require.Equal(t, id, key.ID)
	}

	require.NoError(t, s.Enable(t.Context(), id))
	require.NoError(t, verify(t, s, token))
	live = bind(t, s, token)
	key, err = s.Get(t.Context(), id)
	require.NoError(t, err)
	require.True(t, key.DisabledAt.IsZero())
	require.Empty(t, key.DisableReason)
	require.EqualValues(t, 3, key.Revision)

	// A disabled key can be revoked, and is not disabled then.
	require.NoError(t, s.Disable(t.Context(), id, ""))
	require.NoError(t, s.Revoke(t.Context(), id, ""))
	require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked)
	require.Error(t, live.Err())
}

func TestUpdate(t *testing.T) {
	s := open(t, nil)
	expires := time.Now().Add(time.Hour).UTC()
	issued := create(t, s, keystore.Spec{Name: "old", Owner: "a", Scopes: []string{"read", "write"},
		Metadata: map[string]string{"k": "v"}, ExpiresAt: expires})
	id, token := issued.Key.ID, issued.Secret.Reveal()
	require.NoError(t, verify(t, s, token))
	live := bind(t, s, token)

	key, err := s.Update(t.Context(), id, func(spec *keystore.Spec) error {
		require.Equal(t, keystore.Spec{Name: "old", Owner: "a", Scopes: []string{"read", "write"},
			Metadata: map[string]string{"k": "v"}, ExpiresAt: expires}, *spec)
		spec.Name, spec.Owner, spec.Metadata = "new", "b", map[string]string{"l": "w"}
		spec.Scopes = append(spec.Scopes, "admin")
		spec.ExpiresAt = expires.Add(time.Hour)
		return nil
	})
	require.NoError(t, err)
	require.EqualValues(t, 2, key.Revision)
	require.NoError(t, live.Err(), "a change that widens ends nothing")
	got, err := s.Verify(t.Context(), token)
	require.NoError(t, err)
	require.Equal(t, key, got, "it is in force")
	require.Equal(t, []string{"read", "write", "admin"}, got.Scopes())
	require.Equal(t, "new", got.Name)

	key, err = s.Update(t.Context(), id, func(*keystore.Spec) error { return nil })
	require.NoError(t, err)
	require.EqualValues(t, 2, key.Revision, "nothing changed")

	for name, narrow := range map[string]func(*keystore.Spec) error{
		"a scope less": func(spec *keystore.Spec) error {
			spec.Scopes = spec.Scopes[1:]
			return nil
		},
		"an earlier expiry": func(spec *keystore.Spec) error {
			spec.ExpiresAt = expires
			return nil
		},
	} {
		live := bind(t, s, token)
		_, err = s.Update(t.Context(), id, narrow)
		require.NoError(t, err)
		require.ErrorIs(t, context.Cause(live), keystore.ErrNarrowed, name)
	}
	require.NoError(t, verify(t, s, token))
}

func TestUpdateRefuses(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{Name: "n"})
	boom := errors.New("boom")
	for name, tt := range map[string]struct {
		change func(*keystore.Spec) error
		want   error
	}{
		"nothing":       {nil, keystore.ErrInvalid},
		"its own error": {func(*keystore.Spec) error { return boom }, boom},
		"an empty name": {func(spec *keystore.Spec) error { spec.Name = ""; return nil },
			keystore.ErrInvalid},
		"a bad scope": {func(spec *keystore.Spec) error {
			spec.Scopes = []string{"a*"}
			return nil
		}, keystore.ErrInvalid},
		"an expiry in the past": {func(spec *keystore.Spec) error {
			spec.ExpiresAt = time.Now()
			return nil
		}, keystore.ErrInvalid},
		"an expiry in 1970": {func(spec *keystore.Spec) error {
			spec.ExpiresAt = time.Unix(0, 0)
			return nil
		}, keystore.ErrInvalid},
		"metadata beyond limits": {func(spec *keystore.Spec) error {
			spec.Metadata = map[string]string{"k": strings.Repeat("x", 20<<10)}
			return nil
		}, keystore.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := s.Update(t.Context(), issued.Key.ID, tt.change)
			require.ErrorIs(t, err, tt.want)
			require.Nil(t, key)
		})
	}
	key, err := s.Get(t.Context(), issued.Key.ID)
	require.NoError(t, err)
	require.EqualValues(t, 1, key.Revision)
}

// An expired key can be given another name, and a later expiry.
func TestUpdateOfAnExpiredKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		issued := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Minute)})
		time.Sleep(time.Hour)
		_, err := s.Update(t.Context(), issued.Key.ID,
			func(spec *keystore.Spec) error { spec.Name = "old"; return nil })
		require.NoError(t, err)
		require.ErrorIs(t, verify(t, s, issued.Secret.Reveal()), keystore.ErrExpired)
		_, err = s.Update(t.Context(), issued.Key.ID, func(spec *keystore.Spec) error {
			spec.ExpiresAt = time.Now().Add(time.Minute)
			return nil
		})
		require.NoError(t, err)
		require.NoError(t, verify(t, s, issued.Secret.Reveal()))
	})
}

// The largest key that Create makes, to the byte, can still be changed in every way, which makes it
// larger yet.
func TestTheLargestKeyCanBeChanged(t *testing.T) {
	s := inMemory(t)
	other := create(t, s, keystore.Spec{})
	size, step := 0, 16<<10
	spec := func(size int) keystore.Spec {
		return keystore.Spec{Name: "n", Metadata: map[string]string{"m": strings.Repeat("x", size)}}
	}
	for ; step > 0; step /= 2 {
		if _, err := s.Create(t.Context(), spec(size+step)); err == nil {
			size += step
		} else {
			require.ErrorIs(t, err, keystore.ErrInvalid)
		}
	}
	issued := create(t, s, spec(size))
	id, token := issued.Key.ID, issued.Secret.Reveal()
	require.NoError(t, s.Disable(t.Context(), id, strings.Repeat("r", 1024)))
	require.NoError(t, s.Enable(t.Context(), id))
	rotated, err := s.Rotate(t.Context(), id, time.Hour)
	require.NoError(t, err)
	update := func(change func(*keystore.Spec)) error {
		_, err := s.Update(t.Context(), id,
			func(spec *keystore.Spec) error { change(spec); return nil })
		return err
	}
	require.ErrorIs(t, update(func(spec *keystore.Spec) { spec.Owner = "o" }), keystore.ErrInvalid)
	require.NoError(t, update(func(spec *keystore.Spec) {
		spec.Metadata["m"] = spec.Metadata["m"][1:]
	}), "it need not fit at once")
	query, all := keystore.Query{Cursor: other.Key.ID}, &keystore.RevokeAllOptions{All: true}
	n, err := s.RevokeAll(t.Context(), query, strings.Repeat("r", 1024), all)
	require.NoError(t, err)
	require.Greater(t, n, 1)
	require.NoError(t, s.Revoke(t.Context(), id, ""))
	require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked)
	require.ErrorIs(t, verify(t, s, rotated.Secret.Reveal()), keystore.ErrRevoked)
	require.NoError(t, verify(t, s, other.Secret.Reveal()))
}

// Every update of many at once is made, none on top of an old state.
func TestConcurrentUpdates(t *testing.T) {
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{Metadata: map[string]string{}})
	const writers, each = 4, 10
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for n := range each {
				for {
					_, err := s.Update(t.Context(), issued.Key.ID, func(spec *keystore.Spec) error {
						spec.Metadata[fmt.Sprint(w, "-", n)] = "x"
						return nil
					})
					if err == nil {
						break
					}
					if !errors.Is(err, keystore.ErrUnavailable) { // contention
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	key, err := s.Verify(t.Context(), issued.Secret.Reveal())
	require.NoError(t, err)
	require.Len(t, key.Metadata(), writers*each)
	require.EqualValues(t, 1+writers*each, key.Revision)
}

func TestRotateWithGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		first := create(t, s, keystore.Spec{Scopes: []string{"a"}})
		old := first.Secret.Reveal()
		require.NoError(t, verify(t, s, old))
		oldLive := bind(t, s, old)

		second, err := s.Rotate(t.Context(), first.Key.ID, time.Hour)
		require.NoError(t, err)
		require.Equal(t, first.Key.ID, second.Key.ID)
		require.Equal(t, first.Key.Scopes(), second.Key.Scopes())
		require.True(t, second.Key.PreviousUntil.Equal(time.Now().Add(time.Hour)))
		token := second.Secret.Reveal()
		newLive, oldLater := bind(t, s, token), bind(t, s, old)

		time.Sleep(time.Hour - time.Nanosecond)
		synctest.Wait()
		for range 2 {
			require.NoError(t, verify(t, s, old), "to the instant")
			require.NoError(t, verify(t, s, token))
		}
		require.NoError(t, oldLive.Err())
		require.NoError(t, oldLater.Err())
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		require.ErrorIs(t, verify(t, s, old), keystore.ErrExpired)
		require.NoError(t, verify(t, s, token))
		require.ErrorIs(t, context.Cause(oldLive), keystore.ErrExpired)
		require.ErrorIs(t, context.Cause(oldLater), keystore.ErrExpired)
		require.NoError(t, newLive.Err(), "streams of the new secret stay")
		require.Equal(t, 1, s.Stats().Live)
	})
}

func TestRotateWithoutGrace(t *testing.T) {
	s := open(t, nil)
	first := create(t, s, keystore.Spec{})
	live := bind(t, s, first.Secret.Reveal())
	second, err := s.Rotate(t.Context(), first.Key.ID, 0)
	require.NoError(t, err)
	require.ErrorIs(t, context.Cause(live), keystore.ErrRevoked)
	require.ErrorIs(t, verify(t, s, first.Secret.Reveal()), keystore.ErrUnknown)
	require.NoError(t, verify(t, s, second.Secret.Reveal()))
	require.True(t, second.Key.PreviousUntil.IsZero())
}

// A key has two secrets at most.
func TestRotateDuringAGrace(t *testing.T) {
	s := open(t, nil)
	first := create(t, s, keystore.Spec{})
	firstLive := bind(t, s, first.Secret.Reveal())
	second, err := s.Rotate(t.Context(), first.Key.ID, time.Hour)
	require.NoError(t, err)
	secondLive := bind(t, s, second.Secret.Reveal())
	require.NoError(t, firstLive.Err())
	third, err := s.Rotate(t.Context(), first.Key.ID, time.Hour)
	require.NoError(t, err)
	require.ErrorIs(t, context.Cause(firstLive), keystore.ErrRevoked)
	require.NoError(t, secondLive.Err())
	require.ErrorIs(t, verify(t, s, first.Secret.Reveal()), keystore.ErrUnknown)
	require.NoError(t, verify(t, s, second.Secret.Reveal()))
	require.NoError(t, verify(t, s, third.Secret.Reveal()))

	require.NoError(t, s.Revoke(t.Context(), first.Key.ID, ""))
	for _, token := range []string{second.Secret.Reveal(), third.Secret.Reveal()} {
		require.ErrorIs(t, verify(t, s, token), keystore.ErrRevoked)
	}
	require.ErrorIs(t, context.Cause(secondLive), keystore.ErrRevoked)
}

// A grace does not outlast the key.
func TestGraceEndsWithTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		first := create(t, s, keystore.Spec{ExpiresAt: time.Now().Add(time.Minute)})
		_, err := s.Rotate(t.Context(), first.Key.ID, time.Hour)
		require.NoError(t, err)
		live := bind(t, s, first.Secret.Reveal())
		time.Sleep(time.Minute)
		synctest.Wait()
		require.ErrorIs(t, verify(t, s, first.Secret.Reveal()), keystore.ErrExpired)
		require.ErrorIs(t, context.Cause(live), keystore.ErrExpired)
	})
}

// 64 clients follow a key through 100 rotations: no live secret is refused, and no dead one is let
// in.
func TestRotationUnderLoad(t *testing.T) {
	const clients, rotations = 64, 100
	s := open(t, nil)
	issued := create(t, s, keystore.Spec{})
	type secrets struct{ dead, current string }
	var now atomic.Pointer[secrets]
	now.Store(&secrets{current: issued.Secret.Reveal()})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var calls, rotated atomic.Int64 // rotated counts as they begin
	for range clients {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				// Read in this order: before the rotation after begin, the current secret is the
				// newest or the one before.
				begin := rotated.Load()
				seen := now.Load()
				if err := verify(t, s, seen.current); err != nil && rotated.Load() == begin {
					t.Errorf("a live secret was refused: %v", err)
					return
				}
				if seen.dead != "" && verify(t, s, seen.dead) == nil {
					t.Error("a dead secret was let in")
					return
				}
				calls.Add(1)
			}
		})
	}
	previous, current := "", issued.Secret.Reveal()
	for n := range rotations {
		for calls.Load() < int64(n) && !t.Failed() {
			runtime.Gosched() // on a busy machine, the clients run late
		}
		rotated.Add(1)
		next, err := s.Rotate(t.Context(), issued.Key.ID, time.Hour)
		require.NoError(t, err)
		now.Store(&secrets{dead: previous, current: next.Secret.Reveal()})
		previous, current = current, next.Secret.Reveal()
	}
	close(stop)
	wg.Wait()
	require.Greater(t, calls.Load(), int64(clients))
}

func TestRevokedKeyRefusesAllButGet(t *testing.T) {
	s := open(t, nil)
	id := create(t, s, keystore.Spec{}).Key.ID
	unknown := create(t, open(t, nil), keystore.Spec{}).Key.ID
	calls := func(id string) map[string]error {
		_, update := s.Update(t.Context(), id,
			func(spec *keystore.Spec) error { spec.Name = "x"; return nil })
		_, rotate := s.Rotate(t.Context(), id, time.Hour)
		return map[string]error{
			"Disable": s.Disable(t.Context(), id, ""), "Enable": s.Enable(t.Context(), id),
			"Update": update, "Rotate": rotate,
		}
	}
	for name, err := range calls(unknown) {
		require.ErrorIs(t, err, keystore.ErrNotFound, name)
	}
	for name, err := range calls("nonsense") {
		require.ErrorIs(t, err, keystore.ErrInvalid, name)
	}
	require.NoError(t, s.Revoke(t.Context(), id, "gone"))
	for name, err := range calls(id) {
		require.ErrorIs(t, err, keystore.ErrKeyRevoked, name)
	}
	key, err := s.Get(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, "gone", key.RevokeReason)
	require.EqualValues(t, 2, key.Revision)
	for _, grace := range []time.Duration{-1, 1<<63 - 1} {
		_, err = s.Rotate(t.Context(), id, grace)
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
}

// Binds race whatever ends them, on many keys at a time: none is left alive once the call has
// returned, or at the expiry, and none is left in the registry. A binder goes on until the end is
// through, so that there is always a bind under way while the end is in each of its phases.
func TestBindRacesItsEnd(t *testing.T) {
	needsDirectory(t)
	const share = 10 // one race in so many is on Badger
	for name, tt := range map[string]struct {
		open    func() (*keystore.Store, error)
		races   int
		workers int
	}{
		"in memory": {func() (*keystore.Store, error) {
			return keystore.New(backendtest.NewMemory(), nil)
		}, *races - *races/share, 4},
		// As many as make good use of a commit that they share.
		"Badger": {func() (*keystore.Store, error) { return keystore.Open(t.TempDir(), nil) },
			*races / share, 32},
	} {
		t.Run(name, func(t *testing.T) {
			var raced, refused atomic.Int64
			// for each store, because neither backend gives memory or space back
			const batch = 20_000
			for left := tt.races; left > 0; left -= batch {
				s, err := tt.open()
				require.NoError(t, err)
				var next atomic.Int64
				var wg sync.WaitGroup
				for range tt.workers {
					wg.Go(func() {
						for n := next.Add(1) - 1; n < int64(min(left,
							batch)) && !t.Failed(); n = next.Add(1) - 1 {
							r := bindRace{s: s, end: ends[n%int64(len(ends))]}
							if err := r.run(t.Context()); err != nil {
								t.Error(err)
							}
							raced.Add(int64(r.raced))
							refused.Add(int64(r.refused))
						}
					})
				}
				wg.Wait()
				// A context that time has ended is cancelled first, and forgotten then.
				require.Eventually(t, func() bool { return s.Stats().Live == 0 }, time.Minute,
					time.Millisecond, "the registry holds what has ended")
				require.NoError(t, s.Close())
			}
			require.NotZero(t, raced.Load(), "no bind raced its end")
			figures.Record(t, "%d races; of the binds that began while the end was under way, "+
				"%d were admitted and %d refused: 0 immortal sessions",
				tt.races, raced.Load(), refused.Load())
		})
	}
}

// A way to end a live context of a key that has the scope a. By itself is when time does it: soon
// after end has returned.
type end struct {
	byItself bool
	end      func(ctx context.Context, s *keystore.Store, id string) error
}

var ends = []end{
	{end: func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Revoke(ctx, id, "")
	}},
	{end: func(ctx context.Context, s *keystore.Store, id string) error {
		return s.Disable(ctx, id, "")
	}},
	{end: func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Rotate(ctx, id, 0)
		return err
	}},
	{end: func(ctx context.Context, s *keystore.Store, id string) error {
		_, err := s.Update(ctx, id,
			func(spec *keystore.Spec) error { spec.Scopes = nil; return nil })
		return err
	}},
	{true, func(ctx context.Context, s *keystore.Store, id string) error {
		var until time.Time
		for lifetime := time.Millisecond; ; lifetime *= 2 {
			_, err := s.Update(ctx, id, func(spec *keystore.Spec) error {
				until = time.Now().Add(lifetime)
				spec.ExpiresAt = until
				return nil
			})
			if err == nil {
				break
			}
			if !errors.Is(err, keystore.ErrInvalid) { // it was in the past by then
				return err
			}
		}
		time.Sleep(time.Until(until))
		return nil
	}},
}

// A bindRace is one key, which one goroutine binds while another ends it.
type bindRace struct {
	s   *keystore.Store
	end end

	bounds         []context.Context // not released by their owner
	raced, refused int               // binds that began after the end did
}

func (r *bindRace) run(ctx context.Context) error {
	issued, err := r.s.Create(ctx, keystore.Spec{Name: "test", Scopes: []string{"a"}})
	if err != nil {
		return err
	}
	var begun, over atomic.Bool
	started, bound := make(chan struct{}), make(chan error, 1)
	go func() { bound <- r.bind(ctx, issued.Secret.Reveal(), started, &begun, &over) }()
	<-started
	begun.Store(true)
	err = r.end.end(ctx, r.s, issued.Key.ID)
	over.Store(true)
	if err := errors.Join(err, <-bound); err != nil {
		return err
	}
	for _, ctx := range r.bounds {
		if r.end.byItself {
			select {
			case <-ctx.Done():
			case <-time.After(time.Minute):
			}
		}
		if ctx.Err() == nil {
			return fmt.Errorf("a context outlived what ended its key, %s", issued.Key.ID)
		}
	}
	return nil
}

// bind binds again and again, and a last time after over was set.
func (r *bindRace) bind(
	ctx context.Context, token string, started chan<- struct{}, begun, over *atomic.Bool,
) error {
	kept := 0
	for n := 0; ; n++ {
		late, last := begun.Load(), over.Load()
		bound, key, release, err := parts(r.s.Bind(ctx, token))
		if n == 0 {
			close(started)
		}
		switch {
		case errors.Is(err, keystore.ErrDenied) || errors.Is(err, keystore.ErrNarrowed):
			if late {
				r.refused++
			}
		case err != nil:
			return err
		case !key.HasScope("a"):
			release() // as the end has left it
		case last:
			release()
			return fmt.Errorf("a bind was admitted after the end of %s had returned", key.ID)
		default:
			if late {
				r.raced++
			}
			if kept++; kept <= 100 {
				r.bounds = append(r.bounds, bound)
			} else {
				release()
			}
		}
		if last {
			return nil
		}
		runtime.Gosched()
	}
}
