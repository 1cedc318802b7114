package keystore

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestReason(t *testing.T) {
	for _, r := range reasons[:reasonExhausted] {
		require.Equal(t, r.word, Reason(r.err))
		require.Equal(t, r.word, Reason(fmt.Errorf("a call: %w", r.err)))
	}
	require.Equal(t, "", Reason(nil))
	require.Equal(t, "rate_limited",
		Reason(fmt.Errorf("a call: %w", &RateLimitError{RetryAfter: time.Second})))
	require.Equal(t, "credits_exhausted", Reason(fmt.Errorf("a call: %w", new(CreditsError))))
	require.Equal(t, "other", Reason(errors.New("something else")))
	require.Equal(t, "other", Reason(ErrDenied), "nothing returns the bare ErrDenied")
	require.Equal(t, "unavailable",
		Reason(fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded)),
		"storage that did not answer is trouble of the store's, not the caller's deadline")
	require.Equal(t, "unavailable", Reason(wrapErr("get", errors.New("disk"))))
}
