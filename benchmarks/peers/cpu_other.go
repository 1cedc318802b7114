//go:build !linux

package peers

import (
	"errors"
	"time"
)

func processorTime(int) (time.Duration, error) {
	return 0, errors.New("only Linux reports the processor time of another process")
}
