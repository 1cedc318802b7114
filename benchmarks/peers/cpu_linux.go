package peers

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// processorTime returns the processor time of a server process and of its direct children, which
// serve the connections of PostgreSQL. Threads and processes that have ended do not count.
func processorTime(pid int) (time.Duration, error) {
	pids := []string{strconv.Itoa(pid)}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the process has ended
		}
		// The name of the program is in parentheses, and may contain spaces.
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		if len(fields) > 1 && fields[1] == pids[0] {
			pids = append(pids, filepath.Base(filepath.Dir(path)))
		}
	}
	var total time.Duration
	for _, p := range pids {
		threads, err := filepath.Glob("/proc/" + p + "/task/*/schedstat")
		if err != nil {
			return 0, err
		}
		for _, path := range threads {
			text, err := os.ReadFile(path)
			if err != nil {
				continue // the thread has ended
			}
			var ran int64 // nanoseconds
			if _, err := fmt.Sscan(string(text), &ran); err != nil {
				return 0, fmt.Errorf("the processor time of a server: %w", err)
			}
			total += time.Duration(ran)
		}
	}
	if total == 0 {
		return 0, fmt.Errorf("the system does not report the processor time of process %d", pid)
	}
	return total, nil
}
