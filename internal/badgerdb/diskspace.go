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

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A spaceGuard refuses commits that could make Badger run out of disk space. Badger writes logs and
// tables through mapped files, and a full disk ends the process there with SIGBUS. So a spaceGuard
// checks that the disk has the space that Badger may use before any caller can stop Badger.
//
// The disk, for memtables of m bytes:
//
//	used                   free, as the disk or a probe reports
//	[logs][LAST][tables]   [ next tables | next log | all tables again ][ spare ][ the rest ]
//	                       `------------------ need -------------------'
//	                       `----- reserve for urgent commits (revocations) -----'
//
//	logs              the current log, with logSize bytes allocated at the beginning of the log, and
//	                  each full log until the table of the log exists.
//	                  logSize is m, because Badger checks for a full log only before a commit, plus
//	                  one group (m/16) and 2 backend.MaxApplySize, because one request may be larger
//	LAST              2 commitfile.SlotSize, allocated at Open
//	tables            the sum of the *.sst files, plus m for each log begun since the last sum
//	next tables       2 m: the table of the full log, and the table of the current log
//	next log          logSize: the log after the current log
//	all tables again  the size of tables: a compaction writes new copies of its input. A table whose
//	                  first key and last key are far apart is merged with all tables of the next
//	                  level between these keys
//	spare             m, or 8 m on a file system that copies on write (see method spare)
//	the rest          usual commits may use the rest
//
// So a usual commit needs need + spare, and an urgent commit needs need. An urgent commit that fits
// into the current log needs no free space at all, because the log and LAST have all of their space
// from the beginning. If the log has no allocated space, such an urgent commit needs m.
//
// Other work needs: logs + m + logSize at Open, 2 m at Close, tables + m for a compaction, and
// tables + 32 MiB for a recovery.
//
// m is 8 MiB. m is 1 MiB on a disk below 512 MiB in total, or under a quota that leaves less than
// 128 MiB, unless an existing log needs the larger memtable. In memory a memtable takes up to 1.3
// m: Badger (db.go, arenaSize) adds 15 % of m for one transaction, and 15 % for the nodes of its
// skip list.
//
// The committer owns the spaceGuard, and checks the disk before each commit, so commits use space
// that comes back. The check races with other processes: a process that takes the last byte between
// check and write still ends this process.
//
// A quota may leave less space than the disk reports: the disk does not report the quota of a user
// or of a btrfs qgroup. So a probe also allocates the space, to a file without a name, and gives
// the space back. Probes run at Open, at Close, before the first commit to a log, and before a
// commit if probeEvery has passed. A process that uses up the quota between two probes is the same
// race. After a refusal a probe runs before each commit.
//
// A probe takes space away from a table that is being written at the same time, and would end the
// process. So no probe runs while Badger writes tables; see idle. Until Badger has written the
// tables, the last probe remains valid, but not into a third log: the last probe found enough space
// for two logs and their tables. Then the commit waits.
//
// On a file system that writes each block to a new place, as btrfs does, allocated space is
// useless. There LAST and the log have no allocated space, urgent commits need the full need, and
// usual commits need 8 m more. Such a file system also gives blocks back late. A probe waits for
// the blocks, and a compaction waits before its first table. If btrfs gives blocks back while a
// process writes to a full quota, btrfs may refuse pages of a table although there is space. The
// refusal ends the process and loses nothing.
//
// A compaction waits until there is space for the compaction; see compactions.awaitSpace. Commits
// do not use the space for a compaction.
type spaceGuard struct {
	dir  string
	disk func(dir string) (free, total int64, ok bool)
	// probe returns ENOSPC or EDQUOT if a file in dir cannot have size bytes.
	probe    func(dir string, size int64) error
	memtable int64 // bytes
	group    int   // the most bytes in a group of requests; a single request may have more

	log       int   // the number of the current log
	used      int64 // an upper bound of the bytes in the memtable of the current log
	reserved  bool  // LAST has all of its space
	allocated bool  // the current log has all of its space

	// probed is the time when a probe could allocate all space that may be needed. Zero: no probe
	// could do so since the beginning of the log.
	probed time.Time
	copies bool  // see fsys.CopiesOnWrite
	logs   int   // the number of logs begun since the last probe
	size   int64 // the size of the tables at the last check

	allowed int64 // the space that the last probe found
	refusal error // why the last probe found no more
	// idle calls probe while Badger writes no table and begins no table. Otherwise idle returns
	// false.
	idle func(probe func()) bool
	// busy returns why idle will return false for long, or nil.
	busy func() error
}

// probeEvery is how long a probe that found enough space remains valid.
const probeEvery = time.Second

const (
	// Every write takes at least perWrite bytes more than its key and value: in the file LAST, and
	// in the size that Badger allows for one transaction.
	perWrite = 64

	usualMemtable = 8 << 20
	smallMemtable = 1 << 20
	smallDisk     = 512 << 20 // a smaller disk has small memtables
	smallQuota    = 128 << 20 // under a quota that leaves less, memtables are small too
)

// newSpaceGuard checks the disk, and chooses the size of memtables if memtable is 0. An existing
// log may need a memtable as large as the log was written for. So largestLog is the size that the
// largest existing log takes in memory.
func newSpaceGuard(dir string, memtable int64, largestLog int64) spaceGuard {
	g := spaceGuard{
		dir: dir, disk: fsys.Disk, probe: fsys.Probe, memtable: memtable,
		copies: fsys.CopiesOnWrite(dir), allowed: math.MaxInt64,
		idle: func(probe func()) bool { probe(); return true },
		busy: func() error { return nil },
	}
	if g.memtable == 0 {
		g.memtable = memtableFor(fsys.Disk, fsys.Probe, dir, largestLog)
	}
	// Badger accepts up to 15 % of a memtable in one transaction.
	g.group = int(g.memtable / 16)
	return g
}

func memtableFor(
	disk func(string) (free, total int64, ok bool), probe func(string, int64) error,
	dir string, largestLog int64,
) int64 {
	// A log has less than 1.2 times the size m of the memtable that the log was written for. Badger
	// allocates 1.3 m for a memtable.
	if largestLog > smallMemtable*5/4 {
		return usualMemtable
	}
	_, total, ok := disk(dir)
	if ok && total < smallDisk || errors.Is(probe(dir, smallQuota), syscall.EDQUOT) {
		return smallMemtable
	}
	return usualMemtable
}

// logSize is the largest size that a log can reach. Badger treats a log as full when the log has
// the size of a memtable, and checks only before a commit.
func (g *spaceGuard) logSize() int64 { return g.memtable + int64(g.group) + 2*backend.MaxApplySize }

// need is the space that Badger may need for its work after a commit. Without this space, at most
// an urgent commit that fits into the current log is allowed.
func (g *spaceGuard) need(tables int64) int64 {
	return 2*g.memtable + g.logSize() + tables
}

func (g *spaceGuard) path(log int) string {
	return filepath.Join(g.dir, fmt.Sprintf("%05d.mem", log))
}

// opened finds the current log. Call opened once Badger is open. reserved means that the file LAST
// has all of its space.
func (g *spaceGuard) opened(reserved bool) error {
	g.reserved = reserved
	logs, err := badgerfile.FilesOf(g.dir, badgerfile.LogFiles)
	if err != nil {
		return err
	}
	for _, path := range logs {
		var n int
		if _, err := fmt.Sscanf(filepath.Base(path), "%d.mem", &n); err == nil {
			g.log = max(g.log, n)
		}
	}
	g.allocate()
	return nil
}

// allocate gives the current log all of its space, if LAST has all of its space.
func (g *spaceGuard) allocate() {
	g.allocated = false
	g.probed = time.Time{}
	if !g.reserved {
		return
	}
	f, err := os.OpenFile(g.path(g.log), os.O_RDWR, 0)
	if err != nil {
		return
	}
	g.allocated = fsys.Allocate(f, g.logSize())
	_ = f.Close() // nothing was written
}

// committed counts a commit. Badger may have begun another log for the commit.
func (g *spaceGuard) committed(writes []layout.Write) {
	if _, err := os.Stat(g.path(g.log + 1)); err == nil {
		g.log++
		g.used = 0
		g.logs++
		g.allocate()
	}
	g.count(writes)
}

// count adds the size of a commit to used. Each write is in the log, and in a node of a skip list.
// The end of the transaction is in both too.
func (g *spaceGuard) count(writes []layout.Write) {
	g.used += int64(perWrite + skl.MaxNodeSize)
	for _, w := range writes {
		g.used += int64(len(w.Key) + len(w.Value) + perWrite + skl.MaxNodeSize)
	}
}

// spare is the space beyond need that usual commits leave to urgent commits.
func (g *spaceGuard) spare() int64 {
	if g.copies {
		// Usual commits of two logs may come before the next probe, and each log also adds to need.
		return 8 * g.memtable
	}
	return g.memtable
}

// forCommit returns why there is no space for a usual commit, and why there is no space for an
// urgent commit. Nil means that there is space.
func (g *spaceGuard) forCommit() (usual, urgent error) {
	free, _, ok := g.disk(g.dir)
	if !ok {
		free = math.MaxInt64
	}
	spare := g.spare()
	due := time.Since(g.probed) >= probeEvery
	if due {
		g.size = g.tables()
	}
	need := g.need(g.size + int64(g.logs)*g.memtable) // each log has become a table
	if due {
		if err := g.runProbe(need+spare, need, spare); err != nil {
			return err, err
		}
	}
	why := func(size int64) error {
		if free < size {
			return full(g.dir, free, size)
		}
		return refused(g.dir, size, g.refusal)
	}
	left := min(free, g.allowed)
	if left < need+spare {
		usual = why(need + spare)
	}
	switch {
	case g.used < g.memtable && g.allocated: // the commit stays in this log
	case g.used < g.memtable && left >= spare && !g.copies:
	case left < need:
		urgent = why(need)
	}
	return usual, urgent
}

// runProbe probes for the first of the sizes that can be allocated. If Badger writes a table,
// runProbe skips the probe while the last probe is still valid, and otherwise waits for Badger. An
// error means that runProbe would wait for long.
func (g *spaceGuard) runProbe(sizes ...int64) error {
	const begin, most = time.Millisecond, 50 * time.Millisecond
	probe := func() { g.allowed, g.refusal = g.largest(sizes) }
	for wait := begin; !g.idle(probe); wait = min(2*wait, most) {
		if g.logs < 2 {
			return nil
		}
		if err := g.busy(); err != nil {
			return err
		}
		time.Sleep(wait)
	}
	g.logs = 0
	if g.probed = time.Now(); g.refusal != nil {
		g.probed = time.Time{}
	}
	return nil
}

// largest returns the first of the sizes that can be allocated, or 0 if no size can. refusal is why
// a larger size cannot be allocated. If the first size can be allocated, there is no known limit,
// and largest returns math.MaxInt64.
func (g *spaceGuard) largest(sizes []int64) (allowed int64, refusal error) {
	for i, size := range sizes {
		err := g.probe(g.dir, size)
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
func (g *spaceGuard) lacks(size int64) error {
	if free, _, ok := g.disk(g.dir); ok && free < size {
		return full(g.dir, free, size)
	}
	if err := g.probe(g.dir, size); err != nil {
		return refused(g.dir, size, err)
	}
	return nil
}

// toOpen returns why there is no space for the work of Badger at Open. logs is the number of bytes
// in the logs.
func (g *spaceGuard) toOpen(logs int64) error { return g.lacks(logs + g.memtable + g.logSize()) }

// toCompact returns why there is no space for a compaction, and for a table that is flushed at the
// same time. toCompact does not probe, because Badger may be flushing a table.
func (g *spaceGuard) toCompact() error {
	need := g.tables() + g.memtable
	if g.copies {
		_ = fsys.SyncFileSystem(g.dir) // gives back the blocks of tables that were removed
	}
	if free, _, ok := g.disk(g.dir); ok && free < need {
		return full(g.dir, free, need)
	}
	return nil
}

// toSalvage returns why there is no space for a recovery. A recovery is no larger than the existing
// files.
func (g *spaceGuard) toSalvage() error { return g.lacks(g.tables() + 4*usualMemtable) }

// toClose returns why there is no space for the work of Badger at Close. At Close Badger makes a
// table of the current log.
func (g *spaceGuard) toClose() (err error) {
	if g.used == 0 {
		return nil
	}
	need := 2 * g.memtable
	if free, _, ok := g.disk(g.dir); ok && free < need {
		return full(g.dir, free, need)
	}
	g.idle(func() { err = g.lacks(need) }) // if not idle, the last probe is still valid
	return err
}

// tables returns the size of all tables in the directory.
func (g *spaceGuard) tables() (size int64) {
	tables, _ := badgerfile.FilesOf(g.dir, badgerfile.TableFiles) // the disk was checked just now
	for _, path := range tables {
		if info, err := os.Stat(path); err == nil { // Badger may just have removed the table
			size += info.Size()
		}
	}
	return size
}

func full(dir string, free, need int64) error {
	return fmt.Errorf("badgerdb: %w: %s has %d KiB left and needs %d: make space",
		backend.ErrFull, dir, free>>10, need>>10)
}

func refused(dir string, need int64, err error) error {
	return fmt.Errorf("badgerdb: %w: %s needs %d KiB, and the disk or a quota does not allow "+
		"that: make space, or raise the quota: %w",
		backend.ErrFull, dir, need>>10, err)
}

// asFull makes an error of a full disk, or of a quota, wrap backend.ErrFull. Badger keeps only
// the text of such an error, so asFull also searches the text.
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

// A fullError is an error with a cause. The error may wrap the cause, or have only the text of the
// cause.
type fullError struct {
	error
	cause syscall.Errno
}

func (e *fullError) Unwrap() []error { return []error{backend.ErrFull, e.cause, e.error} }
