package changequeue

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

const (
	ordinary  = false
	restricts = true
)

var id = ID{1}

// acquire requires a turn without waiting.
func acquire(t *testing.T, q *Queue, id ID, restricts bool) *Turn {
	t.Helper()
	began := time.Now()
	turn, err := q.Acquire(t.Context(), id, restricts)
	require.NoError(t, err)
	require.Zero(t, time.Since(began))
	return turn
}

// A waiting call runs in a goroutine.
type waiting struct{ done chan error }

func wait(call func() error) *waiting {
	w := &waiting{make(chan error, 1)}
	go func() { w.done <- call() }()
	synctest.Wait()
	return w
}

func (w *waiting) over() bool {
	synctest.Wait()
	return len(w.done) == 1
}

func TestKeysDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q Queue
		head := acquire(t, &q, id, ordinary)
		require.NoError(t, head.Retry(t.Context()))
		revoke := acquire(t, &q, ID{2}, restricts)
		acquire(t, &q, ID{3}, ordinary).Release()
		require.False(t, head.MustYield())
		revoke.Release()
		head.Release()
		require.Empty(t, q.keys, "no change is under way")
	})
}

// Changes that have not lost a race make their attempts at the same time.
func TestFirstAttemptsDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, kind := range []bool{ordinary, restricts} {
			var q Queue
			a, b := acquire(t, &q, id, kind), acquire(t, &q, id, kind)
			require.False(t, a.MustYield())
			require.False(t, b.MustYield())
			a.Release()
			b.Release()
			require.Empty(t, q.keys)
		}
	})
}

// After a lost race, changes proceed one after another, in the order of arrival. Newcomers wait at
// the end of the line.
func TestALineKeepsItsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, kind := range []bool{ordinary, restricts} {
			var q Queue
			a, b := acquire(t, &q, id, kind), acquire(t, &q, id, kind)
			require.NoError(t, a.Retry(t.Context()))
			second := wait(func() error { return b.Retry(t.Context()) })
			var c *Turn
			newcomer := wait(func() (err error) {
				c, err = q.Acquire(t.Context(), id, kind)
				return err
			})
			require.NoError(t, a.Retry(t.Context()), "the head stays the head")
			require.False(t, second.over() || newcomer.over())
			a.Release()
			require.True(t, second.over())
			require.False(t, newcomer.over())
			a.Release() // does nothing
			require.False(t, newcomer.over())
			b.Release()
			require.True(t, newcomer.over())
			c.Release()
			require.Empty(t, q.keys)
		}
	})
}

// A restricting change does not wait for the line of ordinary changes, and holds up its head.
func TestARestrictingChangeGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q Queue
		head, began := acquire(t, &q, id, ordinary), acquire(t, &q, id, ordinary)
		require.NoError(t, head.Retry(t.Context()))
		revoke, disable := acquire(t, &q, id, restricts), acquire(t, &q, id, restricts)
		require.True(t, head.MustYield())
		require.True(t, began.MustYield())
		require.False(t, revoke.MustYield())
		require.NoError(t, disable.Retry(t.Context()))
		first := wait(func() error { return head.Retry(t.Context()) })
		next := wait(func() error { return began.Retry(t.Context()) })
		revoke.Release()
		require.False(t, first.over(), "another restricting change is under way")
		disable.Release()
		require.True(t, first.over())
		require.False(t, next.over())
		head.Release()
		require.True(t, next.over())
		began.Release()
		require.Empty(t, q.keys)
	})
}

// An ordinary change that finds a restricting change under way waits in line.
func TestAnOrdinaryChangeWaitsForARestrictingChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var q Queue
		revoke := acquire(t, &q, id, restricts)
		turns := make([]*Turn, 2)
		var changes []*waiting
		for i := range turns {
			changes = append(changes, wait(func() (err error) {
				turns[i], err = q.Acquire(t.Context(), id, ordinary)
				return err
			}))
		}
		require.False(t, changes[0].over() || changes[1].over())
		revoke.Release()
		require.True(t, changes[0].over())
		require.False(t, changes[1].over())
		turns[0].Release()
		require.True(t, changes[1].over())
		turns[1].Release()
		require.Empty(t, q.keys)
	})
}

// A change whose context ends leaves its line, wherever the change waits.
func TestAChangeLeavesItsLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, kind := range []bool{ordinary, restricts} {
			var q Queue
			head := acquire(t, &q, id, kind)
			require.NoError(t, head.Retry(t.Context()))
			ctx, cancel := context.WithCancelCause(t.Context())
			leaves := wait(func() error { _, err := q.Acquire(ctx, id, kind); return err })
			var last *Turn
			stays := wait(func() (err error) {
				last, err = q.Acquire(t.Context(), id, kind)
				return err
			})
			cancel(errors.New("a reason of the caller"))
			require.ErrorIs(t, <-leaves.done, context.Canceled)
			require.False(t, stays.over())
			head.Release()
			require.True(t, stays.over())
			last.Release()
			require.Empty(t, q.keys)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		var q Queue
		head, revoke := acquire(t, &q, id, ordinary), acquire(t, &q, id, restricts)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.ErrorIs(t, head.Retry(ctx), context.DeadlineExceeded, "a change blocks")
		head.Release()
		revoke.Release()
		require.Empty(t, q.keys)
	})
}

// A store that has one key, and writes the key only at the revision that the writer has read.
type store struct {
	mu       sync.Mutex
	revision int
}

func (s *store) read() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.revision
}

func (s *store) write(expect int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.revision != expect {
		return false
	}
	s.revision++
	return true
}

// Invariant 1: among any number of ordinary changes, a restricting change loses at most one race.
// Invariant 2: an ordinary change loses few races, however many newcomers there are.
func TestLostRacesAreFew(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			const changes = 300
			pause := func() { time.Sleep(time.Duration(rand.Int64N(int64(10 * time.Millisecond)))) }
			var q Queue
			var s store
			// change returns the number of races that the change lost, on any goroutine.
			change := func(kind bool) (lost int) {
				turn, err := q.Acquire(t.Context(), id, kind)
				if err != nil {
					t.Error(err)
					return 0
				}
				defer turn.Release()
				for {
					revision := s.read()
					pause()
					if !turn.MustYield() {
						if pause(); s.write(revision) {
							return lost
						}
						lost++
					}
					if err := turn.Retry(t.Context()); err != nil {
						t.Error(err)
						return lost
					}
				}
			}
			lost := make([]int, changes)
			var all sync.WaitGroup
			for i := range changes {
				all.Go(func() {
					time.Sleep(time.Duration(i) * time.Millisecond)
					lost[i] = change(ordinary)
				})
			}
			time.Sleep(changes / 2 * time.Millisecond)
			require.LessOrEqual(t, change(restricts), 1)
			all.Wait()
			require.Equal(t, changes+1, s.read())
			// Changes that began before the line existed are those of the first 20 ms.
			require.LessOrEqual(t, slices.Max(lost), 20+1)
			require.Empty(t, q.keys)
		})
	}
}
