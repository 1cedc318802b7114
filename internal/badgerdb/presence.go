package badgerdb

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
)

// A presence knows which files the DB writes, and looks whether they are still in the directory. A process keeps writing
// to a file that has been removed, or moved away with its directory, and nobody finds what it wrote afterwards. So a
// commit is acknowledged only after a look:
//
//	LAST             the file of this name is the one that is open. That covers a directory that was removed, renamed or
//	                 replaced by a copy: the path leads to another LAST, or to none
//	the log          the file of this name is the one that was there after the first commit to it
//	MANIFEST, *.sst  files of these names are there. The look is taken when the directory's modification time has changed,
//	                 and once more later, because two changes may have the same time
type presence struct {
	last atomic.Pointer[os.FileInfo] // of the file LAST that is open
	log  atomic.Pointer[logIdentity] // the log that is being written; the committer's, and read by Check

	// The committer's. When tables were last looked at, the directory had this modification time; settled says that the
	// time was old enough for a later change to have another.
	modified time.Time
	settled  bool
}

type logIdentity struct {
	number int
	file   os.FileInfo
}

// timeGrain is longer than the time between two modification times that a file system tells apart.
const timeGrain = 2 * time.Second

// present returns an error if a file that the DB writes is not in the directory any more. Only the committer calls it.
func (db *DB) present() error {
	p := &db.presence
	if err := db.lastPresent(); err != nil {
		return err
	}
	path := db.room.path(db.room.log)
	log, err := os.Stat(path)
	if err != nil {
		return gone(path, err)
	}
	if known := p.log.Load(); known == nil || known.number != db.room.log {
		p.log.Store(&logIdentity{db.room.log, log})
	} else if !os.SameFile(known.file, log) {
		return gone(path, nil)
	}
	dir, err := os.Stat(db.dir)
	if err != nil {
		return gone(db.dir, err)
	}
	old := time.Since(dir.ModTime()) > timeGrain
	if dir.ModTime().Equal(p.modified) && (p.settled || !old) {
		return nil
	}
	p.modified, p.settled = dir.ModTime(), old
	return db.tablesPresent()
}

// allPresent is present for the other goroutines. The caller holds use, so that Badger is not being closed.
func (db *DB) allPresent() error {
	if err := db.lastPresent(); err != nil {
		return err
	}
	if log := db.presence.log.Load(); log != nil {
		path := db.room.path(log.number)
		now, err := os.Stat(path)
		// A log is removed only when there is a next one, of which the committer may not have taken note.
		if _, next := os.Stat(db.room.path(log.number + 1)); next != nil && (err != nil || !os.SameFile(now, log.file)) {
			return gone(path, err)
		}
	}
	return db.tablesPresent()
}

func (db *DB) lastPresent() error {
	path := filepath.Join(db.dir, lastName)
	named, err := os.Stat(path)
	if err != nil {
		return gone(path, err)
	}
	open := db.presence.last.Load()
	if open == nil {
		info, err := db.last.file.Stat()
		if err != nil {
			return err
		}
		open = &info
		db.presence.last.Store(open)
	}
	if !os.SameFile(named, *open) {
		return gone(path, nil)
	}
	return nil
}

// tablesPresent looks for the manifest, and for each table that Badger reads.
func (db *DB) tablesPresent() error {
	if _, err := os.Stat(db.manifest()); err != nil {
		return gone(db.manifest(), err)
	}
	var missing []uint64
	for _, t := range db.badger.Tables() {
		if _, err := os.Stat(db.tablePath(t.ID)); err != nil {
			missing = append(missing, t.ID)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	// A compaction may have removed them since. Badger reads a table no more when it removes the file, and gives no number
	// to two tables.
	for _, t := range db.badger.Tables() {
		if slices.Contains(missing, t.ID) {
			return gone(db.tablePath(t.ID), fs.ErrNotExist)
		}
	}
	return nil
}

func (db *DB) manifest() string { return filepath.Join(db.dir, badger.ManifestFilename) }

func (db *DB) tablePath(id uint64) string { return filepath.Join(db.dir, table.IDToFilename(id)) }

// gone says that a file cannot be found where it was made, and why; nil means that another file has its name.
func gone(path string, err error) error {
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s has been removed or replaced while the store was open", path)
	}
	return fmt.Errorf("%s cannot be found any more: %w", path, err)
}
