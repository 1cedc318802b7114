package interceptor

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
)

// Clients that are refused at the same moment receive different delays.
func TestUnavailableDelaysDiffer(t *testing.T) {
	delays := make(map[time.Duration]bool)
	for range 1000 {
		for _, detail := range unavailableStatus().Details() {
			if retry, ok := detail.(*errdetails.RetryInfo); ok {
				delays[retry.RetryDelay.AsDuration()] = true
			}
		}
	}
	require.Greater(t, len(delays), 8)
	for delay := range delays {
		require.GreaterOrEqual(t, delay, 500*time.Millisecond)
		require.LessOrEqual(t, delay, 1500*time.Millisecond)
	}
}
