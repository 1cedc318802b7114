package keystore_test

import (
	"context"
	"errors"
	"iter"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

func events(t testing.TB, s *keystore.Store, q keystore.EventQuery) (all []keystore.Event) {
	t.Helper()
	for e, err := range s.Events(t.Context(), q) {
		require.NoError(t, err)
		all = append(all, e)
	}
	return all
}

func TestEveryChangeHasItsEvent(t *testing.T) {
	needsDirectory(t)
	dir := t.TempDir()
	s, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	ctx := keystore.WithActor(t.Context(), "alice")
	issued, err := s.Create(ctx, keystore.Spec{Name: "n"})
	require.NoError(t, err)
	id := issued.Key.ID
	_, err = s.Update(ctx, id, func(spec *keystore.Spec) error { spec.Name = "m"; return nil })
	require.NoError(t, err)
	_, err = s.Update(ctx, id, func(*keystore.Spec) error { return nil })
	require.NoError(t, err, "nothing changes, and so nothing is written")
	_, err = s.Rotate(ctx, id, time.Hour)
	require.NoError(t, err)
	require.NoError(t, s.Disable(ctx, id, "holiday"))
	require.NoError(t, s.Disable(ctx, id, "again"))
	require.NoError(t, s.Enable(ctx, id))
	other := create(t, s, keystore.Spec{}).Key.ID // by nobody
	require.NoError(t, s.Revoke(keystore.WithActor(ctx, "bob"), id, "leaked"))
	require.NoError(t, s.Revoke(ctx, id, "again"))
	tooLong := keystore.WithActor(ctx, strings.Repeat("x", 257))
	require.ErrorIs(t, s.Revoke(tooLong, other, ""), keystore.ErrInvalid)
	require.NoError(t, s.Close())

	s, err = keystore.Open(dir, nil)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	type line struct {
		action        keystore.Action
		actor, reason string
		revision      uint64
	}
	var got []line
	var last time.Time
	all := events(t, s, keystore.EventQuery{})
	for _, e := range all {
		require.True(t, e.At.After(last), "in order")
		last = e.At
		if e.KeyID == id {
			got = append(got, line{e.Action, e.Actor, e.Reason, e.Revision})
		}
	}
	require.Equal(t, []line{
		{keystore.ActionCreate, "alice", "", 1},
		{keystore.ActionUpdate, "alice", "", 2},
		{keystore.ActionRotate, "alice", "", 3},
		{keystore.ActionDisable, "alice", "holiday", 4},
		{keystore.ActionEnable, "alice", "", 5},
		{keystore.ActionRevoke, "bob", "leaked", 6},
	}, got)
	require.Len(t, all, 7)

	require.Len(t, events(t, s, keystore.EventQuery{KeyID: other}), 1)
	require.Equal(t, all[3:], events(t, s, keystore.EventQuery{After: all[2].At}), "a cursor")
	require.Equal(t, all[:3], events(t, s, keystore.EventQuery{Until: all[2].At}))
	require.Equal(t, all[1:3], events(t, s, keystore.EventQuery{After: all[0].At, Limit: 2}))
	for _, err := range s.Events(t.Context(), keystore.EventQuery{KeyID: "x"}) {
		require.ErrorIs(t, err, keystore.ErrInvalid)
	}
}

// Times that no stamp can have are before all, or behind.
func TestEventTimesBeyondAllStamps(t *testing.T) {
	s := inMemory(t)
	create(t, s, keystore.Spec{})
	early := []time.Time{
		time.Unix(-1, 0),
		time.Time{}.Add(1),
		time.Date(-9999, 1, 1, 0, 0, 0, 0, time.UTC),
	}
	for _, at := range early {
		require.Len(t, events(t, s, keystore.EventQuery{After: at}), 1, at)
		require.Empty(t, events(t, s, keystore.EventQuery{Until: at}), at)
	}
	for _, year := range []int{2262, 2600, 9999} {
		at := time.Date(year, 12, 31, 0, 0, 0, 0, time.UTC)
		require.Len(t, events(t, s, keystore.EventQuery{Until: at}), 1, at)
		require.Empty(t, events(t, s, keystore.EventQuery{After: at}), at)
	}
}

// An early backend calls before once, when a Scan of the events begins.
type early struct {
	stalling
	before func()
}

func (b *early) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	if f := b.before; f != nil && from[0] == 'e' {
		b.before = nil
		f()
	}
	return b.Backend.Scan(ctx, from, to)
}

// A list until a time in the future does not go further than one without: an event after a change
// that is under way would come before the event of that change, and a cursor would miss the latter.
func TestEventsUntilTheFutureMissNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &early{stalling: stalling{Backend: backendtest.NewMemory()}}
		s, err := keystore.New(b, nil)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		first := create(t, s, keystore.Spec{})
		stall, made := make(chan struct{}), make(chan struct{})
		b.before = func() {
			b.stall = stall
			go func() {
				defer close(made)
				_, _ = s.Create(context.Background(), keystore.Spec{Name: "slow"})
			}()
			synctest.Wait()
			b.stall = nil
			create(t, s, keystore.Spec{Name: "fast"})
		}
		seen := events(t, s, keystore.EventQuery{Until: time.Now().Add(time.Hour)})
		close(stall)
		<-made
		require.Len(t, seen, 1)
		require.Equal(t, first.Key.ID, seen[0].KeyID)
		require.Len(t, events(t, s, keystore.EventQuery{After: seen[0].At}), 2)
	})
}

// Until is the last moment whose events are wanted, to the nanosecond.
func TestEventsUntilAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := inMemory(t)
		var at []time.Time
		for range 3 {
			create(t, s, keystore.Spec{})
			time.Sleep(time.Second)
		}
		for _, e := range events(t, s, keystore.EventQuery{}) {
			at = append(at, e.At)
		}
		for i, at := range at {
			require.Len(t, events(t, s, keystore.EventQuery{Until: at}), i+1)
			require.Len(t, events(t, s, keystore.EventQuery{Until: at.Add(-1)}), i)
			require.Len(t, events(t, s, keystore.EventQuery{Until: at.Add(1)}), i+1)
		}
		require.Empty(t, events(t, s, keystore.EventQuery{After: at[1], Until: at[0]}))
		require.Len(t, events(t, s, keystore.EventQuery{After: at[0], Until: at[1]}), 1)
	})
}

// Nobody is cut for the sake of an actor that cannot be written down: nothing was done.
func TestAnUnusableActorEndsNoContext(t *testing.T) {
	s := inMemory(t)
	issued := create(t, s, keystore.Spec{})
	live := bind(t, s, issued.Secret.Reveal())
	ctx := keystore.WithActor(t.Context(), "not UTF-8: \xff")
	require.ErrorIs(t, s.Revoke(ctx, issued.Key.ID, ""), keystore.ErrInvalid)
	require.ErrorIs(t, s.Disable(ctx, issued.Key.ID, ""), keystore.ErrInvalid)
	_, err := s.RevokeAll(ctx, keystore.Query{}, "", &keystore.RevokeAllOptions{All: true})
	require.ErrorIs(t, err, keystore.ErrInvalid)
	require.NoError(t, verify(t, s, issued.Secret.Reveal()))
	require.NoError(t, live.Err())
}

// Each of many changes at once has one event, and the revisions of a key are those of its events.
func TestEventsOfConcurrentChanges(t *testing.T) {
	s := open(t, nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			issued, err := s.Create(t.Context(), keystore.Spec{Name: "n"})
			if err != nil {
				return
			}
			for range 10 {
				_ = s.Disable(t.Context(), issued.Key.ID, "")
				_ = s.Enable(t.Context(), issued.Key.ID)
			}
		})
	}
	wg.Wait()
	revisions := make(map[string]uint64)
	for _, e := range events(t, s, keystore.EventQuery{}) {
		revisions[e.KeyID]++
		require.Equal(t, revisions[e.KeyID], e.Revision, "in order, and none twice")
	}
	require.Len(t, revisions, 8)
	for key, err := range s.List(t.Context(), keystore.Query{}) {
		require.NoError(t, err)
		require.Equal(t, key.Revision, revisions[key.ID])
		require.EqualValues(t, 21, key.Revision)
	}
}

// A change that fails leaves neither itself nor an event.
func TestFailedChangeHasNoEvent(t *testing.T) {
	s, b := withFaults(t, nil)
	issued := create(t, s, keystore.Spec{})
	broken := errors.New("disk on fire")
	b.fail.Store(&broken)
	require.ErrorIs(t, s.Disable(t.Context(), issued.Key.ID, ""), keystore.ErrUnavailable)
	_, err := s.Create(t.Context(), keystore.Spec{Name: "n"})
	require.ErrorIs(t, err, keystore.ErrUnavailable)
	b.fail.Store(nil)
	require.Len(t, events(t, s, keystore.EventQuery{}), 1)
	key, err := s.Get(t.Context(), issued.Key.ID)
	require.NoError(t, err)
	require.EqualValues(t, 1, key.Revision)
}

func TestEventRetention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opts := &keystore.Options{EventRetention: 24 * time.Hour}
		s, err := keystore.New(backendtest.NewMemory(), opts)
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		old := create(t, s, keystore.Spec{})
		time.Sleep(23 * time.Hour)
		fresh := create(t, s, keystore.Spec{})
		require.Len(t, events(t, s, keystore.EventQuery{}), 2)
		time.Sleep(3 * time.Hour)
		synctest.Wait()
		left := events(t, s, keystore.EventQuery{})
		require.Len(t, left, 1)
		require.Equal(t, fresh.Key.ID, left[0].KeyID)
		_, err = s.Get(context.Background(), old.Key.ID)
		require.NoError(t, err, "the key is not its event")
	})
}
