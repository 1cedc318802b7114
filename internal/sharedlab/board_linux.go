package sharedlab

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxStores is the largest number of store processes on a board.
const maxStores = 4

// A board is memory that the test shares with the store processes. The processes note there which
// keys exist, and what they saw. The memory outlives a process that is killed. All times are of
// CLOCK_MONOTONIC, which all processes of a machine share, in nanoseconds; 0 means never.
type board struct {
	*boardHeader
	slots  []slot
	memory []byte
}

type boardHeader struct {
	taken  atomic.Int64 // how many slots were taken
	live   atomic.Int64 // about how many keys no process has begun to revoke
	stores [maxStores]storeBoard
}

// A storeBoard belongs to one store process and its successors.
type storeBoard struct {
	clock     atomic.Int64 // seconds by which the wall clock is ahead; machine code reads this
	movable   atomic.Int64 // 1: clock has an effect
	admitted  atomic.Int64 // calls
	denied    atomic.Int64 // calls that were Unauthenticated
	gate      atomic.Int64 // calls of the store that were refused because the gate was closed
	away      atomic.Int64 // calls that were Unavailable
	late      atomic.Int64 // calls whose deadline passed
	messages  atomic.Int64 // messages of streams that passed
	streams   atomic.Int64 // streams that began
	revoked   atomic.Int64 // keys that calls have ended which returned nil
	returned  atomic.Int64 // such calls: RevokeAll ends several keys
	uncertain atomic.Int64 // such calls that returned an error
	strange   atomic.Int64 // results that no fault explains; the process writes the first to stderr
}

// A slot is one key: the text is the ID, a NUL byte, the token, and NUL bytes.
type slot struct {
	text     [128]byte
	began    atomic.Int64 // Create
	ready    atomic.Int64 // Create has returned, and the text is complete
	revoking atomic.Int64 // the first Revoke, Disable or Rotate has begun
	revoked  atomic.Int64 // such a call has returned nil: no call may be admitted that begins later
	good     atomic.Int64 // 1: the key is never revoked
	family   atomic.Int64 // a number that all keys with the same owner have; 0: no owner
	complete atomic.Int64 // 1: all keys of the family are known
	updating atomic.Int64 // the only Update has begun
	updated  atomic.Int64 // the Update has returned
	revision atomic.Int64 // the revision that the Update returned
	seen     [maxStores]sighting
}

// A sighting is what one process saw of a key.
type sighting struct {
	admitted atomic.Int64 // when the last admitted call began
	received atomic.Int64 // when the last message was sent that the server received on a stream
	sent     atomic.Int64 // when the last Send of the server began that returned nil
	alive    atomic.Int64 // when the last look at a session began that found the session alive
	denied   atomic.Int64 // when a call with a key began that was denied before any Revoke
	stale    atomic.Int64 // when a call began that returned a revision from before the Update
}

// newBoard makes the file of a board.
func newBoard(file string, slots int) (*board, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := int64(unsafe.Sizeof(boardHeader{})) + int64(slots)*int64(unsafe.Sizeof(slot{}))
	if err := f.Truncate(size); err != nil {
		return nil, err
	}
	return openBoard(file)
}

// openBoard opens the file of a board.
func openBoard(file string) (*board, error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	memory, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the board: %w", err)
	}
	header := int(unsafe.Sizeof(boardHeader{}))
	n := (len(memory) - header) / int(unsafe.Sizeof(slot{}))
	return &board{
		boardHeader: (*boardHeader)(unsafe.Pointer(&memory[0])),
		slots:       unsafe.Slice((*slot)(unsafe.Pointer(&memory[header])), n),
		memory:      memory,
	}, nil
}

func (b *board) close() error { return unix.Munmap(b.memory) }

// take returns the number of the next free slot, or false if all are taken.
func (b *board) take() (n int, ok bool) {
	n = int(b.taken.Add(1) - 1)
	return n, n < len(b.slots)
}

// used returns the number of slots that were taken.
func (b *board) used() int { return min(int(b.taken.Load()), len(b.slots)) }

// publish makes a key known to all processes.
func (s *slot) publish(id, token string) error {
	if len(id)+1+len(token) > len(s.text) {
		return errors.New("a key is too long for the board")
	}
	copy(s.text[:], id+"\x00"+token)
	s.ready.Store(monotonic())
	return nil
}

// key returns the ID and the token.
func (s *slot) key() (id, token string) {
	first, rest, _ := bytes.Cut(s.text[:], []byte{0})
	second, _, _ := bytes.Cut(rest, []byte{0})
	return string(first), string(second)
}

// monotonic returns the time of CLOCK_MONOTONIC in nanoseconds.
func monotonic() int64 {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &t); err != nil {
		panic(err) // impossible: the clock exists
	}
	return t.Nano()
}

// A window is a time in which confirmed changes were lost.
type window struct{ from, to int64 }

// overlaps reports whether something that began and ended was under way in the window. An end of 0
// has not come.
func (w window) overlaps(began, ended int64) bool {
	return began != 0 && began <= w.to && (ended == 0 || ended >= w.from)
}

// violations returns what contradicts the guarantees, except for changes in the windows.
func (b *board) violations(lost []window) (found []violation) {
	for n := range b.used() {
		s := &b.slots[n]
		if s.ready.Load() == 0 || s.isLost(lost) {
			continue
		}
		for p := range s.seen {
			seen := &s.seen[p]
			note := func(what string, at *atomic.Int64) {
				found = append(found, violation{what, n, p, at.Load()})
			}
			if revoked := s.revoked.Load(); revoked != 0 {
				for _, what := range []struct {
					name string
					at   *atomic.Int64
				}{
					{admittedLate, &seen.admitted}, {receivedLate, &seen.received},
					{sentLate, &seen.sent}, {aliveLate, &seen.alive},
				} {
					if what.at.Load() > revoked {
						note(what.name, what.at)
					}
				}
			}
			if seen.denied.Load() != 0 {
				note(deniedGood, &seen.denied)
			}
			if seen.stale.Load() != 0 {
				note(staleRevision, &seen.stale)
			}
		}
	}
	return found
}

// isLost reports whether a change of the key may have been lost.
func (s *slot) isLost(lost []window) bool {
	for _, w := range lost {
		if w.overlaps(s.began.Load(), s.ready.Load()) ||
			w.overlaps(s.revoking.Load(), s.revoked.Load()) ||
			w.overlaps(s.updating.Load(), s.updated.Load()) {
			return true
		}
	}
	return false
}

// The kinds of violations.
const (
	admittedLate  = "a call was admitted after the return"
	receivedLate  = "a message was received after the return"
	sentLate      = "a message was sent after the return"
	aliveLate     = "a session was alive after the return"
	deniedGood    = "a good key was denied"
	staleRevision = "a call returned an older revision than a change that had returned"
)

// A violation is something that a process saw and that contradicts a guarantee.
type violation struct {
	what    string
	slot    int
	process int
	at      int64
}
