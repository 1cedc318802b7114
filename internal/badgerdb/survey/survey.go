// Package survey reads the files of a store's directory before Badger opens them, and decides
// whether commits are missing. Package survey compares Badger's files with the file LAST, and
// either names the commits that must be made again, or returns an error that names the damage.
//
// Package survey changes no file, except in Clean, and repairs nothing. The package may not know
// the engine: neither an open Badger, nor a recovery, nor the space on the disk.
package survey

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A Survey describes the content of the files in a directory, before Badger opens the files. The
// survey changes no file, except in Clean.
//
// Every commit has the next timestamp, so a gap in the timestamps means that commits are missing.
// Commits go to a log, in order, and later from the log to a table. A log is deleted once a table
// that the manifest names holds the whole log. So the highest timestamp in the tables, with the
// first and last timestamp of each log, shows how far the store is without a gap.
//
// The type commitfile.File has the decision table of Reconcile.
type Survey struct {
	dir     string
	Logs    []badgerfile.Log // in the order of their numbers
	Named   []string         // the tables that the manifest names
	Strays  []string         // the other tables
	Level0  int              // the number of named tables in Badger's level 0
	tables  uint64           // the highest version in a table that the manifest names
	Summary layout.Summary   // the newest summary
	Writes  []layout.Write   // the writes of the commit of summary, if the commit is in a log
	damage  []error          // the certain damage

	Foreign string // a table that another program with Badger has written
}

// Read surveys the files of dir, and changes no file. The survey records the damage. The error
// is an error of the operating system.
func Read(dir string) (*Survey, error) {
	s := &Survey{dir: dir}
	if err := s.readTables(); err != nil {
		return nil, err
	}
	paths, err := badgerfile.FilesOf(dir, badgerfile.LogFiles)
	if err != nil {
		return nil, err
	}
	for _, path := range paths {
		l, err := badgerfile.ReadLog(path, func(_ uint64, writes []layout.Write) error {
			for _, w := range writes {
				h, ok := layout.ParseSummary(w.Value)
				if ok && string(w.Key) == string(layout.SummaryKey) {
					s.noteSummary(h, writes)
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		l.Name = filepath.Base(path)
		s.Logs = append(s.Logs, l)
	}
	// Badger's log numbers have five digits, or more once five digits are used up.
	slices.SortFunc(s.Logs, func(a, b badgerfile.Log) int {
		return cmp.Or(cmp.Compare(len(a.Name), len(b.Name)), strings.Compare(a.Name, b.Name))
	})
	return s, nil
}

// readTables reads the manifest, checks the tables that the manifest names, and finds the others.
func (s *Survey) readTables() error {
	f, err := os.Open(filepath.Join(s.dir, badgerfile.ManifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		tables, err := badgerfile.FilesOf(s.dir, badgerfile.TableFiles)
		if len(tables) > 0 {
			s.noteDamage(badgerfile.ManifestFile, errors.New("it is missing"))
		}
		return errors.Join(err, s.findSummaries(tables))
	}
	if err != nil {
		return err
	}
	defer f.Close()
	manifest, err := badgerfile.ReadManifest(f)
	if err != nil {
		s.noteDamage(badgerfile.ManifestFile, err)
		tables, err := badgerfile.FilesOf(s.dir, badgerfile.TableFiles)
		return errors.Join(err, s.findSummaries(tables))
	}
	failed := s.checkTables(manifest)
	paths, err := badgerfile.FilesOf(s.dir, badgerfile.TableFiles)
	for _, path := range paths {
		if !slices.Contains(s.Named, path) {
			s.Strays = append(s.Strays, path)
		}
	}
	return errors.Join(failed, err)
}

// checkTables checks the tables that the manifest names, several at the same time.
func (s *Survey) checkTables(manifest []badgerfile.ManifestTable) error {
	var (
		mu     sync.Mutex // guards s, and failed
		failed error
		wg     sync.WaitGroup
		names  = make(chan string)
	)
	for range min(runtime.GOMAXPROCS(0), 8, len(manifest)) {
		wg.Go(func() {
			for name := range names {
				var version uint64
				var newest layout.Summary
				path := filepath.Join(s.dir, name)
				err := badgerfile.WithTable(path, func(t badgerfile.Table) (err error) {
					version, newest, err = checkTable(t)
					return err
				})
				mu.Lock()
				var unread *fs.PathError
				switch {
				case err == nil:
					s.tables = max(s.tables, version)
					s.noteSummary(newest, nil)
				case errors.Is(err, fs.ErrNotExist):
					s.noteDamage(name, errors.New("it is missing"))
				case errors.As(err, &unread):
					failed = err
				default:
					s.noteDamage(name, err)
				}
				mu.Unlock()
			}
		})
	}
	for _, t := range manifest {
		if t.Level == 0 {
			s.Level0++
		}
		if !t.Plain { // a store neither compresses nor encrypts
			s.Foreign = t.Name
		}
		s.Named = append(s.Named, filepath.Join(s.dir, t.Name))
		names <- t.Name
	}
	close(names)
	wg.Wait()
	return failed
}

// findSummaries searches for a summary in tables without a readable manifest. A summary shows that
// the tables belong to a store.
func (s *Survey) findSummaries(tables []string) error {
	for _, path := range tables {
		err := badgerfile.WithTable(path, func(t badgerfile.Table) error {
			_, newest, err := checkTable(t)
			s.noteSummary(newest, nil)
			return err
		})
		if errors.As(err, new(*fs.PathError)) {
			return err
		}
	}
	return nil
}

// noteSummary records a summary if the summary is newer than the summary of the survey. At the same
// seq, a summary with writes replaces the summary of the survey.
func (s *Survey) noteSummary(h layout.Summary, writes []layout.Write) {
	if h.Seq > s.Summary.Seq || h.Seq == s.Summary.Seq && writes != nil {
		s.Summary, s.Writes = h, writes
	}
}

// noteDamage records the damage of a file.
func (s *Survey) noteDamage(name string, err error) {
	s.damage = append(s.damage, fmt.Errorf("%s: %w", name, err))
}

// contiguousTo returns the number of the last commit before the first gap. gap describes the gap,
// and is nil if there is no gap.
func (s *Survey) contiguousTo() (seq uint64, gap error) {
	seq = s.tables
	for _, l := range s.Logs {
		switch {
		case l.Last == 0:
			continue
		case l.First > seq+1:
			return seq, fmt.Errorf("commits %d to %d are in no table and no log: "+
				"a file is missing, or %s is an old one",
				seq+1, l.First-1, badgerfile.ManifestFile)
		case l.Gap != 0:
			return max(seq, l.Gap-1),
				fmt.Errorf("%s: commit %d is missing from its middle", l.Name, l.Gap)
		}
		seq = max(seq, l.Last)
	}
	return seq, nil
}

// Reconcile compares the directory with the last commits, and returns the commits that Open must
// make again. records has the older commit first. The error wraps ErrCorrupt, and says what is
// wrong and where, unless a file could not be read.
func (s *Survey) Reconcile(records []commitfile.Record) (redo []commitfile.Record, err error) {
	damage := s.damage
	seq, gap := s.contiguousTo()
	if gap != nil {
		damage = append(damage, gap)
	}
	if len(damage) > 0 {
		return nil, s.CorruptError(damage...)
	}
	if len(records) == 0 {
		return nil, s.CorruptError(commitfile.ErrNoRecord)
	}
	if s.Summary.Seq != seq {
		return nil, s.CorruptError(fmt.Errorf(
			"the summary of commit %d is missing, and that of commit %d is there",
			seq, s.Summary.Seq))
	}
	have := seq
	for _, record := range records {
		if seq > 0 && record.Store != s.Summary.Store {
			return nil, s.CorruptError(fmt.Errorf("%s belongs to another store", commitfile.Name))
		}
		if seq > 0 && record.Seq == seq && record.Summary != s.Summary {
			return nil, s.CorruptError(fmt.Errorf(
				"%s has another history: %v there, and %v in the tables",
				commitfile.Name, record.Summary, s.Summary))
		}
		if record.Seq == have+1 && len(record.Writes) > 0 {
			redo = append(redo, record)
			have++
		}
	}
	switch newest := records[len(records)-1].Seq; {
	case have < newest:
		return nil, s.CorruptError(s.lostError(seq, newest))
	case seq > newest+1:
		return nil, s.CorruptError(fmt.Errorf(
			"%s: its last commit is %d, and there are %d: it is an old one, or damaged",
			commitfile.Name, newest, seq))
	default:
		return redo, s.checkOrphans(newest)
	}
}

// checkOrphans returns an error if a table that the manifest does not name holds the newest version
// of an entry, i.e. a failed compaction lost data. Only commits up to upTo count. A named table or
// a log with the same version, or a later version, makes the version in the stray table
// superfluous.
//
// A process that ends in the middle of a compaction leaves stray tables. Either new tables are
// stray, and the manifest still names the old tables, or the old tables are stray. The stray tables
// are superfluous, and Badger will delete the stray tables, unless the compaction failed; see
// the type compactions of package badgerdb.
func (s *Survey) checkOrphans(upTo uint64) error {
	newest := make(map[string]uint64)
	for _, path := range s.Strays {
		// A damaged stray table was not finished, or was being deleted.
		if err := badgerfile.EachVersion(path, func(key []byte, version uint64) {
			if version <= upTo {
				newest[string(key)] = max(newest[string(key)], version)
			}
		}); errors.As(err, new(*fs.PathError)) {
			return err
		}
	}
	note := func(key []byte, version uint64) {
		if v, ok := newest[string(key)]; ok && v <= version {
			delete(newest, string(key))
		}
	}
	for _, path := range s.Named {
		if len(newest) == 0 {
			return nil
		}
		if err := badgerfile.EachVersion(path, note); err != nil {
			return err
		}
	}
	for _, l := range s.Logs {
		path := filepath.Join(s.dir, l.Name)
		if _, err := badgerfile.ReadLog(path, func(version uint64, writes []layout.Write) error {
			for _, w := range writes {
				note(w.Key, version)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	if len(newest) == 0 {
		return nil
	}
	return s.CorruptError(fmt.Errorf(
		"%d entries are only in tables that %s does not name, such as %s: a compaction failed",
		len(newest), badgerfile.ManifestFile, filepath.Base(s.Strays[0])))
}

// lostError returns an error that says which commits are lost, and how.
func (s *Survey) lostError(seq, newest uint64) error {
	if len(s.Logs) > 0 {
		if l := s.Logs[len(s.Logs)-1]; l.Torn {
			return fmt.Errorf("%s is damaged at byte %d: commits %d to %d are lost",
				l.Name, l.End, seq+1, newest)
		}
	}
	return fmt.Errorf("commits %d to %d are lost: a log or a table is missing or was cut off, "+
		"or %s is an old one",
		seq+1, newest, badgerfile.ManifestFile)
}

// CorruptError returns an error that wraps backend.ErrCorrupt, and says what to do about the
// damage.
func (s *Survey) CorruptError(damage ...error) error {
	return fmt.Errorf("%w: %s: restore the directory from a backup, "+
		"or open what is left with Options.Recover: %w",
		backend.ErrCorrupt, s.dir, errors.Join(damage...))
}

// Clean removes the files that Badger would read and does not need, so that the files can do no
// harm. Clean also cuts off the bytes after the last transaction of a log. Call Clean only once it
// is certain that no data is lost by the removal.
//
// Values are small enough for the log and the tables. So Badger's value log and statistics are
// empty, and the registry of encryption keys is empty too.
func (s *Survey) Clean() error {
	var errs []error
	paths, err := badgerfile.FilesOf(s.dir, badgerfile.ValueLogs)
	errs = append(errs, err)
	paths = append(paths, filepath.Join(s.dir, "DISCARD"), filepath.Join(s.dir, "KEYREGISTRY"))
	for _, path := range paths {
		if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, l := range s.Logs {
		path := filepath.Join(s.dir, l.Name)
		switch {
		case l.Last == 0:
			errs = append(errs, os.Remove(path))
		case l.Torn:
			errs = append(errs, os.Truncate(path, l.End))
		}
	}
	return errors.Join(errs...)
}

// checkTable checks every block, and returns the highest version in the table and the newest
// summary. Without a summary in the table, newest is the zero summary. err is the first damage.
func checkTable(t badgerfile.Table) (version uint64, newest layout.Summary, err error) {
	t.Blocks(func(i int, block []byte, damage error) {
		if damage == nil {
			if key, ok := t.FirstKey(i + 1); ok && string(key) < string(layout.SummaryKey) {
				return // the summaries are in later blocks
			}
			damage = badgerfile.Entries(block, func(key []byte, _ uint64, value []byte) {
				h, ok := layout.ParseSummary(value)
				if ok && string(key) == string(layout.SummaryKey) && h.Seq > newest.Seq {
					newest = h
				}
			})
		}
		err = cmp.Or(err, damage)
	})
	return t.MaxVersion(), newest, err
}
