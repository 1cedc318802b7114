package keystore

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// damagedEvents returns a store and its backend, in which every second event cannot be read.
func damagedEvents(t *testing.T, keys int) (*Store, backend.Backend) {
	t.Helper()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	for range keys {
		issued, err := s.Create(t.Context(), Spec{Name: "n", Owner: "o"})
		require.NoError(t, err)
		for i := range 3 {
			change := s.Enable
			if i%2 == 0 {
				change = func(ctx context.Context, id string) error { return s.Disable(ctx, id, "") }
			}
			require.NoError(t, change(t.Context(), issued.Key.ID))
		}
	}
	n := 0
	for _, e := range sorted(read(t, b, eventSpace)) {
		if n++; n%2 == 0 {
			require.NoError(t, b.Apply(t.Context(), backend.Change{Key: e.Key,
				Value: []byte("nonsense"), Expect: e.Revision}))
		}
	}
	return s, b
}

// sorted returns entries in the order of their keys.
func sorted(all map[string]backend.Entry) (entries []backend.Entry) {
	for _, key := range slices.Sorted(maps.Keys(all)) {
		entries = append(entries, all[key])
	}
	return entries
}

// A damaged event does not name its key. A sweep removes the event all the same, together with the
// index entry that leads to the event, and removes no other entry.
func TestSweepRemovesDamagedEvents(t *testing.T) {
	for _, keys := range []int{1, 40, maxDamaged} {
		t.Run(fmt.Sprint(keys), func(t *testing.T) {
			s, b := damagedEvents(t, keys)
			defer s.Close()
			events := sorted(read(t, b, eventSpace))
			middle := stampOf(events[len(events)/2].Key)
			last, err := s.sweep(t.Context(), eventKey(0), middle)
			require.NoError(t, err)
			if keys > 1 {
				require.NotNil(t, last)
			}
			rest := sorted(read(t, b, eventSpace))
			require.Equal(t, events[len(events)/2:], rest)
			index := make(map[int64]bool)
			for _, e := range read(t, b, eventIndexSpace) {
				_, stamp, err := parseEventIndexKey(e)
				require.NoError(t, err)
				require.GreaterOrEqual(t, stamp, middle)
				index[stamp] = true
			}
			for _, e := range rest {
				if event, err := parseEvent(e); err != nil ||
					event.Action != record.Action_ACTION_CREATE {
					require.True(t, index[stampOf(e.Key)])
				}
			}
			sweep(t, s, time.Now())
			require.Empty(t, read(t, b, eventSpace, eventIndexSpace))
			require.NoError(t, s.CheckIntegrity(t.Context()))
			requireIndexed(t, b)
		})
	}
}

// A sweep is killed before or after any of its writes. No index entry is left behind, no event
// counts as lost, and the next sweep removes the rest.
func TestSweepIsKilledAtEachStep(t *testing.T) {
	damaged, b := damagedEvents(t, 100)
	require.NoError(t, damaged.Close())
	for _, made := range []bool{false, true} {
		for kill, done := 1, false; !done; kill++ {
			c := copyOf(t, b)
			n, armed := 0, false
			failing := &stepped{Backend: c}
			failing.before = func([]backend.Change) error {
				if !armed {
					return nil
				}
				if n++; n == kill && !made || n > kill {
					return errKilled
				}
				return nil
			}
			failing.after = func() error {
				if armed && n == kill && made {
					return errKilled
				}
				return nil
			}
			s := newStoreOn(t, failing)
			armed = true
			_, err := s.sweep(t.Context(), eventKey(0), time.Now().UnixNano())
			if done = err == nil; done {
				require.Greater(t, kill, 4)
			} else {
				require.ErrorIs(t, err, errKilled)
			}
			armed = false
			events, index := read(t, c, eventSpace), read(t, c, eventIndexSpace)
			for _, e := range index {
				_, stamp, err := parseEventIndexKey(e)
				require.NoError(t, err)
				require.Contains(t, events, string(eventKey(stamp)))
			}
			check := &integrityCheck{store: s}
			require.NoError(t, check.readSince(t.Context()))
			require.NoError(t, check.findCreations(t.Context()))
			require.Empty(t, check.damage)
			sweep(t, s, time.Now())
			require.Empty(t, read(t, c, eventSpace, eventIndexSpace))
			require.NoError(t, s.CheckIntegrity(t.Context()))
			require.NoError(t, s.Close())
		}
	}
}

// The swept mark only rises. A damaged mark is reported, and the next sweep replaces the mark by a
// mark that is not lower.
func TestSweptMark(t *testing.T) {
	ctx := t.Context()
	b := backendtest.NewMemory()
	s := newStoreOn(t, b)
	defer s.Close()
	mark := func() int64 {
		t.Helper()
		stamp, _, err := s.sweptMark(ctx)
		require.NoError(t, err)
		return stamp
	}
	require.Zero(t, mark())
	sweep(t, s, time.Now())
	require.Zero(t, mark(), "a sweep without events writes nothing")
	_, err := s.Create(ctx, Spec{Name: "n"})
	require.NoError(t, err)
	end := time.Now()
	sweep(t, s, end)
	require.Equal(t, end.UnixNano(), mark())
	require.NoError(t, s.markSwept(ctx, end.UnixNano()-1))
	require.Equal(t, end.UnixNano(), mark())

	e, err := b.Get(ctx, sweptKey)
	require.NoError(t, err)
	require.NoError(t, b.Apply(ctx, backend.Change{Key: sweptKey, Value: []byte("x"),
		Expect: e.Revision}))
	err = s.CheckIntegrity(ctx)
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorContains(t, err, "does not hold the swept mark")
	require.NoError(t, s.markSwept(ctx, 1))
	require.GreaterOrEqual(t, mark(), end.UnixNano())
	require.NoError(t, s.CheckIntegrity(ctx))
}
