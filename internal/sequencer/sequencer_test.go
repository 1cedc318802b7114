package sequencer

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// The clock of a synctest bubble stands still unless a test sleeps.
func TestStampsAscend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		first := s.Begin(false)
		require.Equal(t, time.Now().UnixNano(), first)
		require.Equal(t, first+1, s.Begin(true), "at the same time")
		time.Sleep(time.Second)
		require.Equal(t, time.Now().UnixNano(), s.Begin(false))
	})
}

// Later stamps are greater than a stamp that a reader has passed, also in the same tick of the
// clock. A reader with a time in the future moves no stamp.
func TestPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		now := time.Now().UnixNano()
		s.Pass(now + 1)
		require.Equal(t, now, s.Begin(false))
		s.Pass(now)
		require.Equal(t, now+1, s.Begin(false))
		time.Sleep(time.Second)
		now = time.Now().UnixNano()
		s.Pass(now - 1)
		require.Equal(t, now, s.Begin(false))
		time.Sleep(time.Second)
		now = time.Now().UnixNano()
		s.Pass(now)
		require.Equal(t, now+1, s.Begin(false))
	})
}

func TestAddsAreCounted(t *testing.T) {
	var s Sequencer
	adds := func() [2]uint64 {
		started, finished := s.Adds()
		return [2]uint64{started, finished}
	}
	a, other, b := s.Begin(true), s.Begin(false), s.Begin(true)
	require.Equal(t, [2]uint64{2, 0}, adds())
	s.End(a, other)
	require.Equal(t, [2]uint64{2, 1}, adds())
	s.End(a)
	require.Equal(t, [2]uint64{2, 1}, adds(), "a second End of the same stamp does nothing")
	s.End(b)
	require.Equal(t, [2]uint64{2, 2}, adds())
	require.Empty(t, s.pending)
}

// Next waits for a later stamp that is not pending, and passes no stamp that is pending.
func TestNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := s.Next(ended, 0)
		require.ErrorIs(t, err, context.Canceled)

		passed := make(chan int64, 1)
		next := func(after int64) {
			go func() {
				stamp, err := s.Next(t.Context(), after)
				if err != nil {
					t.Error(err)
				}
				passed <- stamp
			}()
			synctest.Wait()
		}
		next(0)
		a, b := s.Begin(false), s.Begin(true)
		time.Sleep(time.Hour)
		require.Empty(t, passed, "nothing has ended")
		c, d := s.Begin(false), s.Begin(false)
		s.End(c)
		require.Equal(t, a-1, <-passed, "earlier stamps are pending")
		next(a - 1)
		require.Empty(t, passed)
		s.End(a)
		require.Equal(t, a, <-passed)
		next(a)
		s.End(b)
		require.Equal(t, c, <-passed, "the stamps ended in another order")
		next(c)
		require.Empty(t, passed, "nothing has ended since")
		s.End(d)
		require.Equal(t, d, <-passed)
		stamp, err := s.Next(ended, a)
		require.NoError(t, err, "there is one already")
		require.Equal(t, d, stamp)
		_, err = s.Next(ended, d)
		require.ErrorIs(t, err, context.Canceled)
		_, err = s.Next(ended, math.MaxInt64)
		require.ErrorIs(t, err, context.Canceled)
	})
}

// What was stored before Resume has ended.
func TestNextAfterResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		stored := time.Now().Add(time.Hour).UnixNano()
		require.NoError(t, s.Resume(func(from, to int64) (int64, error) {
			if from <= stored && stored < to {
				return stored, nil
			}
			return -1, nil
		}))
		stamp, err := s.Next(t.Context(), 0)
		require.NoError(t, err)
		require.Equal(t, stored, stamp)
	})
}

// Wait waits for the stamps that were given before, and for no later stamp.
func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		last, err := s.Wait(t.Context())
		require.NoError(t, err)
		require.Zero(t, last)

		a, b := s.Begin(false), s.Begin(false)
		waited := make(chan int64, 2)
		for range cap(waited) {
			go func() {
				last, err := s.Wait(t.Context())
				if err != nil {
					t.Error(err)
				}
				waited <- last
			}()
		}
		synctest.Wait()
		later := s.Begin(false)
		s.End(b)
		synctest.Wait()
		require.Empty(t, waited, "the first stamp is pending")
		s.End(a)
		synctest.Wait()
		require.Equal(t, b, <-waited)
		require.Equal(t, b, <-waited)

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = s.Wait(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		s.End(later)
		last, err = s.Wait(t.Context())
		require.NoError(t, err)
		require.Equal(t, later, last)
	})
}

// A reader with a cursor reads the events of many writers, while the writers write. The reader
// finds each event once, and in order.
func TestACursorMissesNoEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pause := func() { time.Sleep(time.Duration(rand.IntN(1000))) }
		var s Sequencer
		var mu sync.Mutex
		var written []int64 // the events in storage
		var writers sync.WaitGroup
		for range 20 {
			writers.Go(func() {
				for range 50 {
					stamp := s.Begin(false)
					pause()
					if rand.IntN(10) > 0 { // otherwise the write fails
						mu.Lock()
						written = append(written, stamp)
						mu.Unlock()
					}
					pause()
					s.End(stamp)
				}
			})
		}
		done := make(chan struct{})
		go func() {
			writers.Wait()
			close(done)
		}()
		var read []int64
		cursor := int64(0)
		for ended := false; !ended; {
			select {
			case <-done:
				ended = true // read once more
			default:
			}
			last, err := s.Wait(t.Context())
			require.NoError(t, err)
			mu.Lock()
			found := slices.Clone(written)
			mu.Unlock()
			slices.Sort(found)
			for _, stamp := range found {
				if stamp > cursor && stamp <= last {
					read = append(read, stamp)
				}
			}
			cursor = last
			pause()
		}
		slices.Sort(written)
		require.Equal(t, written, read)
	})
}

func TestResumeContinuesAfterTheLastStamp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now().UnixNano()
		const hour = int64(time.Hour)
		for name, tt := range map[string]struct {
			stored []int64 // ascending
			next   int64
		}{
			"an empty store":          {nil, now},
			"stamps of the past":      {[]int64{1, now - hour}, now},
			"the present":             {[]int64{now}, now + 1},
			"a clock a little behind": {[]int64{1, now - 1, now + 1, now + 2}, now + 3},
			"a clock far behind": {
				[]int64{now + 1, now + 9, now + 1e6*hour}, now + 1e6*hour + 1,
			},
			"the largest stamp of all": {[]int64{now, math.MaxInt64 - 1}, math.MaxInt64},
		} {
			var s Sequencer
			calls := 0
			require.NoError(t, s.Resume(func(from, to int64) (int64, error) {
				calls++
				i, _ := slices.BinarySearch(tt.stored, from)
				if i < len(tt.stored) && tt.stored[i] < to {
					return tt.stored[i], nil
				}
				return -1, nil
			}), name)
			require.Equal(t, tt.next, s.Begin(false), name)
			require.LessOrEqual(t, calls, 64, name)
		}
	})
}

func TestResumeReturnsTheErrorOfStorage(t *testing.T) {
	var s Sequencer
	broken := errors.New("disk on fire")
	err := s.Resume(func(int64, int64) (int64, error) { return -1, broken })
	require.Equal(t, broken, err)
}

// Raise serves a reader in another process: all later stamps are above the floor, and the
// watermark is below every pending stamp.
func TestRaise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		now := time.Now().UnixNano()
		floor := now + int64(time.Hour)
		watermark, last := s.Raise(floor)
		require.Equal(t, floor, watermark)
		require.Equal(t, floor, last)
		require.NoError(t, s.Resume(func(from, to int64) (int64, error) { return -1, nil }))
		first := s.Begin(false)
		require.Equal(t, floor+1, first, "Resume does not go back below the floor")
		second := s.Begin(false)
		watermark, last = s.Raise(floor)
		require.Equal(t, floor, watermark)
		require.Equal(t, second, last)
		s.End(first)
		watermark, _ = s.Raise(0)
		require.Equal(t, first, watermark)
		s.End(second)
		watermark, _ = s.Raise(math.MaxInt64)
		require.Greater(t, s.Begin(false), watermark, "no overflow")
	})
}

// A stamp is above the stamp that BeginAfter names, whatever the clock shows.
func TestBeginAfter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s Sequencer
		now := time.Now().UnixNano()
		require.Equal(t, now, s.BeginAfter(now-1, false))
		require.Equal(t, now+1, s.BeginAfter(0, false))
		require.Equal(t, now+101, s.BeginAfter(now+100, false))
		require.Positive(t, s.BeginAfter(math.MaxInt64, false))
	})
}
