package crashtest

import (
	"encoding/binary"
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
	"github.com/stretchr/testify/require"
)

var powercuts = flag.Int("powercuts", 2, "how many times to cut the power; needs root")

func init() { roles["forgetful"] = forgetful }

// The oracle is on another disk, and so outlives the power. In every second cycle the kernel has
// just begun to write back some of what is dirty, here and there, as it may at any time.
func TestPowerLoss(t *testing.T) {
	random := seeded(t)
	d := mount(t, "ext4", 512)
	dir := filepath.Join(d.point, "keys")
	o := newOracle()
	began := time.Now()
	for cycle := range *powercuts {
		cut(t, d, "writer", dir, moment(random, 200*time.Millisecond), cycle%2 == 1, func(line string) { o.hear(line) })
		o.checkAll(t, dir, cycle%25 == 24 || cycle == *powercuts-1)
	}
	require.Greater(t, o.Acknowledged, 5**powercuts, "the victims did hardly anything")
	t.Logf("%d cycles, %d acknowledged changes, %d keys: none lost, none back; %.2f s each",
		*powercuts, o.Acknowledged, len(o.Keys), time.Since(began).Seconds()/float64(*powercuts))
}

// cut runs a victim, cuts the power some time after it has opened its directory, and brings the
// power back. What the victim says, before and after, is heard.
func cut(t *testing.T, d *disk, role, dir string, after time.Duration, writeback bool, hear func(string)) {
	t.Helper()
	p := start(t, role, dir)
	down := make(chan error, 1)
	for line, ok := p.line(); ok; line, ok = p.line() {
		if line == "open" {
			time.AfterFunc(after, func() {
				if writeback {
					writeBack(dir)
				}
				err := d.losePower()
				_ = p.cmd.Process.Kill()
				down <- err
			})
		}
		hear(line)
	}
	_ = p.cmd.Wait() // killed, or it gave up, which is right too: its disk is gone
	select {
	case err := <-down:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		require.Fail(t, "the victim died before the power did", "%s", p.stderr)
	}
	d.powerUp(t)
}

// writeBack has the kernel write some stretches of the files in a directory to the disk, and leave
// the others.
func writeBack(dir string) {
	files, _ := os.ReadDir(dir)
	for _, entry := range files {
		f, err := os.OpenFile(filepath.Join(dir, entry.Name()), os.O_RDWR, 0)
		if err != nil {
			continue // it is gone by now
		}
		if info, err := f.Stat(); err == nil {
			const page, write = 4096, 2 | 4 // SYNC_FILE_RANGE_WRITE and _WAIT_AFTER
			for at := int64(0); at < min(info.Size(), 1<<20); at += page {
				if rand.N(2) == 0 {
					_ = syscall.SyncFileRange(int(f.Fd()), at, page, write)
				}
			}
		}
		_ = f.Close()
	}
}

// The control: if the same power cuts do not make a store without syncs lose what it acknowledged,
// then the test above proves nothing.
func TestPowerLossControl(t *testing.T) {
	random := seeded(t)
	d := mount(t, "ext4", 512)
	acked, lost := 0, 0
	for cycle := range 3 {
		dir := filepath.Join(d.point, strconv.Itoa(cycle))
		wrote := 0
		cut(t, d, "forgetful", dir, 50*time.Millisecond+moment(random, 100*time.Millisecond), false, func(line string) {
			if n, err := strconv.Atoi(line); err == nil {
				wrote = n
			}
		})
		acked += wrote
		lost += wrote - remembered(t, dir, wrote)
	}
	t.Logf("without syncs, %d of %d acknowledged writes were lost", lost, acked)
	require.Positive(t, lost, "the power cuts lose nothing: they are none")
}

// forgetfulOptions are a Badger that does not sync.
func forgetfulOptions(dir string) badger.Options {
	return badger.DefaultOptions(dir).WithSyncWrites(false).WithLogger(nil).
		WithMemTableSize(8 << 20).WithValueLogFileSize(1 << 20).WithValueThreshold(64 << 10)
}

// forgetful writes 1, 2, 3 and so on, and reports what Badger has acknowledged.
func forgetful(dir string) error {
	db, err := badger.Open(forgetfulOptions(dir))
	if err != nil {
		return err
	}
	report("open")
	for n := 1; ; n++ {
		err := db.Update(func(txn *badger.Txn) error {
			return txn.Set(binary.BigEndian.AppendUint32(nil, uint32(n)), make([]byte, 200))
		})
		if err != nil {
			return err
		}
		report("%d", n)
	}
}

// remembered counts which of the first so many writes are there. A directory that is gone has none.
func remembered(t *testing.T, dir string, wrote int) (there int) {
	db, err := badger.Open(forgetfulOptions(dir))
	require.NoError(t, err)
	err = db.View(func(txn *badger.Txn) error {
		for n := 1; n <= wrote; n++ {
			if _, err := txn.Get(binary.BigEndian.AppendUint32(nil, uint32(n))); err == nil {
				there++
			}
		}
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, db.Close())
	return there
}
