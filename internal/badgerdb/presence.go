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

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
)

// A presence records which files the DB writes, and checks that the files are still in the
// directory. A process can keep writing to a file that has been removed, or has been moved away
// with its directory. The written data cannot be found afterwards. So a commit is acknowledged only
// after a check:
//
//	LAST             the file of this name is the open file. This covers a directory that was
//	                 removed, renamed or replaced by a copy: the path leads to another LAST, or to
//	                 no file
//	the log          the file of this name is the file that existed after the first commit to it
//	MANIFEST, *.sst  files of these names exist. The check runs when the directory's modification
//	                 time has changed, and once more later, because two changes may have the same
//	                 time
type presence struct {
	commitFile atomic.Pointer[os.FileInfo] // identifies the open file LAST
	// log is the log that is being written. log is owned by the committer, and read by Check.
	log atomic.Pointer[logIdentity]

	// The committer owns modified and stable. modified is the modification time of the directory
	// at the last check of the tables. stable means that modified was old enough for a later
	// change to have another time.
	modified time.Time
	stable   bool
}

type logIdentity struct {
	number int
	file   os.FileInfo
}

// timeGrain is longer than the resolution of modification times on a file system.
const timeGrain = 2 * time.Second

// present returns an error if a file that the DB writes is missing from the directory. Only the
// committer calls present.
func (db *DB) present() error {
	p := &db.presence
	if err := db.commitFilePresent(); err != nil {
		return err
	}
	path := db.space.path(db.space.log)
	log, err := os.Stat(path)
	if err != nil {
		return gone(path, err)
	}
	if known := p.log.Load(); known == nil || known.number != db.space.log {
		p.log.Store(&logIdentity{db.space.log, log})
	} else if !os.SameFile(known.file, log) {
		return gone(path, nil)
	}
	dir, err := os.Stat(db.dir)
	if err != nil {
		return gone(db.dir, err)
	}
	old := time.Since(dir.ModTime()) > timeGrain
	if dir.ModTime().Equal(p.modified) && (p.stable || !old) {
		return nil
	}
	p.modified, p.stable = dir.ModTime(), old
	return db.tablesPresent()
}

// allPresent is present for the other goroutines. The caller holds use, so that Badger is not being
// closed.
func (db *DB) allPresent() error {
	if err := db.commitFilePresent(); err != nil {
		return err
	}
	if log := db.presence.log.Load(); log != nil {
		path := db.space.path(log.number)
		now, err := os.Stat(path)
		// A log is removed only when the next log exists. The committer may not have recorded the
		// next log yet.
		_, next := os.Stat(db.space.path(log.number + 1))
		if next != nil && (err != nil || !os.SameFile(now, log.file)) {
			return gone(path, err)
		}
	}
	return db.tablesPresent()
}

func (db *DB) commitFilePresent() error {
	path := filepath.Join(db.dir, commitfile.Name)
	named, err := os.Stat(path)
	if err != nil {
		return gone(path, err)
	}
	open := db.presence.commitFile.Load()
	if open == nil {
		info, err := db.commitFile.Stat()
		if err != nil {
			return err
		}
		open = &info
		db.presence.commitFile.Store(open)
	}
	if !os.SameFile(named, *open) {
		return gone(path, nil)
	}
	return nil
}

// tablesPresent checks that the manifest exists, and each table that Badger reads.
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
	// A compaction may have removed the missing tables since the list was made. Badger does not
	// read a table any more when Badger removes the file. Badger never gives a number to two
	// tables.
	for _, t := range db.badger.Tables() {
		if slices.Contains(missing, t.ID) {
			return gone(db.tablePath(t.ID), fs.ErrNotExist)
		}
	}
	return nil
}

func (db *DB) manifest() string { return filepath.Join(db.dir, badgerfile.ManifestFile) }

func (db *DB) tablePath(id uint64) string { return filepath.Join(db.dir, badgerfile.TableName(id)) }

// gone returns the error for a file that cannot be found where it was created. err is the reason;
// nil means that another file has the name.
func gone(path string, err error) error {
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s has been removed or replaced while the store was open", path)
	}
	return fmt.Errorf("%s cannot be found any more: %w", path, err)
}
