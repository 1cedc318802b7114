package badgerdb

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// lockName is the file in which the process that has the directory open says who it is. The file is
// no lock, except on Windows. Badger has a file of this name too, with a pid in it.
const lockName = "LOCK"

// A holder is a process as the file LOCK describes it, one item a line:
//
//	pid
//	host name           two containers on one volume may both have pid 1
//	start               RFC 3339: when the process started to use this package
//	identity            random, in hexadecimal: no other process has it, on no host
//
// The first line alone is what another program with Badger writes.
type holder struct {
	pid                   int
	host, start, identity string
}

var thisProcess = sync.OnceValue(func() holder {
	identity := make([]byte, 16)
	_, _ = rand.Read(identity) // it never fails
	host, _ := os.Hostname()
	start := time.Now().UTC().Format(time.RFC3339)
	return holder{os.Getpid(), host, start, hex.EncodeToString(identity)}
})

func (h holder) encode() []byte {
	return fmt.Appendf(nil, "%d\n%s\n%s\n%s\n", h.pid, h.host, h.start, h.identity)
}

// parseHolder reads the file LOCK, and reports whether the text is one that a store or another
// program with Badger wrote.
func parseHolder(text string) (h holder, ok bool) {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	pid, err := strconv.Atoi(lines[0])
	if err != nil {
		return holder{}, false
	}
	h.pid = pid
	if len(lines) == 4 {
		h.host, h.start, h.identity = lines[1], lines[2], lines[3]
	}
	return h, len(lines) == 1 || len(lines) == 4
}

func (h holder) String() string {
	switch me := thisProcess(); {
	case h.identity == me.identity:
		return fmt.Sprintf("this process (pid %d)", h.pid)
	case h.identity != "":
		return fmt.Sprintf("the process with pid %d on host %q, which started at %.40q,",
			h.pid, h.host, h.start)
	default:
		return fmt.Sprintf("the process with pid %d, perhaps of another host or container,", h.pid)
	}
}

// lockedError says who has the directory open.
func lockedError(dir string) error {
	who := "another process"
	if text, err := os.ReadFile(filepath.Join(dir, lockName)); err == nil {
		if h, ok := parseHolder(string(text)); ok {
			who = h.String()
		}
	}
	return fmt.Errorf("%w: %s has %s open, and only one process at a time can: "+
		"stop that process, or manage the keys through it", backend.ErrLocked, who, dir)
}
