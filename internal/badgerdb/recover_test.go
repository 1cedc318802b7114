package badgerdb

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/fsys"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// tree returns the path, mode and content of everything in a directory, and of the directory.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := make(map[string]string)
	require.NoError(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content := ""
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			content = fmt.Sprintf("%d bytes %x", len(data), sha256.Sum256(data))
		}
		name, err := filepath.Rel(dir, path)
		all[name] = fmt.Sprint(info.Mode(), " ", content)
		return err
	}))
	return all
}

// put writes files, and makes the directories whose names end with a slash.
func put(t testing.TB, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		if strings.HasSuffix(name, "/") {
			require.NoError(t, os.MkdirAll(path, 0o755))
			continue
		}
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
}

// ways are the options with which a directory may be opened.
var ways = map[string]Options{
	"":              {},
	" with Recover": {Recover: func(error) {}},
	" if it exists": {MustExist: true},
}

// Names that a recovery could have.
const (
	work = recoveringTo + "20261125T120000.000000"
	away = damagedTo + "20261125T120000.000000"
)

// A directory of somebody else's is refused and not touched, whatever names are in it.
func TestForeignDirectoryIsUntouched(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"a file":                     {"thesis.tex": "t"},
		"recovered":                  {"thesis.tex": "t", "recovered/photo.jpg": "p"},
		"recovered alone":            {"recovered/photo.jpg": "p"},
		"recovered, empty":           {"recovered/": ""},
		"moving":                     {"moving/photo.jpg": "p", "moving/MANIFEST": "m"},
		"moving, empty":              {"moving/": ""},
		"recovering":                 {"recovering/photo.jpg": "p"},
		"recovering, with a time":    {work + "/photo.jpg": "p", away + "/photo.jpg": "p"},
		"a file RECOVERY":            {work + "/RECOVERY": recoveryMagic + "to my family"},
		"a file for a directory":     {work: "text", away: "text"},
		"a file LAST":                {"LAST": "will and testament"},
		"a short file LAST":          {"LAST": "0"},
		"an empty file LAST, more":   {"LAST": "", "thesis.tex": "t"},
		"a long file LAST of zeros":  {"LAST": strings.Repeat("\x00", commitfile.SlotSize)},
		"a directory LAST":           {"LAST/": ""},
		"a file LOCK":                {"LOCK": "the door"},
		"a directory LOCK":           {"LOCK/": ""},
		"a value log":                {"000001.vlog": "v"},
		"a film":                     {"holiday.vlog": "v"},
		"a memory":                   {"childhood.mem": "m"},
		"a log that is none":         {"00001.mem": "m"},
		"a table that is none":       {"000001.sst": "s"},
		"a manifest of another kind": {"MANIFEST": "version 1"},
		"a registry":                 {"KEYREGISTRY": "hives"},
		"statistics":                 {"DISCARD": "pile"},
	} {
		for way, opts := range ways {
			t.Run(name+way, func(t *testing.T) {
				dir := t.TempDir()
				put(t, dir, files)
				require.NoError(t, os.Chmod(dir, 0o755))
				before := tree(t, dir)
				db, err := Open(dir, opts)
				if err == nil {
					require.NoError(t, db.Close())
				}
				require.Equal(t, before, tree(t, dir))
				require.ErrorContains(t, err, "is not a key store")
				require.NotErrorIs(t, err, backend.ErrCorrupt)
			})
		}
	}
}

// A process that ended while it made a new store leaves a LOCK, or a LAST without a commit. A store
// is made there, unless one must exist.
func TestStoreThatWasBeingMade(t *testing.T) {
	for name, files := range map[string]map[string]string{
		"LOCK":               {"LOCK": "1\n"},
		"LOCK of a store":    {"LOCK": string(fsys.ThisProcess().Encode())},
		"empty LOCK":         {"LOCK": ""},
		"empty LAST":         {"LAST": ""},
		"LAST of zeros":      {"LAST": strings.Repeat("\x00", 84), "LOCK": "1\n"},
		"a file system root": {"lost+found/": "", "LAST": ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			put(t, dir, files)
			before := tree(t, dir)
			_, err := Open(dir, Options{MustExist: true})
			require.ErrorIs(t, err, fs.ErrNotExist)
			require.Equal(t, before, tree(t, dir))
			db := open(t, dir)
			require.Empty(t, read(t, db))
			require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
		})
	}
}

// A LAST that is damaged, with no other file beside it, is what is left of a store, and not a new
// store.
func TestDamagedCommitFileAlone(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, map[string]string{commitfile.Name: commitfile.Magic + strings.Repeat("x", 2000)})
	before := tree(t, dir)
	_, err := Open(dir, Options{})
	require.ErrorIs(t, err, backend.ErrCorrupt)
	require.Equal(t, before, tree(t, dir))
	var told error
	db, err := Open(dir, Options{Recover: func(err error) { told = err }})
	require.NoError(t, err)
	require.ErrorContains(t, told, "nothing is left")
	require.Empty(t, read(t, db))
	require.NoError(t, db.Close())
	require.Empty(t, read(t, open(t, dir)))
}

// What others have put into a good store's directory is left alone, and the store is opened with
// all that it has.
func TestFilesOfOthersInAStore(t *testing.T) {
	whole := newFixture(t)
	for name, files := range map[string]map[string]string{
		"recovered":        {"recovered/photo.jpg": "p"},
		"recovered, empty": {"recovered/": ""},
		"moving":           {"moving/MANIFEST": "m", "moving/000001.sst": "s"},
		"moving, empty":    {"moving/": ""},
		"recovering":       {"recovering/photo.jpg": "p"},
		"with a time":      {work + "/LAST": "p", away + "/LAST": "p"},
		"a file RECOVERY": {work + "/RECOVERY": recoveryMagic + strings.Repeat("x", 99),
			away + "/": ""},
		"names like Badger's": {"x.sst": "t", "DISCARDED": "d"},
	} {
		for way, opts := range ways {
			t.Run(name+way, func(t *testing.T) {
				f := whole.copy(t)
				put(t, f.dir, files)
				before := tree(t, f.dir)
				opts.Recover = nil
				if way == " with Recover" {
					opts.Recover = func(err error) { require.NoError(t, err, "nothing is damaged") }
				}
				db, err := Open(f.dir, opts)
				require.NoError(t, err)
				require.Equal(t, f.entries, read(t, db))
				require.NoError(t, db.Check(t.Context()))
				require.NoError(t, db.Close())
				after := tree(t, f.dir)
				for path := range before {
					if files[filepath.ToSlash(path)] != "" {
						require.Equal(t, before[path], after[path], path)
					}
				}
				for name := range files {
					require.Contains(t, after, filepath.Clean(name))
				}
			})
		}
	}
	for _, name := range []string{
		"notes.mem", "7.mem", "film.vlog", "1.vlog", "7.sst", "0000001.sst",
	} {
		t.Run(name, func(t *testing.T) { // Badger would read it
			f := whole.copy(t)
			put(t, f.dir, map[string]string{name: "text"})
			before := tree(t, f.dir)
			_, err := Open(f.dir, Options{Recover: func(error) {}})
			require.ErrorContains(t, err, name)
			require.Equal(t, before, tree(t, f.dir))
			require.NoError(t, os.Remove(filepath.Join(f.dir, name)))
			require.Equal(t, f.entries, read(t, open(t, f.dir)))
		})
	}
}

// Badger's files from before a change are not taken for the present ones, whatever directories
// there are.
func TestOlderFilesBesideAFolder(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	require.NoError(t, db.Apply(t.Context(), change("k", "active", 0)))
	require.NoError(t, db.Close())
	older := filepath.Join(t.TempDir(), "older")
	copyDir(t, dir, older)
	db = open(t, dir)
	require.NoError(t, db.Apply(t.Context(), change("k", "revoked", 1)))
	for n := range 5 {
		require.NoError(t, db.Apply(t.Context(), change(fmt.Sprint("other", n), "v", 0)))
	}
	require.NoError(t, db.Close())
	for _, name := range []string{"", "moving", "recovered", "recovering", work, away} {
		mixed := filepath.Join(t.TempDir(), "mixed")
		copyDir(t, older, mixed)
		require.NoError(t, os.Remove(filepath.Join(mixed, commitfile.Name)))
		last, err := os.ReadFile(filepath.Join(dir, commitfile.Name))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(mixed, commitfile.Name), last, 0o600))
		require.NoError(t, os.MkdirAll(filepath.Join(mixed, name), 0o700))
		before := tree(t, mixed)
		db, err := Open(mixed, Options{})
		if err == nil {
			require.NoError(t, db.Close())
		}
		require.ErrorIs(t, err, backend.ErrCorrupt, name)
		require.Equal(t, before, tree(t, mixed), name)
	}
}

// lossy is a fixture of which commits are lost, and what a recovery leaves of the entries.
func lossy(t *testing.T) fixture {
	f := newFixture(t)
	log := f.file(t, "*.mem")
	require.NoError(t, os.Truncate(log, logEnd(t, log)-2000))
	sample := f.copy(t)
	db, err := Open(sample.dir, Options{Recover: func(error) {}})
	require.NoError(t, err)
	f.entries = read(t, db)
	require.NoError(t, db.Close())
	return f
}

// unnamed is a fixture whose manifest is gone, of which nothing is lost.
func unnamed(t *testing.T) fixture {
	f := newFixture(t)
	require.NoError(t, os.Remove(f.file(t, "MANIFEST")))
	return f
}

// A process is killed at each step of a recovery. The next Open goes on, and tells what is lost,
// unless that was told. An Open without Options.Recover refuses, and changes nothing, as long as it
// is not certain that what is lost was told.
func TestRecoveryIsKilledAtEachStep(t *testing.T) {
	for name, f := range map[string]fixture{"lossy": lossy(t), "whole": unnamed(t)} {
		t.Run(name, func(t *testing.T) {
			seen := make(map[string]int)
			for at := 1; ; at++ {
				dir := f.copy(t).dir
				killed, told, v := child{Dir: dir, Recover: true, KillAt: at}.run(t)
				if killed == "" {
					require.Empty(t, v.Text)
					require.True(t, told)
					break
				}
				step, _, _ := strings.Cut(killed, " 0")
				seen[step]++

				careful := filepath.Join(t.TempDir(), "careful")
				copyTree(t, dir, careful)
				before := tree(t, careful)
				db, err := Open(careful, Options{})
				if err == nil {
					require.True(t, told || name == "whole", killed)
					require.Equal(t, f.entries, read(t, db), killed)
					require.NoError(t, db.Close())
				} else { // also where the process was killed before it had noted that it has told
					require.NotEqual(t, "removed RECOVERY", killed)
					require.ErrorIs(t, err, backend.ErrCorrupt, killed)
					require.Equal(t, before, tree(t, careful), killed)
				}

				again, toldAgain, _ := child{Dir: dir, Recover: true, KillAt: 3}.run(t)
				calls := 0
				db, err = Open(dir, Options{Recover: func(err error) {
					require.ErrorIs(t, err, backend.ErrCorrupt)
					calls++
				}})
				require.NoError(t, err, "%s, %s", killed, again)
				require.Equal(t, f.entries, read(t, db), "%s, %s", killed, again)
				require.NoError(t, db.Check(t.Context()))
				require.NoError(t, db.Apply(t.Context(), change("afterwards", "v", 0)))
				require.NoError(t, db.Close())
				require.True(t, told || toldAgain || calls == 1, "%s, %s", killed, again)
				away := 0
				for _, name := range names(t, dir) {
					if strings.HasPrefix(name, damagedTo) {
						away++
						require.FileExists(t, filepath.Join(dir, name, commitfile.Name))
					}
					if strings.HasPrefix(name, recoveringTo) {
						left := names(t, filepath.Join(dir, name))
						require.Empty(t, left, "%s, %s", killed, again)
					}
				}
				require.Equal(t, 1, away, "%s, %s", killed, again)
				db, err = Open(dir, Options{})
				require.NoError(t, err)
				require.Len(t, read(t, db), len(f.entries)+1)
				require.NoError(t, db.Close())
			}
			t.Logf("killed at %v", seen)
			for _, step := range []string{
				"made its directory", "wrote RECOVERY.new", "wrote RECOVERY", "filled the database",
				"made the directory of the damaged files", "moved the damaged LAST",
				"moved the new MANIFEST", "moved the new LAST", "removed RECOVERY",
			} {
				require.Contains(t, seen, step)
			}
		})
	}
}

// copyTree is copyDir for a directory with others in it.
func copyTree(t testing.TB, from, to string) {
	t.Helper()
	copyFiles := func(from, to string) {
		require.NoError(t, os.MkdirAll(to, 0o700))
		files, err := os.ReadDir(from)
		require.NoError(t, err)
		for _, f := range files {
			if f.IsDir() {
				continue
			}
			data, err := os.ReadFile(filepath.Join(from, f.Name()))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(to, f.Name()), data, 0o600))
		}
	}
	err := filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			rel, _ := filepath.Rel(from, path)
			copyFiles(path, filepath.Join(to, rel))
		}
		return err
	})
	require.NoError(t, err)
}

// interrupted is a directory in which a recovery was killed when it had begun to move the new
// files.
func interrupted(t *testing.T) fixture {
	f := lossy(t)
	for at := 1; ; at++ {
		dir := f.copy(t).dir
		killed, _, _ := child{Dir: dir, Recover: true, KillAt: at}.run(t)
		require.NotEmpty(t, killed)
		if strings.HasPrefix(killed, "moved the new ") {
			return fixture{dir, f.entries}
		}
	}
}

func lastByte(b []byte) int { return len(b) - 1 }

// A recovery that was interrupted does not go on with files that are not those that it has written,
// nor beside a LAST that it does not know: the directory is refused, and not touched.
func TestInterruptedRecoveryIsVerified(t *testing.T) {
	f := interrupted(t)
	work := filepath.Base(f.file(t, recoveringTo+"*"))
	away := filepath.Base(f.file(t, damagedTo+"*"))
	other := newFixture(t)
	for name, harm := range map[string]func(t *testing.T, dir string){
		"a file is damaged": func(t *testing.T, dir string) {
			edit(t, filepath.Join(dir, work, "MANIFEST"), flip(lastByte))
		},
		"a file is missing": func(t *testing.T, dir string) {
			require.NoError(t, os.Remove(filepath.Join(dir, work, "MANIFEST")))
		},
		"a file that has moved is damaged": func(t *testing.T, dir string) {
			tables, err := badgerfile.FilesOf(dir, badgerfile.TableFiles)
			require.NoError(t, err)
			edit(t, tables[0], flip(func(b []byte) int { return len(b) / 2 }))
		},
		"RECOVERY is damaged": func(t *testing.T, dir string) {
			edit(t, filepath.Join(dir, work, recoveryName), flip(lastByte))
		},
		"LAST is another store's": func(t *testing.T, dir string) {
			last, err := os.ReadFile(filepath.Join(other.dir, commitfile.Name))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, commitfile.Name), last, 0o600))
		},
		"LAST is gone": func(t *testing.T, dir string) {
			require.NoError(t, os.Remove(filepath.Join(dir, away, commitfile.Name)))
		},
		"it is in another directory": func(t *testing.T, dir string) {
			require.NoError(t, os.Rename(filepath.Join(dir, away), filepath.Join(dir, "elsewhere")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "copy")
			copyTree(t, f.dir, dir)
			harm(t, dir)
			before := tree(t, dir)
			db, err := Open(dir, Options{})
			if err == nil {
				require.NoError(t, db.Close())
			}
			require.ErrorIs(t, err, backend.ErrCorrupt)
			require.Equal(t, before, tree(t, dir))
			if strings.HasPrefix(name, "a file") { // of the rest, what is left is recovered
				_, err = Open(dir, Options{Recover: func(error) {}})
				require.ErrorIs(t, err, backend.ErrCorrupt)
				require.ErrorContains(t, err, "a recovery was interrupted, and cannot continue")
				require.Equal(t, before, tree(t, dir))
			}
		})
	}
	db, err := Open(f.dir, Options{Recover: func(error) {}})
	require.NoError(t, err)
	require.Equal(t, f.entries, read(t, db))
	require.NoError(t, db.Close())
}

// A whole recovery of another store, or of another time, beside a good one is not believed.
func TestRecoveryOfAnotherStore(t *testing.T) {
	interrupted, good := interrupted(t), newFixture(t)
	for _, pattern := range []string{recoveringTo + "*", damagedTo + "*"} {
		from := interrupted.file(t, pattern)
		copyTree(t, from, filepath.Join(good.dir, filepath.Base(from)))
	}
	parts := func() map[string]string {
		all := tree(t, good.dir)
		maps.DeleteFunc(all, func(path, _ string) bool {
			return !strings.HasPrefix(path, recoveringTo) && !strings.HasPrefix(path, damagedTo)
		})
		return all
	}
	before := parts()
	require.NotEmpty(t, before)
	db := open(t, good.dir)
	require.Equal(t, good.entries, read(t, db))
	require.Equal(t, before, parts())
}

// otherProgram writes a Badger database as another program would: with its own keys, and with large
// values, in the value log.
func otherProgram(t *testing.T, dir, prefix string, c options.CompressionType) *badger.DB {
	t.Helper()
	db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil).WithCompression(c).
		WithValueThreshold(64).WithValueLogFileSize(1 << 20))
	require.NoError(t, err)
	for n := range 20 {
		require.NoError(t, db.Update(func(txn *badger.Txn) error {
			return txn.Set(fmt.Appendf(nil, "%s%d", prefix, n), []byte(strings.Repeat("v", 1000)))
		}))
	}
	return db
}

// Another program's Badger database is refused and not touched, be it open or not, whatever its
// keys are called.
func TestAnotherProgramsDatabase(t *testing.T) {
	for _, prefix := range []string{"user-", "e", "h"} {
		for way, opts := range ways {
			t.Run(prefix+way, func(t *testing.T) {
				dir := t.TempDir()
				db := otherProgram(t, dir, prefix, options.Snappy)
				for _, state := range []string{"open", "killed", "closed"} {
					at := dir
					if state == "killed" {
						at = filepath.Join(t.TempDir(), "killed")
						copyTree(t, dir, at)
						require.NoError(t, db.Close())
					}
					before := tree(t, at)
					ours, err := Open(at, opts)
					if err == nil {
						require.NoError(t, ours.Close())
					}
					require.Equal(t, before, tree(t, at), state)
					require.ErrorContains(t, err, "is not a key store", state)
					require.ErrorContains(t, err, "another program", state)
					require.NotErrorIs(t, err, backend.ErrCorrupt, state)
				}
				db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil))
				require.NoError(t, err)
				require.NoError(t, db.View(func(txn *badger.Txn) error {
					item, err := txn.Get([]byte(prefix + "7"))
					require.NoError(t, err)
					value, err := item.ValueCopy(nil)
					require.Equal(t, strings.Repeat("v", 1000), string(value))
					return err
				}))
				require.NoError(t, db.Close())
			})
		}
	}
	t.Run("in a store's directory", func(t *testing.T) {
		for _, compression := range []options.CompressionType{options.None, options.Snappy} {
			dir := t.TempDir()
			db, err := Open(dir, Options{})
			require.NoError(t, err)
			require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
			require.NoError(t, db.Close())
			require.NoError(t, otherProgram(t, dir, "user-", compression).Close())
			before := tree(t, dir)
			for way, opts := range ways {
				_, err = Open(dir, opts)
				require.ErrorIs(t, err, errForeign, "%s, %v", way, compression)
				require.Equal(t, before, tree(t, dir), "%s, %v", way, compression)
			}
		}
	})
}

// A store that is open holds Badger's lock from the first moment to the last.
func TestBadgersLock(t *testing.T) {
	dir := t.TempDir()
	other := func() error {
		db, err := badger.Open(badger.DefaultOptions(dir).WithLogger(nil))
		if err == nil {
			require.NoError(t, db.Close())
		}
		return err
	}
	f := lossy(t)
	dir = f.dir
	steps := 0
	db, err := Open(dir, Options{
		Recover: func(error) { require.ErrorContains(t, other(), "Another process") },
		crash: func(string) {
			steps++
			require.ErrorContains(t, other(), "Another process")
		},
	})
	require.NoError(t, err)
	require.NotZero(t, steps)
	require.ErrorContains(t, other(), "Another process")
	require.NoError(t, db.Close())
	require.NoError(t, other())
}

// An Options.Recover that panics, or that ends its goroutine, leaves nothing behind: the directory
// is free, and the next Open tells again.
func TestRecoverThatDoesNotReturn(t *testing.T) {
	for name, leave := range map[string]func(error){
		"panic":       func(error) { panic("in Recover") },
		"nil panic":   func(error) { panic(nil) },
		"its own end": func(error) { runtime.Goexit() },
	} {
		t.Run(name, func(t *testing.T) {
			f := lossy(t)
			done := make(chan error, 1)
			go func() {
				err := errors.New("Open did not return")
				defer func() { done <- err }()
				_, err = Open(f.dir, Options{Recover: leave})
			}()
			err := <-done
			require.Error(t, err)
			if name == "panic" {
				require.ErrorContains(t, err, "Options.Recover panicked: in Recover")
			}
			before := tree(t, f.dir)
			_, err = Open(f.dir, Options{})
			require.ErrorIs(t, err, backend.ErrCorrupt, "nobody has been told what is lost")
			require.NotErrorIs(t, err, backend.ErrLocked)
			require.Equal(t, before, tree(t, f.dir))
			var told error
			db, err := Open(f.dir, Options{Recover: func(err error) { told = err }})
			require.NoError(t, err)
			require.ErrorIs(t, told, backend.ErrCorrupt)
			require.ErrorContains(t, told, "are lost")
			require.Equal(t, f.entries, read(t, db))
			require.NoError(t, db.Close())
			require.Equal(t, f.entries, read(t, open(t, f.dir)))
		})
	}
}

// A recovery that was not told is damaged before it is: the next one tells of both.
func TestDamageAfterARecovery(t *testing.T) {
	f := lossy(t)
	_, err := Open(f.dir, Options{Recover: func(error) { panic("not now") }})
	require.ErrorContains(t, err, "not now")
	edit(t, f.file(t, "*.sst"), flip(func([]byte) int { return 5000 }))
	var told error
	db, err := Open(f.dir, Options{Recover: func(err error) { told = err }})
	require.NoError(t, err)
	require.ErrorContains(t, told, "are lost")
	require.ErrorContains(t, told, "is damaged")
	left := read(t, db)
	require.NotEmpty(t, left)
	require.Less(t, len(left), len(f.entries))
	require.NoError(t, db.Close())
	require.Equal(t, left, read(t, open(t, f.dir)))
}
