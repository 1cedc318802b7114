//go:build !unix

package work

import (
	"errors"
	"time"
)

func processCPU() (time.Duration, error) {
	return 0, errors.New("only Unix reports the processor time of a process")
}
