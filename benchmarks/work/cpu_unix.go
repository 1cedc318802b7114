//go:build unix

package work

import (
	"syscall"
	"time"
)

// processCPU returns the processor time of this process so far, of the user and of the system.
func processCPU() (time.Duration, error) {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0, err
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), nil
}
