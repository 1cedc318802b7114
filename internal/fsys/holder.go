package fsys

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// LockName is the file that names the process that has the directory open. The file is no lock,
// except on Windows. Badger also writes a file with this name, and the file holds a pid.
const LockName = "LOCK"

// A Holder describes a process in the file LOCK. Each line holds one item:
//
//	pid
//	host name           two containers on one volume may both have pid 1
//	start               RFC 3339: when the process started to use this package
//	identity            random, in hexadecimal: different for each process on each host
//
// Another program with Badger writes only the first line.
type Holder struct {
	pid                   int
	host, start, identity string
}

var thisProcess = sync.OnceValue(func() Holder {
	identity := make([]byte, 16)
	_, _ = rand.Read(identity) // never fails
	host, _ := os.Hostname()
	start := time.Now().UTC().Format(time.RFC3339)
	return Holder{os.Getpid(), host, start, hex.EncodeToString(identity)}
})

// ThisProcess describes this process.
func ThisProcess() Holder { return thisProcess() }

// Encode returns the text of the file LOCK.
func (h Holder) Encode() []byte {
	return fmt.Appendf(nil, "%d\n%s\n%s\n%s\n", h.pid, h.host, h.start, h.identity)
}

// ParseHolder parses the text of the file LOCK. ok reports whether a store or another program with
// Badger wrote the text.
func ParseHolder(text string) (h Holder, ok bool) {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	pid, err := strconv.Atoi(lines[0])
	if err != nil {
		return Holder{}, false
	}
	h.pid = pid
	if len(lines) == 4 {
		h.host, h.start, h.identity = lines[1], lines[2], lines[3]
	}
	return h, len(lines) == 1 || len(lines) == 4
}

// String names the process in error texts.
func (h Holder) String() string {
	switch me := ThisProcess(); {
	case h.identity == me.identity:
		return fmt.Sprintf("this process (pid %d)", h.pid)
	case h.identity != "":
		return fmt.Sprintf("the process with pid %d on host %q, which started at %.40q,",
			h.pid, h.host, h.start)
	default:
		return fmt.Sprintf("the process with pid %d, perhaps of another host or container,", h.pid)
	}
}
