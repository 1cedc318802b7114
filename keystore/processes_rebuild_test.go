package keystore

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badlink"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// evicted returns a process that was suspended, and that all other processes have removed. No other
// process has the store open.
func (f *fleet) evicted(sleeper *member) {
	other := f.open(nil)
	sleeper.link.Set(badlink.Faults{Stopped: true})
	time.Sleep(4 * testFreshness)
	synctest.Wait()
	require.Equal(f, 1, other.Stats().Processes)
	require.NoError(f, other.Close())
}

// A rebuild holds each Apply of a rebuild of the indexes that writes the state, until the test
// lets the Apply go.
type rebuild struct {
	opened chan *Store
	next   chan struct{}
}

// rebuild opens the store with RebuildIndexes in a new process.
func (f *fleet) rebuild() *rebuild {
	r := &rebuild{make(chan *Store, 1), make(chan struct{})}
	link := badlink.Open(f.shared)
	link.OnApply = func(ctx context.Context, changes []backend.Change,
		next func(context.Context) error) error {
		for _, c := range changes {
			if string(c.Key) == string(stateKey) {
				<-r.next
			}
		}
		return next(ctx)
	}
	go func() {
		s, err := New(link, f.options(&Options{RebuildIndexes: true}))
		if err != nil {
			f.Error(err)
		}
		r.opened <- s
	}()
	synctest.Wait()
	return r
}

// step lets one Apply go.
func (r *rebuild) step() {
	r.next <- struct{}{}
	synctest.Wait()
}

// finish lets all further steps go, and closes the store.
func (r *rebuild) finish(t *testing.T) {
	close(r.next)
	require.NoError(t, (<-r.opened).Close())
}

// A process that was suspended wakes up while another process builds the indexes again. Until the
// indexes are complete, every call that reads an index is refused: RevokeAll must not miss a key.
func TestIndexesAreNotReadDuringARebuild(t *testing.T) {
	fleetTest(t, func(t *testing.T, f *fleet) {
		ctx := t.Context()
		a := f.open(nil)
		var id string
		for range 40 {
			id = a.create(Spec{Owner: "o"}).Key.ID
		}
		require.NoError(t, a.Disable(ctx, id, ""))
		f.evicted(a)
		r := f.rebuild()
		r.step() // the rebuild has begun
		a.link.Set(badlink.Faults{})
		a.awaitFresh()
		r.step()
		require.Zero(t, f.entries(ownerIndexSpace)+f.entries(eventIndexSpace))

		check := func(err error, call string) {
			t.Helper()
			require.ErrorIs(t, err, ErrUnavailable, call)
			require.ErrorContains(t, err, "another process builds the indexes", call)
		}
		n, err := a.RevokeAll(ctx, Query{Owner: "o"}, "", nil)
		check(err, "RevokeAll")
		require.Zero(t, n)
		_, err = a.Count(ctx, Query{Owner: "o"})
		check(err, "Count")
		for _, err := range a.List(ctx, Query{Owner: "o", Limit: 1}) {
			check(err, "List")
		}
		for e, err := range a.Events(ctx, EventQuery{KeyID: id}) {
			if e.Action != ActionCreate { // the record leads to this event
				check(err, "Events")
			}
		}
		check(a.CheckIntegrity(ctx), "CheckIntegrity")
		n, err = a.Count(ctx, Query{})
		require.NoError(t, err, "reads no index")
		require.Equal(t, 40, n)

		r.finish(t)
		n, err = a.RevokeAll(ctx, Query{Owner: "o"}, "", nil)
		require.NoError(t, err)
		require.Equal(t, 40, n)
		require.NoError(t, a.CheckIntegrity(ctx))
	})
}

// A process that was suspended in the middle of a list wakes up during a rebuild, or after the
// rebuild. The process does not use what it reads of the index then.
func TestAListMeetsARebuild(t *testing.T) {
	for _, over := range []bool{false, true} {
		fleetTest(t, func(t *testing.T, f *fleet) {
			const together = maxRoundTrip / 2 // keys, with their last uses
			a := f.open(nil)
			for range 3 * together {
				a.create(Spec{Owner: "o"})
			}
			listed, failed := 0, error(nil)
			for _, err := range a.List(t.Context(), Query{Owner: "o"}) {
				if failed = err; err != nil {
					break
				}
				if listed++; listed < together {
					continue
				}
				if listed > together {
					require.Fail(t, "the list continues")
				}
				f.evicted(a)
				r := f.rebuild()
				r.step()
				r.step()
				if over {
					r.finish(t)
				} else {
					t.Cleanup(func() { r.finish(t) })
				}
				a.link.Set(badlink.Faults{})
			}
			require.ErrorIs(t, failed, ErrUnavailable)
			require.ErrorContains(t, failed, "another process builds the indexes")
		})
	}
}
