package badgerdb

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/dgraph-io/badger/v4"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/layout"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/survey"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A fixture is a directory as a crash leaves it, with tables and a log, and what has been
// acknowledged of it.
type fixture struct {
	dir     string
	entries map[string]string
}

// copy returns a copy of its own to a test.
func (f fixture) copy(t testing.TB) fixture {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "copy")
	copyDir(t, f.dir, dir)
	return fixture{dir, f.entries}
}

// newFixture makes commits of ten entries: tables from earlier runs, and a log.
func newFixture(t testing.TB) fixture {
	t.Helper()
	f := fixture{filepath.Join(t.TempDir(), "store"), make(map[string]string)}
	live := filepath.Join(t.TempDir(), "live")
	put := func(db *DB, commits int) {
		for range commits {
			var changes []backend.Change
			for range 10 {
				key := fmt.Sprintf("k%04d", len(f.entries))
				f.entries[key] = strings.Repeat(key, 20)
				changes = append(changes, change(key, f.entries[key], 0))
			}
			require.NoError(t, db.Apply(t.Context(), changes...))
		}
	}
	for range 2 {
		db, err := Open(live, Options{})
		require.NoError(t, err)
		put(db, 20)
		require.NoError(t, db.Close())
	}
	db := open(t, live)
	put(db, 20)
	for key := range maps.Keys(f.entries) { // as a revocation does
		if strings.HasSuffix(key, "7") {
			f.entries[key] = "revoked"
			require.NoError(t, db.Apply(t.Context(), change(key, "revoked", 1)))
		}
	}
	copyLive(t, live, f.dir)
	return f
}

// copyLive copies a directory that is open. Badger may be compacting: a copy is of one moment if no
// file has come or gone meanwhile.
func copyLive(t testing.TB, from, to string) {
	t.Helper()
	for before := names(t, from); ; {
		copyDir(t, from, to)
		after := names(t, from)
		if slices.Equal(before, after) {
			return
		}
		before = after
		require.NoError(t, os.RemoveAll(to))
	}
}

func names(t testing.TB, dir string) (names []string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, f := range files {
		names = append(names, f.Name())
	}
	return names
}

func copyDir(t testing.TB, from, to string) {
	t.Helper()
	require.NoError(t, os.MkdirAll(to, 0o700))
	files, err := os.ReadDir(from)
	require.NoError(t, err)
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(from, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		require.NoError(t, err)
		path := filepath.Join(to, f.Name())
		require.NoError(t, os.WriteFile(path, bytes.TrimRight(data, "\x00"), 0o600))
		require.NoError(t, os.Truncate(path, int64(len(data)))) // logs are mostly holes
	}
}

// file returns the first or the last file that a pattern matches.
func (f fixture) file(t testing.TB, pattern string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(f.dir, pattern))
	require.NoError(t, err)
	require.NotEmpty(t, names, pattern)
	return names[0]
}

// read returns the entries of a DB.
func read(t testing.TB, db *DB) map[string]string {
	t.Helper()
	got := make(map[string]string)
	for e, err := range db.Scan(t.Context(), nil, nil) {
		require.NoError(t, err)
		got[string(e.Key)] = string(e.Value)
	}
	return got
}

func edit(t testing.TB, path string, change func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, change(data), 0o600))
}

// logEnd returns where the transactions of a log end.
func logEnd(t testing.TB, path string) int64 {
	t.Helper()
	l, err := badgerfile.ReadLog(path, nil)
	require.NoError(t, err)
	return l.End
}

func flip(at func(data []byte) int) func([]byte) []byte {
	return func(data []byte) []byte {
		data[at(data)] ^= 0x10
		return data
	}
}

// damages are what may happen to one file, and what an error says of it.
var damages = []struct {
	name    string
	harm    func(t *testing.T, f fixture)
	refused string // empty: it is intact all the same
	left    int    // entries after a recovery, as they were; -1: some
}{
	{"nothing", func(*testing.T, fixture) {}, "", 0},
	{"a bit of the log", func(t *testing.T, f fixture) {
		log := f.file(t, "*.mem")
		end := logEnd(t, log)
		edit(t, log, flip(func([]byte) int { return int(end / 2) }))
	}, ".mem is damaged at byte", -1},
	{"a page of the log", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.mem"), func(b []byte) []byte { clear(b[8192:12288]); return b })
	}, "are lost", -1},
	{"the end of the log, two commits", func(t *testing.T, f fixture) {
		log := f.file(t, "*.mem")
		require.NoError(t, os.Truncate(log, logEnd(t, log)-1))
	}, "", 0},
	{"the end of the log, more commits", func(t *testing.T, f fixture) {
		log := f.file(t, "*.mem")
		require.NoError(t, os.Truncate(log, logEnd(t, log)-2000))
	}, "are lost", -1},
	{"the whole log", func(t *testing.T, f fixture) {
		require.NoError(t, os.Remove(f.file(t, "*.mem")))
	}, "are lost", -1},
	{"the header of the log", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.mem"), flip(func([]byte) int { return 3 }))
	}, "are lost", -1},
	{"what follows the log", func(t *testing.T, f fixture) {
		log := f.file(t, "*.mem")
		end := logEnd(t, log)
		edit(t, log, func(b []byte) []byte { copy(b[end:], strings.Repeat("\xff", 40)); return b })
	}, "", 0},
	{"a log that was only just made", func(t *testing.T, f fixture) {
		require.NoError(t, os.WriteFile(filepath.Join(f.dir, "00007.mem"), nil, 0o600))
	}, "", 0},
	{"a bit of a table", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.sst"), flip(func([]byte) int { return 5000 }))
	}, "is damaged", -1},
	{"the index of a table", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.sst"), flip(func(b []byte) int { return len(b) - 60 }))
	}, "is damaged", -1},
	{"the end of a table", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.sst"), flip(func(b []byte) int { return len(b) - 4 }))
	}, "is damaged", -1},
	{"half of a table", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.sst"), func(b []byte) []byte { return b[:len(b)/2] })
	}, "is damaged", -1},
	{"all bytes of a table", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "*.sst"), func(b []byte) []byte { clear(b); return b })
	}, "leads nowhere", -1},
	{"a table", func(t *testing.T, f fixture) {
		require.NoError(t, os.Remove(f.file(t, "*.sst")))
	}, "it is missing", -1},
	{"the manifest", func(t *testing.T, f fixture) {
		require.NoError(t, os.Remove(f.file(t, "MANIFEST")))
	}, "no MANIFEST", 600},
	{"a bit of the manifest", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "MANIFEST"), flip(func(b []byte) int { return len(b) - 2 }))
	}, "", 0},
	{"the end of the manifest", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "MANIFEST"), func(b []byte) []byte { return b[:len(b)-2] })
	}, "", 0},
	{"a table that Badger has written again under another name", func(t *testing.T, f fixture) {
		require.NoError(t, os.Rename(f.file(t, "*.sst"), filepath.Join(f.dir, "000099.sst")))
	}, "", 0},
	{"LAST", func(t *testing.T, f fixture) {
		require.NoError(t, os.Remove(f.file(t, "LAST")))
	}, "no LAST", 600},
	{"one slot of LAST", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "LAST"), flip(func([]byte) int { return 30 }))
	}, "", 0},
	{"the other slot of LAST", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "LAST"), flip(func([]byte) int { return commitfile.SlotSize + 30 }))
	}, "", 0},
	{"all of LAST", func(t *testing.T, f fixture) {
		edit(t, f.file(t, "LAST"), func(b []byte) []byte { clear(b); return b })
	}, "LAST holds no whole commit", 600},
	{"another store's LAST", func(t *testing.T, f fixture) {
		other := newFixture(t)
		data, err := os.ReadFile(other.file(t, "LAST"))
		require.NoError(t, err)
		edit(t, f.file(t, "LAST"), func([]byte) []byte { return data })
	}, "LAST", 600},
	{"what Badger does not need", func(t *testing.T, f fixture) {
		for _, pattern := range []string{"*.vlog", "KEYREGISTRY", "DISCARD"} {
			edit(t, f.file(t, pattern), func(b []byte) []byte {
				for i := range b {
					b[i] = byte(i*i) | 1
				}
				return b
			})
		}
	}, "", 0},
}

// A damaged directory is refused, and not changed, or all that was acknowledged is there.
func TestDamage(t *testing.T) {
	whole := newFixture(t)
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			f := whole.copy(t)
			tt.harm(t, f)
			before := tree(t, f.dir)
			db, err := Open(f.dir, Options{})
			if tt.refused == "" {
				require.NoError(t, err)
				defer db.Close()
				require.Equal(t, f.entries, read(t, db))
				require.NoError(t, db.Check(t.Context()))
				return
			}
			require.ErrorIs(t, err, backend.ErrCorrupt)
			require.ErrorContains(t, err, tt.refused)
			require.ErrorContains(t, err, "Options.Recover")
			require.Equal(t, before, tree(t, f.dir))
		})
	}
}

// A recovery opens what is left, says what is lost, and leaves a directory that is whole again.
func TestRecover(t *testing.T) {
	whole := newFixture(t)
	for _, tt := range damages {
		t.Run(tt.name, func(t *testing.T) {
			f := whole.copy(t)
			tt.harm(t, f)
			var lost error
			tell := func(err error) {
				require.NoError(t, lost, "it is told once")
				lost = err
			}
			db, err := Open(f.dir, Options{Recover: tell})
			require.NoError(t, err)
			require.NoError(t, db.Check(t.Context()))
			left := read(t, db)
			if tt.refused == "" {
				if lost != nil {
					require.ErrorContains(t, lost, "all 600 entries are left")
				}
				require.Equal(t, f.entries, left)
				require.NoError(t, db.Close())
				return
			}
			require.ErrorIs(t, lost, backend.ErrCorrupt)
			require.ErrorContains(t, lost, fmt.Sprintf("%d", len(left)))
			if tt.left >= 0 {
				require.Len(t, left, tt.left)
				require.Equal(t, f.entries, left)
			}
			require.NotEmpty(t, left)
			for key, value := range left {
				if value != f.entries[key] {
					require.Equal(t, strings.Repeat(key, 20), value, "an older version of its own")
				}
			}
			require.NoError(t, db.Apply(t.Context(), change("new", "new", 0)))
			require.NoError(t, db.Close())

			db, err = Open(f.dir, Options{})
			require.NoError(t, err, "it is whole again")
			defer db.Close()
			left["new"] = "new"
			require.Equal(t, left, read(t, db))
			away, err := filepath.Glob(filepath.Join(f.dir, "damaged-*"))
			require.NoError(t, err)
			require.Len(t, away, 1, "what was damaged is kept")
		})
	}
}

// A recovery that cannot prove that nothing is lost removes the entries of Options.Forget. Any
// other recovery keeps these entries.
func TestRecoverForgets(t *testing.T) {
	for lost, file := range map[bool]string{true: "LAST", false: "MANIFEST"} {
		t.Run(file, func(t *testing.T) {
			dir := t.TempDir()
			db := open(t, dir)
			require.NoError(t, db.Apply(t.Context(), change("state", "whole", 0),
				change("state2", "v", 0), change("gone", "v", 0)))
			require.NoError(t, db.Apply(t.Context(), change("state", "complete", 1),
				backend.Change{Key: []byte("gone"), Expect: 1, Delete: true}))
			require.NoError(t, db.Close())
			require.NoError(t, os.Remove(filepath.Join(dir, file)))

			forget := [][]byte{[]byte("absent"), []byte("gone"), []byte("state")}
			want := map[string]string{"state2": "v"}
			if !lost {
				want["state"] = "complete"
			}
			for range 2 {
				db, err := Open(dir, Options{Recover: func(error) {}, Forget: forget})
				require.NoError(t, err)
				require.NoError(t, db.Check(t.Context()))
				require.Equal(t, want, read(t, db))
				require.NoError(t, db.Close())
			}
		})
	}
}

// The newest version of an entry is damaged in a way that passes Badger's checksum: the entry is
// gone after a recovery, and no older version of it comes back.
func TestRecoverDoesNotBringBackOlderVersions(t *testing.T) {
	dir := t.TempDir()
	db := open(t, dir)
	require.NoError(t, db.Apply(t.Context(), change("k", "active", 0), change("other", "o", 0)))
	require.NoError(t, db.Apply(t.Context(), change("k", "revoked", 1)))
	forge(t, db, "k", func(value []byte) { value[len(value)-1] ^= 1 })
	_, err := db.Get(t.Context(), []byte("k"))
	require.ErrorIs(t, err, backend.ErrCorrupt)
	require.ErrorIs(t, db.Check(t.Context()), backend.ErrCorrupt)
	require.NoError(t, db.Close())
	require.NoError(t, os.Remove(filepath.Join(dir, "LAST")))

	db, err = Open(dir, Options{Recover: func(error) {}})
	require.NoError(t, err)
	defer db.Close()
	require.Equal(t, map[string]string{"other": "o"}, read(t, db))
}

// forge writes over an entry behind the committer's back.
func forge(t *testing.T, db *DB, key string, change func(value []byte)) {
	t.Helper()
	txn := db.badger.NewTransactionAt(db.durable.Load(), true)
	defer txn.Discard()
	item, err := txn.Get(layout.StoredKey([]byte(key)))
	require.NoError(t, err)
	value, err := item.ValueCopy(nil)
	require.NoError(t, err)
	change(value)
	require.NoError(t, txn.SetEntry(badger.NewEntry(layout.StoredKey([]byte(key)), value)))
	ts := db.durable.Load() + 1
	require.NoError(t, txn.CommitAt(ts, nil))
	db.durable.Store(ts)
}

// A damaged entry ends a scan. The scan first yields all entries before the damage.
func TestScanReadsUpToDamage(t *testing.T) {
	db := open(t, t.TempDir())
	require.NoError(t, db.Apply(t.Context(), change("a", "v", 0), change("b", "v", 0),
		change("c", "v", 0), change("d", "v", 0)))
	forge(t, db, "c", func(value []byte) { value[len(value)-1] ^= 1 })
	for name, scan := range map[string]iter.Seq2[backend.Entry, error]{
		"ab": db.Scan(t.Context(), nil, nil),
		"AB": db.Snapshot(t.Context(), nil, nil),
		"d":  db.ScanDown(t.Context(), nil, nil),
	} {
		var keys string
		var failed error
		for e, err := range scan {
			require.NoError(t, failed, "the error is the last pair")
			keys, failed = keys+string(e.Key), err
		}
		require.ErrorIs(t, failed, backend.ErrCorrupt)
		require.Equal(t, strings.ToLower(name), keys)
	}
}

// Entries that stand under another's key, or are missing, are noticed.
func TestCheck(t *testing.T) {
	db := open(t, t.TempDir())
	ctx := t.Context()
	require.NoError(t, db.Check(ctx), "an empty store")
	for n := range 3 * 16 * pageEntries / backend.MaxChanges {
		var changes []backend.Change
		for i := range backend.MaxChanges {
			changes = append(changes, change(fmt.Sprintf("k%d-%d", n, i), "v", 0))
		}
		require.NoError(t, db.Apply(ctx, changes...))
	}
	require.NoError(t, db.Apply(ctx, change("k0-0", "w", 1),
		backend.Change{Key: []byte("k0-1"), Expect: 1, Delete: true}))
	require.NoError(t, db.Check(ctx))
	ended, cancel := context.WithCancel(ctx)
	cancel()
	require.ErrorIs(t, db.Check(ended), context.Canceled)

	db.summary.Sum++ // as if an entry had been lost
	require.NoError(t, db.Apply(ctx, change("k", "v", 0)))
	err := db.Check(ctx)
	require.ErrorIs(t, err, backend.ErrCorrupt)
	require.ErrorContains(t, err, "were written")
}

// A table that is damaged while it is open gives ErrCorrupt, and never another value.
func TestDamageWhileOpen(t *testing.T) {
	f := newFixture(t)
	db := open(t, f.dir)
	for _, name := range names(t, f.dir) {
		if !strings.HasSuffix(name, ".sst") {
			continue
		}
		file, err := os.OpenFile(filepath.Join(f.dir, name), os.O_RDWR, 0)
		require.NoError(t, err)
		info, err := file.Stat()
		require.NoError(t, err)
		for at := int64(100); at < info.Size()*3/4; at += 400 {
			b := make([]byte, 1)
			_, err := file.ReadAt(b, at)
			require.NoError(t, err)
			b[0] ^= 4
			_, err = file.WriteAt(b, at)
			require.NoError(t, err)
		}
		require.NoError(t, file.Close())
	}
	require.ErrorIs(t, db.Check(t.Context()), backend.ErrCorrupt)
	corrupt := 0
	for key, value := range f.entries {
		e, err := db.Get(t.Context(), []byte(key))
		switch {
		case errors.Is(err, backend.ErrCorrupt):
			corrupt++
		case errors.Is(err, backend.ErrNotFound): // its key is damaged
		default:
			require.NoError(t, err)
			require.Contains(t, []string{value, strings.Repeat(key, 20)}, string(e.Value))
		}
	}
	require.NotZero(t, corrupt)
}

// A commit that was cut off, in Badger or in LAST, is made or not, and the next one follows.
func TestCommitsThatWereCutOff(t *testing.T) {
	f := newFixture(t)
	log := f.file(t, "*.mem")
	for name, harm := range map[string]func(dir string){
		"in Badger": func(dir string) {
			require.NoError(t, os.Truncate(filepath.Join(dir, filepath.Base(log)),
				logEnd(t, log)-3))
		},
		"in LAST": func(dir string) {
			l, err := commitfile.Open(dir)
			require.NoError(t, err)
			records, _, err := l.Records()
			require.NoError(t, err)
			require.NoError(t, l.Close())
			at := int(records[1].Seq%2) * commitfile.SlotSize
			edit(t, filepath.Join(dir, commitfile.Name), func(b []byte) []byte {
				clear(b[at : at+100])
				return b
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := f.copy(t).dir
			harm(dir)
			for n := range uint64(2) {
				db, err := Open(dir, Options{})
				require.NoError(t, err)
				require.Equal(t, f.entries, read(t, db))
				require.NoError(t, db.Check(t.Context()))
				f.entries["after"] = "v"
				require.NoError(t, db.Apply(t.Context(), change("after", "v", n)))
				require.NoError(t, db.Close())
			}
			delete(f.entries, "after")
		})
	}
}

// A commit whose copy in LAST was not finished is there, is read by everybody, and so must not be
// lost in silence later.
func TestCommitWithoutItsCopy(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	require.NoError(t, db.Apply(t.Context(), change("k", "active", 0)))
	require.NoError(t, db.Close())
	db = open(t, dir)
	// The process will have ended before.
	db.writeCommitFile = func(commitfile.Record) error { return nil }
	require.NoError(t, db.Apply(t.Context(), change("k", "revoked", 1)))
	// Where the next Open finds the commit: in the log, or in a table.
	for _, flushed := range []bool{false, true} {
		f := fixture{filepath.Join(t.TempDir(), "crash"), map[string]string{"k": "revoked"}}
		copyDir(t, dir, f.dir)
		if flushed {
			s, err := survey.Read(f.dir)
			require.NoError(t, err)
			bare := &DB{dir: f.dir, space: newSpaceGuard(f.dir, 0, 0)}
			bare.compactions = newCompactions(bare)
			require.NoError(t, s.Clean())
			bare.badger, err = badger.OpenManaged(bare.options(Options{Logger: quiet}))
			require.NoError(t, err)
			require.NoError(t, bare.badger.Close())
		}
		db, err := Open(f.dir, Options{})
		require.NoError(t, err)
		require.Equal(t, f.entries, read(t, db))
		require.NoError(t, db.Close())
		edit(t, filepath.Join(f.dir, "MANIFEST"), func(b []byte) []byte { return b[:len(b)-2] })
		s, err := survey.Read(f.dir)
		require.NoError(t, err)
		for _, path := range s.Strays {
			require.NoError(t, os.Remove(path))
		}
		db, err = Open(f.dir, Options{})
		if flushed {
			require.ErrorIs(t, err, backend.ErrCorrupt)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, f.entries, read(t, db), "it is made again")
		require.NoError(t, db.Close())
	}
}
