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

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

var powercuts = flag.Int("powercuts", 2, "the number of power cuts; needs root")

func init() { roles["forgetful"] = forgetful }

// The oracle is not on the disk, and so does not lose its data. In every second cycle, the kernel
// has just started to write back some dirty pages at random places, as the kernel may do at any
// time.
func TestPowerLoss(t *testing.T) {
	random := seeded(t)
	d := mount(t, "ext4", 512)
	dir := filepath.Join(d.point, "keys")
	o := newOracle()
	began := time.Now()
	for cycle := range *powercuts {
		cut(t, d, "writer", dir, moment(random, 200*time.Millisecond), cycle%2 == 1,
			o.aim(cycle/2%2 == 0))
		o.checkAll(t, dir, cycle%25 == 24 || cycle == *powercuts-1)
	}
	require.Greater(t, o.Acknowledged, 5**powercuts, "the victims made too few changes")
	figures.Record(t, "%d cycles, %d acknowledged changes of %d keys: nothing lost or undone; "+
		"%.2f s a cycle",
		*powercuts, o.Acknowledged, len(o.Keys), time.Since(began).Seconds()/float64(*powercuts))
}

// cut runs a victim, cuts the power, and restores the power. cut calls hear with each line of the
// output of the victim, and cuts the power some time after hear has returned true.
func cut(
	t *testing.T, d *disk, role, dir string, after time.Duration, writeback bool,
	hear func(line string) bool,
) {
	t.Helper()
	p := start(t, role, dir)
	down, aimed := make(chan error, 1), false
	for line, ok := p.line(); ok; line, ok = p.line() {
		if hear(line) && !aimed {
			aimed = true
			time.AfterFunc(after, func() {
				if writeback {
					writeBack(dir)
				}
				err := d.losePower()
				_ = p.cmd.Process.Kill()
				down <- err
			})
		}
	}
	_ = p.cmd.Wait() // the victim was killed, or has ended by an error of the lost disk
	select {
	case err := <-down:
		require.NoError(t, err)
	case <-time.After(time.Minute):
		require.Fail(t, "the victim ended before the power cut", "%s", p.stderr)
	}
	d.powerUp(t)
}

// writeBack tells the kernel to write random pages of the files in a directory to the disk.
func writeBack(dir string) {
	files, _ := os.ReadDir(dir)
	for _, entry := range files {
		f, err := os.OpenFile(filepath.Join(dir, entry.Name()), os.O_RDWR, 0)
		if err != nil {
			continue // the file was deleted
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

// The control run: a store without syncs must lose acknowledged writes in the same power cuts.
// Otherwise, TestPowerLoss proves nothing.
func TestPowerLossControl(t *testing.T) {
	random := seeded(t)
	d := mount(t, "ext4", 512)
	acked, lost := 0, 0
	for cycle := range 3 {
		dir := filepath.Join(d.point, strconv.Itoa(cycle))
		wrote := 0
		after := 50*time.Millisecond + moment(random, 100*time.Millisecond)
		cut(t, d, "forgetful", dir, after, false, func(line string) bool {
			if n, err := strconv.Atoi(line); err == nil {
				wrote = n
			}
			return true // also for the line that says that the directory is open
		})
		acked += wrote
		lost += wrote - remembered(t, dir, wrote)
	}
	require.Positive(t, lost, "the power cuts have lost nothing, so the power cuts do not work")
	figures.Record(t, "without syncs, %d of %d acknowledged writes were lost", lost, acked)
}

// forgetfulOptions returns the options of a Badger without syncs.
func forgetfulOptions(dir string) badger.Options {
	return badger.DefaultOptions(dir).WithSyncWrites(false).WithLogger(nil).
		WithMemTableSize(8 << 20).WithValueLogFileSize(1 << 20).WithValueThreshold(64 << 10)
}

// forgetful writes 1, 2, 3 and so on, and reports each write that Badger has acknowledged.
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

// remembered returns how many of the first wrote writes are still in the directory. If the
// directory does not exist, the result is 0.
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
