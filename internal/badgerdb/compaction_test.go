package badgerdb

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/table"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An obstacle keeps a compaction from making one of its tables: a file has that one's name. It listens to what Badger logs.
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
	case strings.Contains(r.Message, "error flushing memtable"): // it met the obstacle, and not a compaction; it tries again
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

// A compaction that cannot make one of its tables ends the DB, and not the data: nobody reads what is left without that
// table, and all is there when the directory is opened again, be it after a Close, or as it was at that moment.
func TestCompactionWithoutATable(t *testing.T) {
	for _, which := range []int{1, 2} {
		t.Run(fmt.Sprint(which), func(t *testing.T) {
			dir := t.TempDir()
			o := &obstacle{dir: dir, which: which}
			told := make(chan error, 1)
			db, err := Open(dir, Options{memTableSize: 1 << 20, Logger: slog.New(o), Failed: func(err error) { told <- err }})
			require.NoError(t, err)

			// Keys that are written in no order, so that tables overlap, and again and again, so that older versions could show.
			const keys = 977
			key := func(i int) string { return fmt.Sprintf("k%03d", i*389%keys) }
			value := func(revision uint64) string { return strings.Repeat(fmt.Sprintf("%08d", revision), 300) }
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
						if least > 0 && !errors.Is(err, backend.ErrFailed) && (err != nil || e.Revision < least) {
							text := fmt.Sprintf("%s was acknowledged at %d, and read at %d, %v", key(i), least, e.Revision, err)
							wrong.Store(&text)
							return
						}
					}
				})
				select {
				case <-read:
				case <-time.After(100 * time.Millisecond): // it waits to hear whether the compaction is whole
				}
			}
			for n := 0; ; n++ {
				require.Less(t, n, 50*keys, "there was no compaction of %d tables", which)
				i := n % keys
				revision := acknowledged[i].Load()
				if err = db.Apply(t.Context(), change(key(i), value(revision+1), revision)); err != nil {
					break
				}
				acknowledged[i].Store(revision + 1)
			}
			readers.Wait()
			require.Nil(t, wrong.Load())
			require.ErrorIs(t, err, backend.ErrFailed)
			require.ErrorContains(t, err, "compact: a table could not be made")
			require.Equal(t, err, <-told)

			crashed, torn := filepath.Join(t.TempDir(), "crashed"), filepath.Join(t.TempDir(), "torn")
			copyDir(t, dir, crashed)
			copyDir(t, dir, torn) // in the middle of a commit, before its copy was whole
			last := int(db.head.seq%2) * slotSize
			edit(t, filepath.Join(torn, lastName), func(b []byte) []byte { b[last] ^= 1; return b })
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
		require.NoError(t, db.Apply(t.Context(), change("k", strings.Repeat("v", 10_000), revision)))
		revision++
	}
	require.NoError(t, db.Close())
	s, err := surveyDir(dir)
	require.NoError(t, err)
	require.NotEmpty(t, s.named)
	require.Empty(t, s.strays)
	require.Empty(t, s.logs)
}

// What all this is for. When this test fails, because Badger has mended it, compactions need not be watched any more.
func TestBadgerForgetsATable(t *testing.T) {
	dir := t.TempDir()
	o := &obstacle{dir: dir, which: 1}
	bare := &DB{dir: dir, room: newRoom(dir, 1<<20, 0)}
	options := bare.options(Options{Logger: quiet}).WithLogger(deaf{o})
	db, err := badger.OpenManaged(options)
	require.NoError(t, err)
	commit := func(ts uint64) {
		txn := db.NewTransactionAt(ts, true)
		defer txn.Discard()
		require.NoError(t, txn.SetEntry(badger.NewEntry(fmt.Appendf(nil, "k%08d", ts), make([]byte, 10_000))))
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

// A store that is opened and ends without a Close, again and again, before Badger comes to compacting, can be opened again:
// nothing there waits for a compaction, and what is replayed is not taken for what one has made.
func TestOpenAfterCrashes(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "0")
	for n := range 2 * level0Stall {
		db, err := Open(dir, Options{})
		require.NoError(t, err)
		s, err := surveyDir(dir)
		require.NoError(t, err)
		for _, l := range s.logs {
			require.Zero(t, l.last, "it is in a table")
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

// What a compaction that is not found to be whole yet may have changed is not told, be it a conflict.
func TestConflictDuringACompaction(t *testing.T) {
	db := open(t, t.TempDir())
	require.NoError(t, db.Apply(t.Context(), change("k", "1", 0)))
	now := &compaction{done: make(chan struct{})} // it has no place in the manifest where it was not committed yet
	db.compactions.now.Store(now)
	told := make(chan error, 1)
	go func() { told <- db.Apply(t.Context(), change("k", "2", 0)) }()
	select {
	case err := <-told:
		require.Fail(t, "it was told too early", "%v", err)
	case <-time.After(50 * time.Millisecond):
	}
	failed := db.fail("compact", errors.New("as if"))
	db.compactions.end(now)
	require.Equal(t, failed, <-told)
}
