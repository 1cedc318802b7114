package keystore_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// A follower collects what a Follow yields.
type follower struct {
	mu      sync.Mutex // guards all below
	events  []keystore.Event
	corrupt error
	end     error
	done    chan struct{}
}

// follow starts a Follow, and waits until the Follow waits. Before each event, the loop body
// receives from hold, unless hold is nil.
func follow(
	ctx context.Context, s *keystore.Store, q keystore.EventQuery, hold <-chan struct{},
) *follower {
	f := &follower{done: make(chan struct{})}
	go func() {
		defer close(f.done)
		for e, err := range s.Follow(ctx, q) {
			if hold != nil {
				<-hold
			}
			f.mu.Lock()
			switch {
			case err == nil:
				f.events = append(f.events, e)
			case errors.Is(err, keystore.ErrCorrupt):
				f.corrupt = err
			default:
				f.end = err
			}
			f.mu.Unlock()
		}
	}()
	synctest.Wait()
	return f
}

// take returns the events since the last take.
func (f *follower) take() (events []keystore.Event) {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	events, f.events = f.events, nil
	return events
}

// requireEnd requires that the Follow has ended, with an error that errors.Is takes for want, or
// nil.
func (f *follower) requireEnd(t *testing.T, want error) {
	t.Helper()
	synctest.Wait()
	select {
	case <-f.done:
	default:
		require.Fail(t, "Follow has not ended")
	}
	if want == nil {
		require.NoError(t, f.end)
	} else {
		require.ErrorIs(t, f.end, want)
	}
}

func (f *follower) requireWaiting(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case <-f.done:
		require.Fail(t, "Follow has ended", "%v", f.end)
	default:
	}
}

func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		a := create(t, s, keystore.Spec{}).Key.ID
		time.Sleep(time.Second)
		ctx, cancel := context.WithCancelCause(t.Context())
		f := follow(ctx, s, keystore.EventQuery{}, nil)
		require.Equal(t, events(t, s, keystore.EventQuery{}), f.take(), "what has happened already")
		later := follow(ctx, s, keystore.EventQuery{After: time.Now()}, nil)
		for range 3 {
			time.Sleep(time.Hour)
			require.Empty(t, f.take())
			before := time.Now().Add(-1)
			require.NoError(t, s.Disable(keystore.WithActor(ctx, "alice"), a, "r"))
			require.NoError(t, s.Enable(ctx, a))
			create(t, s, keystore.Spec{})
			want := events(t, s, keystore.EventQuery{After: before})
			require.Len(t, want, 3)
			require.Equal(t, want, f.take())
			require.Equal(t, want, later.take())
		}
		f.requireWaiting(t)
		cancel(keystore.ErrRevoked)
		f.requireEnd(t, context.Canceled)
		require.NotErrorIs(t, f.end, keystore.ErrDenied, "the cause is another's")
	})
}

// A clock may show one time for long. A change that follows a Follow in the same tick of the clock
// comes after the time at which the Follow began.
func TestFollowInOneTickOfTheClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		f := follow(t.Context(), s, keystore.EventQuery{After: time.Now()}, nil)
		id := create(t, s, keystore.Spec{}).Key.ID
		got := f.take()
		require.Len(t, got, 1)
		require.Equal(t, id, got[0].KeyID)
		require.NoError(t, s.Close())
	})
}

// Each condition of the query holds for events that come later, too.
func TestFollowSelects(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		a, b := create(t, s, keystore.Spec{}).Key.ID, create(t, s, keystore.Spec{}).Key.ID
		queries := []keystore.EventQuery{
			{KeyID: a}, {Actor: "alice"}, {Action: keystore.ActionDisable},
			{KeyID: b, Actor: "alice"},
		}
		var followers []*follower
		for _, q := range queries {
			followers = append(followers, follow(t.Context(), s, q, nil))
		}
		for _, actor := range []string{"alice", "bob"} {
			ctx := keystore.WithActor(t.Context(), actor)
			for _, id := range []string{a, b} {
				require.NoError(t, s.Disable(ctx, id, ""))
				require.NoError(t, s.Enable(ctx, id))
			}
		}
		for i, q := range queries {
			want := events(t, s, q)
			require.NotEmpty(t, want)
			require.Equal(t, want, followers[i].take(), "%+v", q)
		}
		require.NoError(t, s.Close())
		for _, f := range followers {
			f.requireEnd(t, keystore.ErrClosed)
		}
	})
}

func TestFollowEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, b := withFaults(t, nil)
		id := create(t, s, keystore.Spec{}).Key.ID
		time.Sleep(time.Second)
		start := time.Now()
		limited := follow(t.Context(), s, keystore.EventQuery{Limit: 3}, nil)
		until := follow(t.Context(), s, keystore.EventQuery{Until: start.Add(time.Hour)}, nil)
		past := follow(t.Context(), s, keystore.EventQuery{Until: start.Add(-1)}, nil)
		past.requireEnd(t, nil)
		require.Len(t, past.take(), 1)
		before := follow(t.Context(), s, keystore.EventQuery{Until: start.Add(-time.Hour)}, nil)
		before.requireEnd(t, nil)
		require.Empty(t, before.take())
		empty := follow(t.Context(), s, keystore.EventQuery{After: start.Add(2),
			Until: start.Add(1)}, nil)
		empty.requireEnd(t, nil)
		wrong := follow(t.Context(), s, keystore.EventQuery{KeyID: "x"}, nil)
		wrong.requireEnd(t, keystore.ErrInvalid)

		require.NoError(t, s.Disable(t.Context(), id, ""))
		limited.requireWaiting(t)
		require.NoError(t, s.Enable(t.Context(), id))
		limited.requireEnd(t, nil)
		require.Len(t, limited.take(), 3)

		time.Sleep(time.Hour - time.Since(start))
		until.requireWaiting(t)
		require.NoError(t, s.Disable(t.Context(), id, "")) // at the last moment
		time.Sleep(time.Nanosecond)
		until.requireEnd(t, nil)
		require.Len(t, until.take(), 4)

		open := follow(t.Context(), s, keystore.EventQuery{}, nil)
		failed := error(backend.ErrFailed)
		b.fail.Store(&failed)
		require.Error(t, s.Enable(t.Context(), id))
		open.requireEnd(t, keystore.ErrUnavailable)
		again := follow(t.Context(), s, keystore.EventQuery{}, nil)
		again.requireEnd(t, keystore.ErrUnavailable)
		b.fail.Store(nil)
	})
}

// A countingBackend counts the reads of events.
type countingBackend struct {
	backend.Backend
	scans atomic.Int64
}

func (b *countingBackend) Scan(
	ctx context.Context, from, to []byte,
) iter.Seq2[backend.Entry, error] {
	if len(from) > 0 && from[0] == 'e' {
		b.scans.Add(1)
	}
	return b.Backend.Scan(ctx, from, to)
}

// Between two events, a Follow does nothing.
func TestFollowDoesNotPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &countingBackend{Backend: backendtest.NewMemory()}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		id := create(t, s, keystore.Spec{}).Key.ID
		f := follow(t.Context(), s, keystore.EventQuery{}, nil)
		require.Len(t, f.take(), 1)
		before := b.scans.Load()
		time.Sleep(24 * time.Hour)
		require.Equal(t, before, b.scans.Load())
		require.NoError(t, s.Disable(t.Context(), id, ""))
		require.Len(t, f.take(), 1)
		require.Equal(t, before+1, b.scans.Load())
		require.NoError(t, s.Close())
		f.requireEnd(t, keystore.ErrClosed)
	})
}

// A slow consumer gets every event, and delays no change.
func TestFollowOfASlowConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		create(t, s, keystore.Spec{})
		ctx, cancel := context.WithCancel(t.Context())
		hold := make(chan struct{})
		f := follow(ctx, s, keystore.EventQuery{}, hold)
		for range 1000 {
			create(t, s, keystore.Spec{})
		}
		require.Empty(t, f.take())
		close(hold)
		require.Equal(t, events(t, s, keystore.EventQuery{}), f.take())
		cancel()
		f.requireEnd(t, context.Canceled)
	})
}

// The loop body may call the store, and may end the loop in every way. Nothing is left behind: a
// goroutine that waits would be an error of the bubble.
func TestFollowIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		create(t, s, keystore.Spec{})
		seen := 0
		for _, err := range s.Follow(t.Context(), keystore.EventQuery{}) {
			require.NoError(t, err)
			create(t, s, keystore.Spec{}) // one event makes the next
			if seen++; seen == 10 {
				break
			}
		}
		require.PanicsWithValue(t, "body", func() {
			for range s.Follow(t.Context(), keystore.EventQuery{}) {
				panic("body")
			}
		})
		require.NoError(t, s.Close())
	})
}

// An event that cannot be read is reported, and the Follow continues.
func TestFollowPassesADamagedEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := backendtest.NewMemory()
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		id := create(t, s, keystore.Spec{}).Key.ID
		for e, err := range b.Scan(t.Context(), []byte("e"), []byte("f")) {
			require.NoError(t, err)
			require.NoError(t, b.Apply(t.Context(), backend.Change{Key: e.Key, Value: []byte("?"),
				Expect: 1}))
		}
		f := follow(t.Context(), s, keystore.EventQuery{}, nil)
		require.NoError(t, s.Disable(t.Context(), id, ""))
		require.Len(t, f.take(), 1)
		require.ErrorIs(t, f.corrupt, keystore.ErrCorrupt)
		require.NoError(t, s.Close())
		f.requireEnd(t, keystore.ErrClosed)
	})
}

// A Follow without an end, and Follows that end often and continue after the last event, get each
// event once, in order, while many changes run at the same time.
func TestFollowMissesAndRepeatsNothing(t *testing.T) {
	s := open(t, nil)
	const writers, each = 8, 20
	const total = writers * (1 + 2*each)
	var all sync.WaitGroup
	got := make([][]keystore.Event, 4)
	for i := range got {
		all.Go(func() {
			for q := (keystore.EventQuery{Limit: total}); len(got[i]) < total; {
				if i > 0 {
					q.Limit = min(1+len(got[i])%7, total-len(got[i]))
				}
				for e, err := range s.Follow(t.Context(), q) {
					if err != nil {
						t.Errorf("%v", err)
						return
					}
					got[i] = append(got[i], e)
					q.After = e.At
				}
			}
		})
	}
	for range writers {
		all.Go(func() {
			issued, err := s.Create(t.Context(), keystore.Spec{Name: "n"})
			for range each {
				if err == nil {
					err = errors.Join(s.Disable(t.Context(), issued.Key.ID, ""),
						s.Enable(t.Context(), issued.Key.ID))
				}
			}
			if err != nil {
				t.Errorf("%v", err)
			}
		})
	}
	all.Wait()
	want := events(t, s, keystore.EventQuery{})
	require.Len(t, want, total)
	for i := range got {
		require.Equal(t, want, got[i])
	}
}

// A slowBackend holds back one Apply.
type slowBackend struct {
	backend.Backend
	slow atomic.Bool
	open chan struct{}
}

func (b *slowBackend) Apply(ctx context.Context, changes ...backend.Change) error {
	if b.slow.CompareAndSwap(true, false) {
		<-b.open
	}
	return b.Backend.Apply(ctx, changes...)
}

// An event that comes before others in the order, and is written after the others, is not missed:
// the others wait.
func TestFollowWaitsForTheOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &slowBackend{Backend: backendtest.NewMemory(), open: make(chan struct{})}
		s, err := keystore.New(b, &keystore.Options{Timeout: -1})
		require.NoError(t, err)
		id, other := create(t, s, keystore.Spec{}).Key.ID, create(t, s, keystore.Spec{}).Key.ID
		f := follow(t.Context(), s, keystore.EventQuery{}, nil)
		require.Len(t, f.take(), 2)
		b.slow.Store(true)
		revoked := make(chan error, 1)
		go func() { revoked <- s.Revoke(context.Background(), id, "") }()
		synctest.Wait()
		require.NoError(t, s.Disable(t.Context(), other, ""))
		time.Sleep(time.Hour)
		require.Empty(t, f.take())
		close(b.open)
		require.NoError(t, <-revoked)
		later := f.take()
		require.Len(t, later, 2)
		require.Equal(t, id, later[0].KeyID)
		require.Equal(t, other, later[1].KeyID)
		require.NoError(t, s.Close())
		f.requireEnd(t, keystore.ErrClosed)
	})
}

// Print each change as it is made, and continue after a restart where the last run has ended.
func ExampleStore_Follow() {
	store, done := exampleStore()
	defer done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var seen time.Time // stored by the application
	if _, err := store.Create(ctx, keystore.Spec{Name: "ci"}); err != nil {
		log.Fatal(err)
	}
	for event, err := range store.Follow(ctx, keystore.EventQuery{After: seen}) {
		if errors.Is(err, context.Canceled) {
			break
		}
		if err != nil {
			log.Fatal(err)
		}
		fmt.Println(event.Action, event.Revision)
		seen = event.At
		switch event.Action {
		case keystore.ActionCreate: // as any other caller may do at any time
			err = store.Revoke(ctx, event.KeyID, "leaked")
		case keystore.ActionRevoke:
			cancel()
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	// Output:
	// create 1
	// revoke 2
}
