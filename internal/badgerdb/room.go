package badgerdb

import (
	"fmt"
	"os"
	"path/filepath"

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
//	up to 12 m     a compaction, which writes anew what it reads: not more than all tables
//
// That is enough for an urgent commit, and for m more, any. The log that is being written has all of its space from the
// beginning, and so has the file LAST: an urgent commit which fits into it is made on a disk that has no byte left.
//
// It is the committer's, and looks at the disk before each commit, so that space which comes back is used. Between the
// look and the write there is time, for a process that fills the disk at that moment, and to the last byte.
type room struct {
	dir      string
	disk     func(dir string) (free, total int64, ok bool)
	memtable int64 // bytes
	group    int   // the most bytes in a group of requests; a single request may have more

	log       int   // number of the log that is being written
	used      int64 // at most so much of its memtable
	reserved  bool  // LAST has all of its space
	allocated bool  // and so has the log
}

const (
	// Every write takes this much more than its key and value, at least: in the file LAST, and of what Badger allows in
	// one transaction.
	perWrite = 64

	usualMemtable = 8 << 20
	smallMemtable = 1 << 20
	smallDisk     = 512 << 20 // one with less has small memtables
)

// newRoom looks at the disk. The logs that there are may need memtables as large as they were written for: it is told what
// the largest takes in memory.
func newRoom(dir string, memtable int64, largestLog int64) room {
	r := room{dir: dir, disk: disk, memtable: memtable}
	if r.memtable == 0 {
		r.memtable = memtableFor(disk, dir, largestLog)
	}
	// Badger takes 15 % of a memtable in one transaction.
	r.group = int(r.memtable / 16)
	return r
}

func memtableFor(disk func(string) (free, total int64, ok bool), dir string, largestLog int64) int64 {
	// A log has less than 1.2 times the size of the memtable that it was written for, and Badger makes room for 1.3 times.
	if _, total, ok := disk(dir); ok && total < smallDisk && largestLog <= smallMemtable*5/4 {
		return smallMemtable
	}
	return usualMemtable
}

// logSize is how large a log can become: it is full when it has the size of a memtable, before a commit.
func (r *room) logSize() int64 { return r.memtable + int64(r.group) + 2*backend.MaxApplySize }

// need is the space without which nothing may be written that Badger has to go on with.
func (r *room) need(tables int64) int64 {
	return 2*r.memtable + r.logSize() + min(tables, 12*r.memtable)
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

// forCommit returns why there is no room for a usual commit, and for an urgent one.
func (r *room) forCommit() (usual, urgent error) {
	free, _, ok := r.disk(r.dir)
	if !ok {
		return nil, nil
	}
	spare := r.memtable
	if free >= r.need(12*r.memtable)+spare {
		return nil, nil // without a look at the tables
	}
	need := r.need(r.tables())
	if free < need+spare {
		usual = full(r.dir, free, need+spare)
	}
	switch {
	case r.used < r.memtable && r.allocated: // it stays in this log
	case r.used < r.memtable && free >= spare:
	case free < need:
		urgent = full(r.dir, free, need)
	}
	return usual, urgent
}

// toOpen returns why there is no room for what Badger does when it opens the directory, with so many bytes in logs.
func (r *room) toOpen(logs int64) error {
	if free, _, ok := r.disk(r.dir); ok && free < logs+r.memtable+r.logSize() {
		return full(r.dir, free, logs+r.memtable+r.logSize())
	}
	return nil
}

// toSalvage returns why there is no room for a recovery, which is no larger than what there is.
func (r *room) toSalvage() error {
	need := r.tables() + 4*usualMemtable
	if free, _, ok := r.disk(r.dir); ok && free < need {
		return full(r.dir, free, need)
	}
	return nil
}

// toClose returns why there is no room for what Badger does when it is closed: it makes a table of its log.
func (r *room) toClose() error {
	if free, _, ok := r.disk(r.dir); ok && r.used > 0 && free < 2*r.memtable {
		return full(r.dir, free, 2*r.memtable)
	}
	return nil
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
