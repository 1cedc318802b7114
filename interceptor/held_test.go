package interceptor

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// The timers of refused calls are released at the deadlines of the calls.
func TestHeldTimers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := new(heldTimers)
		within := func(d time.Duration) context.Context {
			ctx, cancel := context.WithTimeout(t.Context(), d)
			t.Cleanup(cancel)
			return ctx
		}
		for range maxHeld - 1 {
			held.add(within(time.Minute))
		}
		for range 10 {
			held.add(t.Context()) // no deadline, nothing held
		}
		require.False(t, held.atLimit(within(time.Hour)))
		held.add(within(time.Hour))
		require.True(t, held.atLimit(within(time.Second)))
		require.False(t, held.atLimit(t.Context()))
		time.Sleep(time.Minute)
		synctest.Wait()
		require.False(t, held.atLimit(within(time.Second)))
		require.EqualValues(t, 1, held.n.Load())
		time.Sleep(time.Hour)
		synctest.Wait()
		require.Zero(t, held.n.Load())
	})
}
