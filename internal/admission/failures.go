package admission

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	"golang.org/x/time/rate"

	"github.com/grpc-api-key/grpc-api-key/internal/failures"
)

// A ThrottledError means that too many calls from an address have failed.
type ThrottledError struct{ RetryAfter time.Duration }

func (e *ThrottledError) Error() string { return "too many calls with bad credentials" }

// NewFailures returns the limit of the option LimitFailures.
func NewFailures(perSecond float64, burst int) (*failures.Limit, error) {
	if !(perSecond > 0) || math.IsInf(perSecond, 0) || burst < 1 {
		return nil, fmt.Errorf("LimitFailures: %v per second with a burst of %d: "+
			"both must be positive and finite", perSecond, burst)
	}
	return failures.New(rate.Limit(perSecond), burst), nil
}

// CheckFailures returns a *ThrottledError if addr has failed too often. A nil limit
// permits everything.
func CheckFailures(limit *failures.Limit, addr netip.Addr) error {
	if limit == nil {
		return nil
	}
	if wait := limit.Wait(addr); wait > 0 {
		return &ThrottledError{wait}
	}
	return nil
}
