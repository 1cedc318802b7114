package badgerdb

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/badgerfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A change is not acknowledged when the files of the store are not in the directory any more, and
// Check says what is so. Nothing is served afterwards. What was acknowledged before is there when
// the directory is.
func TestFilesThatAreRemoved(t *testing.T) {
	only := func(pattern string) func(t *testing.T, dir, away string) {
		return func(t *testing.T, dir, away string) {
			require.NoError(t, os.Mkdir(away, 0o700))
			paths, err := filepath.Glob(filepath.Join(dir, pattern))
			require.NoError(t, err)
			require.NotEmpty(t, paths)
			require.NoError(t, os.Rename(paths[0], filepath.Join(away, filepath.Base(paths[0]))))
			// The removal has another time than the last change before, whatever the grain is.
			later := time.Now().Add(time.Second)
			require.NoError(t, os.Chtimes(dir, later, later))
		}
	}
	for name, c := range map[string]struct {
		remove  func(t *testing.T, dir, away string)
		missing string
	}{
		"the directory is renamed": {func(t *testing.T, dir, away string) {
			require.NoError(t, os.Rename(dir, away))
		}, commitfile.Name},
		"a copy replaces the directory": {func(t *testing.T, dir, away string) {
			require.NoError(t, os.Rename(dir, away))
			copyDir(t, away, dir)
		}, commitfile.Name},
		"an empty directory replaces the directory": {func(t *testing.T, dir, away string) {
			require.NoError(t, os.Rename(dir, away))
			require.NoError(t, os.Mkdir(dir, 0o700))
		}, commitfile.Name},
		"a file replaces the directory": {func(t *testing.T, dir, away string) {
			require.NoError(t, os.Rename(dir, away))
			require.NoError(t, os.WriteFile(dir, nil, 0o600))
		}, commitfile.Name},
		commitfile.Name: {only(commitfile.Name), commitfile.Name},
		"a log":         {only("*.mem"), ".mem"},
		"MANIFEST":      {only("MANIFEST"), "MANIFEST"},
		"a table":       {only("*.sst"), ".sst"},
		"a copy replaces the log": {func(t *testing.T, dir, away string) {
			require.NoError(t, os.Mkdir(away, 0o700))
			logs, err := badgerfile.FilesOf(dir, badgerfile.LogFiles)
			require.NoError(t, err)
			content, err := os.ReadFile(logs[0])
			require.NoError(t, err)
			require.NoError(t, os.Rename(logs[0], filepath.Join(away, filepath.Base(logs[0]))))
			require.NoError(t, os.WriteFile(logs[0], content, 0o600))
		}, ".mem"},
	} {
		for _, first := range []string{"a commit", "Check"} {
			t.Run(fmt.Sprintf("%s, then %s", name, first), func(t *testing.T) {
				top := t.TempDir()
				dir, away := filepath.Join(top, "store"), filepath.Join(top, "away")
				db, err := Open(dir, Options{})
				require.NoError(t, err)
				require.NoError(t, db.Apply(t.Context(), change("in a table", "v", 0)))
				require.NoError(t, db.Close())
				db, err = Open(dir, Options{})
				require.NoError(t, err)
				require.NoError(t, db.Apply(t.Context(), change("k", "old", 0)))
				require.NoError(t, db.Check(t.Context()))

				c.remove(t, dir, away)
				if first == "Check" {
					err = db.Check(t.Context())
				} else {
					err = db.Apply(t.Context(), change("k", "new", 1))
				}
				require.ErrorIs(t, err, backend.ErrFailed)
				require.ErrorContains(t, err, c.missing)
				require.ErrorContains(t, err, dir)
				_, err = db.Get(t.Context(), []byte("k"))
				require.ErrorIs(t, err, backend.ErrFailed)
				require.ErrorIs(t, db.Check(t.Context()), backend.ErrFailed)
				require.ErrorIs(t, db.Apply(t.Context(), change("k", "newer", 2)),
					backend.ErrFailed)

				// What was moved away is put back.
				if c.missing == commitfile.Name && name != commitfile.Name {
					require.NoError(t, os.RemoveAll(dir))
					require.NoError(t, os.Rename(away, dir))
				} else {
					files, err := os.ReadDir(away)
					require.NoError(t, err)
					for _, f := range files {
						require.NoError(t, os.Rename(filepath.Join(away, f.Name()),
							filepath.Join(dir, f.Name())))
					}
				}
				require.NoError(t, db.Close())
				db = open(t, dir)
				for _, key := range []string{"in a table", "k"} {
					_, err = db.Get(t.Context(), []byte(key))
					require.NoError(t, err)
				}
			})
		}
	}
}

// A store whose directory was deleted fails closed too.
func TestDirectoryThatIsDeleted(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	require.NoError(t, db.Apply(t.Context(), change("k", "old", 0)))
	require.NoError(t, os.RemoveAll(dir))
	require.ErrorIs(t, db.Apply(t.Context(), change("k", "new", 1)), backend.ErrFailed)
	require.ErrorIs(t, db.Check(t.Context()), backend.ErrFailed)
	require.NoError(t, os.Mkdir(dir, 0o700)) // or Close tries to write for seconds
	_ = db.Close()
}

// Tables are looked at again when the directory's modification time is old enough, since two
// changes may have one time.
func TestTableThatIsRemovedWithinATimeGrain(t *testing.T) {
	dir := t.TempDir()
	db, err := Open(dir, Options{})
	require.NoError(t, err)
	require.NoError(t, db.Apply(t.Context(), change("in a table", "v", 0)))
	require.NoError(t, db.Close())
	db, err = Open(dir, Options{})
	require.NoError(t, err)
	now := time.Now().Add(time.Hour) // the grain does not end, however slow the machine is
	require.NoError(t, os.Chtimes(dir, now, now))
	require.NoError(t, db.Apply(t.Context(), change("k", "v", 0)))
	tables, err := badgerfile.FilesOf(dir, badgerfile.TableFiles)
	require.NoError(t, err)
	away := filepath.Join(t.TempDir(), "away.sst")
	content, err := os.ReadFile(tables[0])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(away, content, 0o600))
	require.NoError(t, os.Remove(tables[0]))
	require.NoError(t, os.Chtimes(dir, now, now)) // as if it had been removed in the same grain
	db.presence.modified = now
	require.NoError(t, db.Apply(t.Context(), change("k", "v2", 1)),
		"the look at the tables may wait for a grain")
	old := time.Now().Add(-2 * timeGrain)
	require.NoError(t, os.Chtimes(dir, old, old))
	db.presence.modified = old // and as if the grain were over
	require.ErrorIs(t, db.Apply(t.Context(), change("k", "v3", 2)), backend.ErrFailed)
	require.NoError(t, os.WriteFile(tables[0], content, 0o600))
	require.NoError(t, db.Close())
}

// Compactions and logs that come and go while the store is checked and written are not taken for a
// removal.
func TestNothingIsMissedThatIsThere(t *testing.T) {
	db, err := Open(t.TempDir(), Options{memTableSize: smallMemtable})
	require.NoError(t, err)
	checked := make(chan error, 1)
	over := make(chan struct{})
	go func() {
		for {
			select {
			case <-over:
				checked <- nil
				return
			default:
			}
			if err := db.Check(t.Context()); err != nil {
				checked <- err
				return
			}
		}
	}()
	value := string(make([]byte, 10_000))
	for n := range uint64(1000) {
		require.NoError(t, db.Apply(t.Context(), change("k", value, n)))
	}
	close(over)
	require.NoError(t, <-checked)
	require.Greater(t, db.space.log, 5)
	require.NoError(t, db.Close())
}

// What the look at the files adds to each commit.
func BenchmarkPresent(b *testing.B) {
	db := open(b, b.TempDir())
	require.NoError(b, db.Apply(b.Context(), change("k", "v", 0)))
	old := time.Now().Add(-2 * timeGrain)
	require.NoError(b, os.Chtimes(db.dir, old, old))
	for b.Loop() {
		require.NoError(b, db.present())
	}
}
