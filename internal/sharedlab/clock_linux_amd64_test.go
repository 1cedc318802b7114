package sharedlab

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var secondsAhead atomic.Int64

// The wall clock moves, forward and back, and the monotonic clock does not.
func TestMoveClock(t *testing.T) { // not parallel: it moves the clock of this process
	if err := moveClock(&secondsAhead); err != nil {
		t.Skip("NOT RUN: this kernel does not let a process move its clock:", err)
	}
	defer secondsAhead.Store(0)
	const moved = 3600
	for _, seconds := range []int64{moved, -moved} {
		secondsAhead.Store(0)
		before := time.Now()
		secondsAhead.Store(seconds)
		after := time.Now()
		wall := after.Round(0).Sub(before.Round(0)) // Round removes the monotonic clock
		require.Equal(t, float64(seconds), (wall - after.Sub(before)).Round(time.Second).Seconds())
		require.Less(t, after.Sub(before), moved*time.Second)
	}
}
