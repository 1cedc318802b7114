package badgerdb

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/pb"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/commitfile"
	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb/survey"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An obstacle keeps a compaction from making one of its tables: a file has that one's name. It
// listens to what Badger logs.
type obstacle struct {
	slog.Handler
	dir   string
	which int // 1: the first table of a compaction. Only one is hindered

	mu       sync.Mutex
	tables   int // of the compaction under way
	put      bool
	hindered bool // a compaction has met it, and is over
	done     int  // compactions

	forgot func() // called when Badger has gone on without the table, and nobody knows yet
}

func (*obstacle) Enabled(context.Context, slog.Level) bool { return true }

func (o *obstacle) Handle(_ context.Context, r slog.Record) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch {
	case strings.Contains(r.Message, "LOG Compact. Added"):
		if o.tables++; o.tables == o.which && !o.put {
			o.put = true
			return o.hinder()
		}
	case strings.Contains(r.Message, "error flushing memtable"):
		// A flush met the obstacle, and not a compaction. Badger tries again.
		o.put, o.hindered = false, false
	case strings.Contains(r.Message, "DONE"):
		if o.put && !o.hindered && o.tables >= o.which {
			o.hindered = true
			if o.forgot != nil {
				o.forgot()
			}
		}
		o.tables = 0
		o.done++
	}
	return nil
}

// hinder takes the name of the next table, and never the file of one that Badger has made since.
func (o *obstacle) hinder() error {
	for {
		name := filepath.Join(o.dir, table.IDToFilename(o.lastID()+1))
		f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err == nil {
			return f.Close()
		}
		if !errors.Is(err, os.ErrExist) {
			return err
		}
	}
}

func (o *obstacle) lastID() (last uint64) {
	paths, _ := filepath.Glob(filepath.Join(o.dir, "*.sst"))
	for _, path := range paths {
		if id, ok := table.ParseFileID(path); ok {
			last = max(last, id)
		}
	}
	return last
}

// A compaction that cannot make one of its tables ends the DB, and not the data: nobody reads what
// is left without that table, and all is there when the directory is opened again, be it after a
// Close, or as it was at that moment.
func TestCompactionWithoutATable(t *testing.T) {
	for _, which := range []int{1, 2} {
		t.Run(fmt.Sprint(which), func(t *testing.T) {
			dir := t.TempDir()
			o := &obstacle{dir: dir, which: which}
			told := make(chan error, 1)
			db, err := Open(dir, Options{memTableSize: 1 << 20, Logger: slog.New(o),
				Failed: func(err error) { told <- err }})
			require.NoError(t, err)

			// Keys that are written in no order, so that tables overlap, and again and again, so
			// that older versions could show.
			const keys = 977
			key := func(i int) string { return fmt.Sprintf("k%03d", i*389%keys) }
			value := func(revision uint64) string {
				return strings.Repeat(fmt.Sprintf("%08d", revision), 300)
			}
			var acknowledged [keys]atomic.Uint64 // revisions, by i
			var wrong atomic.Pointer[string]
			var readers sync.WaitGroup
			o.forgot = func() {
				read := make(chan bool)
				readers.Go(func() {
					defer close(read)
					for i := range keys {
						least := acknowledged[i].Load()
						e, err := db.Get(t.Context(), []byte(key(i)))
						if least > 0 && !errors.Is(err, backend.ErrFailed) &&
							(err != nil || e.Revision < least) {
							text := fmt.Sprintf("%s was acknowledged at %d, and read at %d, %v",
								key(i), least, e.Revision, err)
							wrong.Store(&text)
							return
						}
					}
				})
				select {
				case <-read:
				case <-time.After(100 * time.Millisecond):
					// The read waits until the compaction is verified.
				}
			}
			for n := 0; ; n++ {
				require.Less(t, n, 50*keys, "there was no compaction of %d tables", which)
				i := n % keys
				revision := acknowledged[i].Load()
				err = db.Apply(t.Context(), change(key(i), value(revision+1), revision))
				if err != nil {
					break
				}
				acknowledged[i].Store(revision + 1)
			}
			readers.Wait()
			require.Nil(t, wrong.Load())
			require.ErrorIs(t, err, backend.ErrFailed)
			require.ErrorContains(t, err, "compact: a table could not be made")
			require.Equal(t, err, <-told)

			crashed := filepath.Join(t.TempDir(), "crashed")
			torn := filepath.Join(t.TempDir(), "torn")
			copyLive(t, dir, crashed) // Badger may still flush a memtable
			copyDir(t, crashed, torn) // in the middle of a commit, before its copy was whole
			last := int(db.summary.Seq%2) * commitfile.SlotSize
			edit(t, filepath.Join(torn, commitfile.Name),
				func(b []byte) []byte { b[last] ^= 1; return b })
			require.NoError(t, db.Close())
			for _, dir := range []string{crashed, torn, dir} {
				db := open(t, dir)
				for i := range keys {
					e, err := db.Get(t.Context(), []byte(key(i)))
					if acknowledged[i].Load() == 0 && errors.Is(err, backend.ErrNotFound) {
						continue
					}
					require.NoError(t, err, "%s of %s", key(i), dir)
					require.GreaterOrEqual(t, e.Revision, acknowledged[i].Load())
				}
				require.NoError(t, db.Check(t.Context()))
				require.NoError(t, db.Apply(t.Context(), change("afterwards", "1", 0)))
			}
		})
	}
}

// Compactions are watched, and do not keep what they have replaced.
func TestCompactionsAreWatched(t *testing.T) {
	dir := t.TempDir()
	o := &obstacle{dir: dir}
	db, err := Open(dir, Options{memTableSize: 1 << 20, Logger: slog.New(o)})
	require.NoError(t, err)
	done := func() int {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.done
	}
	revision := uint64(0)
	for n := 0; done() < 5; n++ {
		require.Less(t, n, 100_000, "there are no compactions")
		require.NoError(t, db.Apply(t.Context(),
			change("k", strings.Repeat("v", 10_000), revision)))
		revision++
	}
	require.NoError(t, db.Close())
	s, err := survey.Read(dir)
	require.NoError(t, err)
	require.NotEmpty(t, s.Named)
	require.Empty(t, s.Strays)
	require.Empty(t, s.Logs)
}

// What all this is for. When this test fails, because Badger has mended it, compactions need not be
// watched any more.
func TestBadgerForgetsATable(t *testing.T) {
	dir := t.TempDir()
	o := &obstacle{dir: dir, which: 1}
	bare := &DB{dir: dir, space: newSpaceGuard(dir, 1<<20, 0)}
	options := bare.options(Options{Logger: quiet}).WithLogger(deaf{o})
	db, err := badger.OpenManaged(options)
	require.NoError(t, err)
	commit := func(ts uint64) {
		txn := db.NewTransactionAt(ts, true)
		defer txn.Discard()
		require.NoError(t, txn.SetEntry(badger.NewEntry(fmt.Appendf(nil, "k%08d", ts),
			make([]byte, 10_000))))
		require.NoError(t, txn.CommitAt(ts, nil))
	}
	hindered := func() bool {
		o.mu.Lock()
		defer o.mu.Unlock()
		return o.hindered
	}
	n := uint64(0)
	for !hindered() {
		require.Less(t, n, uint64(100_000), "there are no compactions")
		n++
		commit(n)
	}
	require.NoError(t, db.Close(), "it says that all is well")
	db, err = badger.OpenManaged(options)
	require.NoError(t, err)
	defer db.Close()
	txn := db.NewTransactionAt(n, false)
	defer txn.Discard()
	lost := 0
	for ts := range n {
		if _, err := txn.Get(fmt.Appendf(nil, "k%08d", ts+1)); err != nil {
			require.ErrorIs(t, err, badger.ErrKeyNotFound)
			lost++
		}
	}
	require.Positive(t, lost)
}

// A deaf logger tells only the obstacle.
type deaf struct{ o *obstacle }

func (d deaf) Errorf(format string, args ...any)   { d.Debugf(format, args...) }
func (d deaf) Warningf(format string, args ...any) { d.Debugf(format, args...) }
func (d deaf) Infof(format string, args ...any)    { d.Debugf(format, args...) }

func (d deaf) Debugf(format string, args ...any) {
	_ = d.o.Handle(context.Background(), slog.Record{Message: badgerText(format, args)})
}

// A store that is opened and ends without a Close, again and again, before Badger comes to
// compacting, can be opened again: nothing there waits for a compaction, and what is replayed is
// not taken for what one has made.
func TestOpenAfterCrashes(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "0")
	for n := range 2 * level0Stall {
		db, err := Open(dir, Options{})
		require.NoError(t, err)
		s, err := survey.Read(dir)
		require.NoError(t, err)
		for _, l := range s.Logs {
			require.Zero(t, l.Last, "it is in a table")
		}
		require.NoError(t, db.Apply(t.Context(), change(fmt.Sprint("k", n), "v", 0)))
		dir = filepath.Join(top, fmt.Sprint(n+1))
		copyLive(t, db.dir, dir)
		require.NoError(t, db.Close())
	}
	db := open(t, dir)
	require.Len(t, read(t, db), 2*level0Stall)
	require.NoError(t, db.Check(t.Context()))
}

// What a compaction that is not found to be whole yet may have changed is not told, be it a
// conflict.
func TestConflictDuringACompaction(t *testing.T) {
	db := open(t, t.TempDir())
	require.NoError(t, db.Apply(t.Context(), change("k", "1", 0)))
	// The compaction knows no place in the manifest before which it was not committed.
	now := &compaction{done: make(chan struct{})}
	db.compactions.active.Store(now)
	told := make(chan error, 1)
	go func() { told <- db.Apply(t.Context(), change("k", "2", 0)) }()
	select {
	case err := <-told:
		require.Fail(t, "it was told too early", "%v", err)
	case <-time.After(50 * time.Millisecond):
	}
	failed := db.fail("compact", errors.New("as if"))
	db.compactions.finish(now)
	require.Equal(t, failed, <-told)
}

// What others than the compaction under way log of a failure is harmless: it had not begun.
func TestFailureOfACompactionThatHasNotBegun(t *testing.T) {
	db := open(t, t.TempDir())
	require.NoError(t, db.Apply(t.Context(), change("k", "1", 0)))
	db.compactions.onLog(saysFailed, []any{1, errors.New("as if"), nil})
	require.NoError(t, db.Apply(t.Context(), change("k", "2", 1)))

	now := db.compactions.begin(0)
	db.compactions.active.Store(now)
	db.compactions.onLog(saysFailed, []any{1, errors.New("as if"), nil})
	require.Same(t, now, db.compactions.active.Load())
	require.NoError(t, db.Apply(t.Context(), change("k", "3", 2)))
	db.compactions.finish(now)
	now.release()
}

// A compaction for which there is no space makes no table before there is. Reads and changes go on,
// and Close says why it cannot close.
func TestCompactionWaitsForSpace(t *testing.T) {
	dir := t.TempDir()
	o := &obstacle{dir: dir}
	db, err := Open(dir, Options{memTableSize: smallMemtable, Logger: slog.New(o)})
	require.NoError(t, err)
	var free atomic.Int64
	db.compactions.space.disk = func(string) (int64, int64, bool) {
		return free.Load(), 1 << 40, true
	}
	revision := uint64(0)
	put := func() {
		t.Helper()
		require.NoError(t, db.Apply(t.Context(),
			change("k", strings.Repeat("v", 10_000), revision)))
		revision++
	}
	for n := 0; n < 500 && db.compactions.waiting.Load() == nil; n++ {
		put() // enough for a compaction, which begins up to a second after Badger was opened
	}
	require.Eventually(t, func() bool { return db.compactions.waiting.Load() != nil },
		time.Minute, time.Millisecond, "no compaction waits")
	put()
	require.Nil(t, db.compactions.active.Load(), "it has not begun")
	_, err = db.Get(t.Context(), []byte("k"))
	require.NoError(t, err)
	tables := len(db.badger.Tables())
	require.ErrorIs(t, db.Close(), backend.ErrFull)
	require.ErrorIs(t, db.Close(), backend.ErrFull, "it can be tried again")

	free.Store(1 << 40)
	require.Eventually(t, func() bool { return db.Close() == nil }, time.Minute,
		10*time.Millisecond)
	o.mu.Lock()
	require.Positive(t, o.done)
	o.mu.Unlock()
	db = open(t, dir)
	require.LessOrEqual(t, len(db.badger.Tables()), tables+1)
	e, err := db.Get(t.Context(), []byte("k"))
	require.NoError(t, err)
	require.Equal(t, revision, e.Revision)
}

// A compaction that begins to wait while Badger is being closed does not make Close wait for ever.
func TestCompactionWaitsForSpaceDuringClose(t *testing.T) {
	db, err := Open(t.TempDir(), Options{})
	require.NoError(t, err)
	var free atomic.Int64
	db.compactions.space.disk = func(string) (int64, int64, bool) {
		return free.Load(), 1 << 40, true
	}
	db.compactions.closing.Store(true)
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		db.compactions.awaitSpace()
	}()
	require.Eventually(t, func() bool { return db.failed.Load() != nil }, time.Minute,
		time.Millisecond)
	require.ErrorIs(t, *db.failed.Load(), backend.ErrFull)
	free.Store(1 << 40)
	<-waited
	require.Nil(t, db.compactions.waiting.Load())
	require.NoError(t, db.Close())
}

// A compaction that ends and was not noticed before ends the DB: nobody knows what it has made.
func TestCompactionThatWentUnwatched(t *testing.T) {
	for name, other := range map[string]bool{"there is none": false, "there is another": true} {
		db := open(t, t.TempDir())
		require.NoError(t, db.Apply(t.Context(), change("k", "1", 0)))
		if other {
			now := db.compactions.begin(0)
			db.compactions.active.Store(now)
			defer now.release()
		}
		db.compactions.onLog(saysDone, []any{1, 0})
		require.ErrorContains(t, db.Apply(t.Context(), change("k", "2", 1)), "unwatched", name)
	}
}

// A compaction may be visible as soon as the manifest may name its tables, and not before.
func TestCommitted(t *testing.T) {
	record := func(ops ...pb.ManifestChange_Operation) []byte {
		var set pb.ManifestChangeSet
		for i, op := range ops {
			set.Changes = append(set.Changes, &pb.ManifestChange{Id: uint64(i + 1), Op: op})
		}
		b, err := proto.Marshal(&set)
		require.NoError(t, err)
		header := binary.BigEndian.AppendUint32(nil, uint32(len(b)))
		return append(append(header, 0, 0, 0, 0), b...) // the checksum is Badger's to look at
	}
	const created, deleted = pb.ManifestChange_CREATE, pb.ManifestChange_DELETE
	join := func(parts ...[]byte) []byte { return slices.Concat(parts...) }
	for name, c := range map[string]struct {
		harm func(t *testing.T, path string)
		more []byte
		want bool
	}{
		"nothing was written":             {nil, nil, false},
		"a table was flushed":             {nil, record(created), false},
		"two tables were flushed":         {nil, join(record(created), record(created)), false},
		"a compaction":                    {nil, record(created, deleted), true},
		"a compaction after a flush":      {nil, join(record(created), record(deleted)), true},
		"a header that is not whole":      {nil, record(created)[:7], true},
		"a record that is not whole":      {nil, record(created)[:9], true},
		"a record that is none":           {nil, []byte{0, 0, 0, 1, 0, 0, 0, 0, 0xff}, true},
		"part of a record, after a flush": {nil, join(record(created), record(created)[:3]), true},
		"it is not there": {func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
		}, nil, true},
		"it was cut off": {func(t *testing.T, path string) {
			require.NoError(t, os.Truncate(path, 3))
		}, nil, true},
		"it cannot be read, as it is none": {func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Mkdir(path, 0o700))
		}, nil, true},
		"it was written anew": {func(t *testing.T, path string) {
			content, err := os.ReadFile(path)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(path+"-REWRITE", content, 0o600))
			require.NoError(t, os.Rename(path+"-REWRITE", path))
		}, nil, true},
	} {
		path := filepath.Join(t.TempDir(), badger.ManifestFilename)
		require.NoError(t, os.WriteFile(path, []byte("the manifest"), 0o600))
		now := &compaction{}
		info, err := os.Stat(path)
		require.NoError(t, err)
		now.manifest = info
		now.manifestScanned.Store(info.Size())
		if c.harm != nil {
			c.harm(t, path)
		} else {
			f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.Write(c.more)
			require.NoError(t, errors.Join(err, f.Close()))
		}
		require.Equal(t, c.want, now.committed(path), name)
		if !c.want {
			require.EqualValues(t, len("the manifest")+len(c.more), now.manifestScanned.Load(),
				"%s: what was read is not read again", name)
		}
		require.Equal(t, c.want, now.committed(path), "%s, asked again", name)
		require.True(t, (&compaction{}).committed(path), "%s: what it was is not known", name)
	}
}

// Reads of what a compaction has not made visible yet do not wait for it; afterwards they do, and
// are refused if it was not whole.
func TestReadsDuringACompaction(t *testing.T) {
	db := open(t, t.TempDir())
	require.NoError(t, db.Apply(t.Context(), change("k", "1", 0)))
	now := db.compactions.begin(0)
	db.compactions.active.Store(now)
	_, err := db.Get(t.Context(), []byte("k"))
	require.NoError(t, err, "the manifest is as it was")

	now.manifestScanned.Add(-1) // as if something had been written that is not known
	read := make(chan error, 1)
	go func() {
		_, err := db.Get(t.Context(), []byte("k"))
		read <- err
	}()
	select {
	case err := <-read:
		require.Fail(t, "it was answered too early", "%v", err)
	case <-time.After(50 * time.Millisecond):
	}
	db.compactions.onLog(saysFailed, []any{0, errors.New("as if"), nil})
	require.ErrorIs(t, <-read, backend.ErrFailed)
}
