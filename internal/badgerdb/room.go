package badgerdb

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dgraph-io/badger/v4/skl"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A room knows how much space Badger may need on the disk before anybody can stop it, and refuses commits while there
// is less. Badger writes logs and tables through mapped files, and where the disk is full, that ends the process.
//
// What it may need, with memtables of m bytes:
//
//	2 m            tables of the log that is full, and of the one that is being written
//	the log        that comes after it
//	all tables     a compaction, which writes anew what it reads: a table of which the first key and the last are far
//	               apart is merged with all tables of the next level between them
//
// That is enough for an urgent commit, and for m more, any. The log that is being written has all of its space from the
// beginning, and so has the file LAST: an urgent commit which fits into it is made on a disk that has no byte left.
//
// It is the committer's, and looks at the disk before each commit, so that space which comes back is used. Between the
// look and the write there is time, for a process that fills the disk at that moment, and to the last byte.
//
// A quota may leave less than the disk has: one of a user, or of a btrfs qgroup, is not in what the disk says of itself.
// So the space is also allocated, to a file without a name, and given back; that is a probe. There is one at Open and
// Close, before the first commit to a log, and before a commit if probeEvery has passed. A process that uses up the quota
// in between is as above. After a refusal there is a probe before each commit.
//
// A probe would take the space away from a table that is being written at that moment, and end the process. So there is
// none while Badger writes tables; see idle. Until it has written them the last probe holds, but not into a third log:
// what was found is enough for the tables and logs of two. Then the commit waits.
//
// A file system that writes each block to a new place, as btrfs does, has no use for allocated space: there LAST and the
// log have none, urgent commits need what Badger needs, and usual ones 8 m more. It also gives blocks back late: a probe
// waits for that, and so does a compaction before its first table. Where blocks are given back while a full quota is
// being written to, btrfs may refuse pages of a table though there is space, which ends the process and loses nothing.
//
// A compaction waits until it has its space; see compactions.awaitSpace. The space for it is not used by commits.
type room struct {
	dir      string
	disk     func(dir string) (free, total int64, ok bool)
	probe    func(dir string, size int64) error // ENOSPC or EDQUOT if a file in dir cannot have so many bytes
	memtable int64                              // bytes
	group    int                                // the most bytes in a group of requests; a single request may have more

	log       int   // number of the log that is being written
	used      int64 // at most so much of its memtable
	reserved  bool  // LAST has all of its space
	allocated bool  // and so has the log

	probed time.Time // when all that may be needed could be allocated; zero: not since the log was begun
	copies bool      // see copiesOnWrite
	logs   int       // that were begun since the last probe
	size   int64     // of the tables, when that was looked at

	allowed int64 // what the last probe found
	refusal error // why it found no more
	// idle calls probe while Badger writes no table, and begins none, or returns false; busy is why it will not for long.
	idle func(probe func()) bool
	busy func() error
}

// probeEvery is how long a probe that found enough space holds.
const probeEvery = time.Second

const (
	// Every write takes this much more than its key and value, at least: in the file LAST, and of what Badger allows in
	// one transaction.
	perWrite = 64

	usualMemtable = 8 << 20
	smallMemtable = 1 << 20
	smallDisk     = 512 << 20 // one with less has small memtables
	smallQuota    = 128 << 20 // and so has a quota that leaves less
)

// newRoom looks at the disk. The logs that there are may need memtables as large as they were written for: it is told what
// the largest takes in memory.
func newRoom(dir string, memtable int64, largestLog int64) room {
	r := room{
		dir: dir, disk: disk, probe: probe, memtable: memtable, copies: copiesOnWrite(dir), allowed: math.MaxInt64,
		idle: func(probe func()) bool { probe(); return true },
		busy: func() error { return nil },
	}
	if r.memtable == 0 {
		r.memtable = memtableFor(disk, probe, dir, largestLog)
	}
	// Badger takes 15 % of a memtable in one transaction.
	r.group = int(r.memtable / 16)
	return r
}

func memtableFor(
	disk func(string) (free, total int64, ok bool), probe func(string, int64) error, dir string, largestLog int64,
) int64 {
	// A log has less than 1.2 times the size of the memtable that it was written for, and Badger makes room for 1.3 times.
	if largestLog > smallMemtable*5/4 {
		return usualMemtable
	}
	_, total, ok := disk(dir)
	if ok && total < smallDisk || errors.Is(probe(dir, smallQuota), syscall.EDQUOT) {
		return smallMemtable
	}
	return usualMemtable
}

// logSize is how large a log can become: it is full when it has the size of a memtable, before a commit.
func (r *room) logSize() int64 { return r.memtable + int64(r.group) + 2*backend.MaxApplySize }

// need is the space without which nothing may be written that Badger has to go on with.
func (r *room) need(tables int64) int64 {
	return 2*r.memtable + r.logSize() + tables
}

func (r *room) path(log int) string { return filepath.Join(r.dir, fmt.Sprintf("%05d.mem", log)) }

// opened finds the log that Badger writes, once it is open, and is told whether the file LAST has its space.
func (r *room) opened(reserved bool) error {
	r.reserved = reserved
	logs, err := filesOf(r.dir, ".mem")
	if err != nil {
		return err
	}
	for _, path := range logs {
		var n int
		if _, err := fmt.Sscanf(filepath.Base(path), "%d.mem", &n); err == nil {
			r.log = max(r.log, n)
		}
	}
	r.allocate()
	return nil
}

func (r *room) allocate() {
	r.allocated = false
	r.probed = time.Time{}
	if !r.reserved {
		return
	}
	f, err := os.OpenFile(r.path(r.log), os.O_RDWR, 0)
	if err != nil {
		return
	}
	r.allocated = allocate(f, r.logSize())
	_ = f.Close() // nothing was written
}

// committed takes note of a commit, for which Badger may have begun another log.
func (r *room) committed(writes []write) {
	if _, err := os.Stat(r.path(r.log + 1)); err == nil {
		r.log++
		r.used = 0
		r.logs++
		r.allocate()
	}
	r.use(writes)
}

// use adds a commit to what the log has. Each write is in the log, and in a node of a skip list; so is the end of the
// transaction.
func (r *room) use(writes []write) {
	r.used += int64(perWrite + skl.MaxNodeSize)
	for _, w := range writes {
		r.used += int64(len(w.key) + len(w.value) + perWrite + skl.MaxNodeSize)
	}
}

// spare is the space beyond need that usual commits leave to urgent ones.
func (r *room) spare() int64 {
	if r.copies {
		return 8 * r.memtable // usual commits of two logs may come before the next probe, and each log also adds to need
	}
	return r.memtable
}

// forCommit returns why there is no room for a usual commit, and for an urgent one.
func (r *room) forCommit() (usual, urgent error) {
	free, _, ok := r.disk(r.dir)
	if !ok {
		free = math.MaxInt64
	}
	spare := r.spare()
	due := time.Since(r.probed) >= probeEvery
	if due {
		r.size = r.tables()
	}
	need := r.need(r.size + int64(r.logs)*r.memtable) // each log has become a table since
	if due {
		if err := r.look(need+spare, need, spare); err != nil {
			return err, err
		}
	}
	why := func(size int64) error {
		if free < size {
			return full(r.dir, free, size)
		}
		return refused(r.dir, size, r.refusal)
	}
	left := min(free, r.allowed)
	if left < need+spare {
		usual = why(need + spare)
	}
	switch {
	case r.used < r.memtable && r.allocated: // it stays in this log
	case r.used < r.memtable && left >= spare && !r.copies:
	case left < need:
		urgent = why(need)
	}
	return usual, urgent
}

// look probes for the first of the sizes that can be allocated, if Badger writes no table now. It waits for that if the last
// probe holds no longer. An error means that it would wait for long.
func (r *room) look(sizes ...int64) error {
	const begin, most = time.Millisecond, 50 * time.Millisecond
	for wait := begin; !r.idle(func() { r.allowed, r.refusal = r.most(sizes) }); wait = min(2*wait, most) {
		if r.logs < 2 {
			return nil
		}
		if err := r.busy(); err != nil {
			return err
		}
		time.Sleep(wait)
	}
	r.logs = 0
	if r.probed = time.Now(); r.refusal != nil {
		r.probed = time.Time{}
	}
	return nil
}

// most returns the first of the sizes that can be allocated, or 0, and why a larger one cannot. If the first one can, there
// is no known limit.
func (r *room) most(sizes []int64) (allowed int64, refusal error) {
	for i, size := range sizes {
		err := r.probe(r.dir, size)
		switch {
		case err == nil && i == 0:
			return math.MaxInt64, nil
		case err == nil:
			return size, refusal
		}
		refusal = err
	}
	return 0, refusal
}

// lacks returns an error if there is less space than size.
func (r *room) lacks(size int64) error {
	if free, _, ok := r.disk(r.dir); ok && free < size {
		return full(r.dir, free, size)
	}
	if err := r.probe(r.dir, size); err != nil {
		return refused(r.dir, size, err)
	}
	return nil
}

// toOpen returns why there is no room for what Badger does when it opens the directory, with so many bytes in logs.
func (r *room) toOpen(logs int64) error { return r.lacks(logs + r.memtable + r.logSize()) }

// toCompact returns why there is no room for a compaction, and for a table that is flushed beside it. It does not probe: a
// table may be being flushed.
func (r *room) toCompact() error {
	need := r.tables() + r.memtable
	if r.copies {
		_ = syncFileSystem(r.dir) // gives back the blocks of tables that were removed
	}
	if free, _, ok := r.disk(r.dir); ok && free < need {
		return full(r.dir, free, need)
	}
	return nil
}

// toSalvage returns why there is no room for a recovery, which is no larger than what there is.
func (r *room) toSalvage() error { return r.lacks(r.tables() + 4*usualMemtable) }

// toClose returns why there is no room for what Badger does when it is closed: it makes a table of its log.
func (r *room) toClose() (err error) {
	if r.used == 0 {
		return nil
	}
	need := 2 * r.memtable
	if free, _, ok := r.disk(r.dir); ok && free < need {
		return full(r.dir, free, need)
	}
	r.idle(func() { err = r.lacks(need) }) // or the last probe holds
	return err
}

func (r *room) tables() (size int64) {
	tables, _ := filesOf(r.dir, ".sst") // the disk has been looked at just now
	for _, path := range tables {
		if info, err := os.Stat(path); err == nil { // it may just have been removed
			size += info.Size()
		}
	}
	return size
}

func full(dir string, free, need int64) error {
	return fmt.Errorf("badgerdb: %w: %s has %d KiB left and needs %d: make room", backend.ErrFull, dir, free>>10, need>>10)
}

func refused(dir string, need int64, err error) error {
	return fmt.Errorf("badgerdb: %w: %s needs %d KiB, and the disk or a quota does not allow that: make room, or raise the quota: %w",
		backend.ErrFull, dir, need>>10, err)
}

// asFull makes an error that comes of a full disk, or of a quota, wrap backend.ErrFull. Badger keeps no more than the text
// of such an error.
func asFull(err error) error {
	if err == nil || errors.Is(err, backend.ErrFull) {
		return err
	}
	for _, cause := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT} {
		if errors.Is(err, cause) || strings.Contains(err.Error(), cause.Error()) {
			return &fullError{err, cause}
		}
	}
	return err
}

// A fullError is an error that has a cause, whether it wraps the cause or has only its text.
type fullError struct {
	error
	cause syscall.Errno
}

func (e *fullError) Unwrap() []error { return []error{backend.ErrFull, e.cause, e.error} }
