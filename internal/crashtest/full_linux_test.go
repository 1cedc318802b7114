package crashtest

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var hogs = flag.Bool("hogs", false, "also fill disks while the store writes; needs root")

func init() { roles["responder"] = responder }

// responder obeys orders. After the lines that report changes, responder answers each order with
// one line:
//
//	                    answer ERROR   the result of Open
//	create N PADDING    answer ERROR   creates N keys, from several goroutines, until one is refused
//	verify TOKEN        answer ERROR
//	ACTION ID REVISION  answer ERROR   revoke, disable and so on
//	bind TOKEN          answer ERROR
//	live                answer WHY     the cause of the end of the last bound context, or "on"
func responder(dir string) error {
	store, err := keystore.Open(dir, nil)
	report("answer %s", describe(err))
	if err != nil {
		return nil
	}
	ctx := context.Background()
	var live *keystore.Session
	for orders := bufio.NewScanner(os.Stdin); orders.Scan(); {
		words := strings.Fields(orders.Text())
		var err error
		switch words[0] {
		case "create":
			var left atomic.Int64
			var padding int64
			var n int64
			if _, err := fmt.Sscan(words[1]+" "+words[2], &n, &padding); err != nil {
				return err
			}
			left.Store(n)
			err = together(8, func() error {
				for left.Add(-1) >= 0 {
					if _, err := create(store, int(padding)); err != nil {
						return err
					}
				}
				return nil
			})
		case "verify":
			_, err = store.Verify(ctx, words[1])
		case "bind":
			live, err = store.Bind(ctx, words[1])
		case "live":
			if live.Context().Err() == nil {
				report("answer on")
				continue
			}
			err = live.Cause()
		default:
			var revision uint64
			if _, err := fmt.Sscan(words[2], &revision); err != nil {
				return err
			}
			err = act(store, words[1], words[0], revision)
		}
		report("answer %s", describe(err))
	}
	return nil
}

// together calls f in n goroutines, and returns the first error.
func together(n int, f func() error) error {
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for range n {
		wg.Go(func() { errs <- f() })
	}
	wg.Wait()
	close(errs)
	var first error
	for err := range errs {
		if first == nil {
			first = err
		}
	}
	return first
}

// answer reads the report until the next answer. answer fails the test if the process dies first.
func (p *process) answer(t *testing.T, o *oracle) (word, text string) {
	t.Helper()
	for line, ok := p.line(); ok; line, ok = p.line() {
		if answer, ok := strings.CutPrefix(line, "answer "); ok {
			word, text, _ = strings.Cut(answer, " ")
			return word, text
		}
		o.hear(line)
	}
	err := p.cmd.Wait()
	require.FailNow(t, "the process died", "%v: %s", err, p.stderr)
	return "", ""
}

func (p *process) ask(t *testing.T, o *oracle, order string, args ...any) (word, text string) {
	t.Helper()
	p.order(order, args...)
	return p.answer(t, o)
}

// fill writes a file until the disk has no space for another byte.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(t, err)
	for _, size := range []int{1 << 20, 64 << 10, 4 << 10, 512, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		require.True(t, errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT), "%v", err)
	}
	require.NoError(t, f.Close())
	// ext4 allocates some blocks only when it writes the data. After a sync, ext4 reports the real
	// free space.
	syscall.Sync()
}

// quiet waits until the store has no work in the background. The reason is a case that the store
// does not survive: a compaction checks its disk space at the start, and the process dies if
// another process takes the last byte before the compaction has written its tables. Badger may
// start a compaction up to one second after Open.
func quiet(t *testing.T, dir string) {
	t.Helper()
	last, same := "", 0
	require.Eventually(t, func() bool {
		var now strings.Builder
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if info, err := e.Info(); err == nil {
				fmt.Fprintln(&now, e.Name(), info.Size())
			}
		}
		if now.String() == last {
			same++
		} else {
			last, same = now.String(), 0
		}
		return same == 40
	}, time.Minute, 30*time.Millisecond)
}

// occupy writes a file of the given size in KiB. The test deletes the file later to free space.
func occupy(t *testing.T, path string, kib int) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, make([]byte, kib<<10), 0o600))
}

// verifyAll verifies every key with a known state. If full is true, the disk is full, and the
// answer "unavailable" is allowed too.
func verifyAll(t *testing.T, p *process, o *oracle, full bool) (unavailable int) {
	t.Helper()
	for id, k := range o.Keys {
		if k.Doubt != nil || k.Acked.Token == "" {
			continue
		}
		want, _, _ := strings.Cut(describe(admission(k.Acked.Status)), " ")
		word, text := p.ask(t, o, "verify %s", k.Acked.Token)
		if word == "unavailable" && full {
			unavailable++
			continue
		}
		require.Equal(t, want, word, "key %s, acknowledged %v: %s", id, k.Acked.Status, text)
	}
	return unavailable
}

func TestFullDisk(t *testing.T) {
	for _, tt := range []struct {
		kind string
		mib  int64
	}{
		{"tmpfs", 12},
		{"ext4", 24},
		{quota, 60},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			t.Parallel()
			fullDisk(t, mount(t, tt.kind, tt.mib))
		})
	}
}

func fullDisk(t *testing.T, d *disk) {
	dir := filepath.Join(d.point, "keys")
	ballast, filler := filepath.Join(d.point, "ballast"), filepath.Join(d.point, "filler")
	o := newOracle()
	p := start(t, "responder", dir)
	word, text := p.answer(t, o)
	require.Equal(t, "ok", word, text)
	occupy(t, ballast, int(d.mib)<<8)
	word, text = p.ask(t, o, "create 300 0")
	require.Equal(t, "ok", word, text)
	early := o.ids()
	bound := early[0]
	word, text = p.ask(t, o, "bind %s", o.Keys[bound].Acked.Token)
	require.Equal(t, "ok", word, text)

	// The store fills the disk itself.
	word, text = p.ask(t, o, "create 1000000 4000")
	require.Equal(t, "unavailable", word, text)
	require.Contains(t, text, syscall.ENOSPC.Error(), "the error contains the reason")
	created := len(o.Keys)
	revoked := early[1:151]
	for _, id := range revoked {
		word, text = p.ask(t, o, "revoke %s 1", id)
		if d.kind == quota && word == "unavailable" {
			continue // a file system that copies on write cannot reserve space
		}
		require.Equal(t, "ok", word, "revocations must work when creates do not: %s", text)
	}
	require.Zero(t, verifyAll(t, p, o, false))

	// Other programs fill the rest of the disk.
	quiet(t, dir)
	fill(t, filler)
	unavailable := verifyAll(t, p, o, true)
	word, _ = p.ask(t, o, "create 1 0")
	require.Equal(t, "unavailable", word)
	word, text = p.ask(t, o, "revoke %s 1", bound)
	require.Contains(t, []string{"ok", "unavailable"}, word, text)
	cause, _ := p.ask(t, o, "live")
	require.Equal(t, "revoked", cause,
		"a context is still live after a revocation with the result %s", word)
	inReserve := 0
	for _, id := range early[151:] {
		if word, _ = p.ask(t, o, "revoke %s 1", id); word == "ok" {
			inReserve++
		}
	}
	t.Logf(
		"%d keys until Create was refused, then %d revocations; with 0 bytes free %d more of %d; "+
			"%d of %d verifications unavailable",
		created, len(revoked), inReserve, len(early[151:]), unavailable, len(o.Keys))

	// The disk gets free space again.
	require.NoError(t, os.Remove(filler))
	require.NoError(t, os.Remove(ballast))
	word, text = p.ask(t, o, "create 1 0")
	require.Equal(t, "ok", word, "the disk has space again: %s", text)

	quiet(t, dir)

	// The disk is full again when the process is killed and the next process starts.
	fill(t, filler)
	p.kill(t, o)
	opened := start(t, "responder", dir)
	word, text = opened.answer(t, o)
	t.Logf("Open of a full disk: %s %s", word, text)
	require.NotEqual(t, "corrupt", word, "the disk is full, but no file is damaged: %s", text)
	if word == "ok" {
		verifyAll(t, opened, o, true)
	} else {
		require.Contains(t, text, syscall.ENOSPC.Error())
	}
	require.NoError(t, opened.in.Close())
	require.NoError(t, opened.cmd.Wait())
	require.NoError(t, os.Remove(filler))
	o.checkAll(t, dir, true)
	filled.add(t, d.kind, inReserve, len(early[151:]))
}

// A fullDisks counts the disks that all runs of TestFullDisk in this process have filled.
type fullDisks struct {
	mu                    sync.Mutex
	disks, revoked, tries map[string]int // by file system
}

var filled = fullDisks{
	disks: make(map[string]int), revoked: make(map[string]int), tries: make(map[string]int),
}

// add counts a disk that was full, where some of the tried revocations succeeded with 0 bytes free.
func (f *fullDisks) add(t *testing.T, kind string, revoked, tries int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.disks[kind]++
	f.revoked[kind] += revoked
	f.tries[kind] += tries
	var text []string
	for _, kind := range slices.Sorted(maps.Keys(f.disks)) {
		text = append(text, fmt.Sprintf("%d disks of %s: %d of %d revocations with 0 bytes free",
			f.disks[kind], kind, f.revoked[kind], f.tries[kind]))
	}
	figures.RecordAs(t, "TestFullDisk", "%s; no process ended, nothing was lost",
		strings.Join(text, "; "))
}

// Another program fills the disk while the store writes. The program writes either as fast as
// possible, or in step with the store, so that the test covers every intermediate state.
func TestFullDiskHog(t *testing.T) {
	if !*hogs {
		t.Skip("NOT RUN: this test takes 10 seconds; run it with -hogs")
	}
	for _, tt := range []struct {
		kind string
		mib  int64
		step int // bytes for each key; 0 means as fast as possible
	}{
		{"tmpfs", 24, 0},
		{"tmpfs", 24, 8 << 10},
		{"ext4", 32, 0},
		{"ext4", 32, 8 << 10},
	} {
		t.Run(fmt.Sprint(tt.kind, tt.step), func(t *testing.T) {
			t.Parallel()
			hog(t, mount(t, tt.kind, tt.mib), tt.step)
		})
	}
}

func hog(t *testing.T, d *disk, step int) {
	dir, filler := filepath.Join(d.point, "keys"), filepath.Join(d.point, "filler")
	o := newOracle()
	p := start(t, "responder", dir)
	word, text := p.answer(t, o)
	require.Equal(t, "ok", word, text)
	f, err := os.Create(filler)
	require.NoError(t, err)
	isFull := make(chan error, 1)
	if step == 0 {
		go func() {
			var err error
			for err == nil {
				_, err = f.Write(make([]byte, 4<<10))
			}
			isFull <- err
		}()
	} else {
		var err error
		o.heard = func() {
			if err == nil {
				if _, err = f.Write(make([]byte, step)); err != nil {
					isFull <- err
				}
			}
		}
	}
	word, text = p.ask(t, o, "create 1000000 1000")
	require.Equal(t, "unavailable", word, text)
	require.Contains(t, text, syscall.ENOSPC.Error())
	require.NotEmpty(t, o.Keys)
	t.Logf("%d keys", len(o.Keys))
	if step == 0 {
		require.ErrorIs(t, <-isFull, syscall.ENOSPC)
	}
	o.heard = nil
	require.NoError(t, f.Close())
	require.Zero(t, verifyAll(t, p, o, false))
	quiet(t, dir)
	fill(t, filler)
	verifyAll(t, p, o, true)
	for _, id := range o.ids()[:min(len(o.Keys), 100)] {
		word, text = p.ask(t, o, "revoke %s 1", id)
		require.Contains(t, []string{"ok", "unavailable"}, word, text)
	}
	word, _ = p.ask(t, o, "create 1 0")
	require.Equal(t, "unavailable", word)
	require.NoError(t, os.Remove(filler))
	word, text = p.ask(t, o, "create 1 0")
	require.Equal(t, "ok", word, "the disk has space again: %s", text)
	p.kill(t, o)
	o.checkAll(t, dir, true)
	figures.RecordAs(t, "TestFullDiskHog", "%d disks filled by another program: "+
		"no process ended, nothing was lost", hogged.Add(1))
}

// hogged is the number of disks that all runs of TestFullDiskHog in this process have filled.
var hogged atomic.Int64
