package crashtest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var (
	injections = flag.Int("injections", 1,
		"inject errors into the first N calls of each kind, one call in each run; needs strace")
	exhaustive = flag.Bool("exhaustive", false,
		"inject each kind of error into each of these calls, instead of one kind in turn")
	calls = flag.String("calls", "", "inject only into these system calls, as in msync,fsync")
)

// hung is a timeout that is much longer than both lives of a victim.
const hung = 30 * time.Second

func init() { roles["sufferer"] = sufferer }

// The system calls that a store makes to write. A confined call fails only for the files of the
// store, because the process makes the same call for other files.
var syscalls = []struct {
	name     string
	confined bool
}{
	{"msync", false}, {"fsync", false}, {"fdatasync", false},
	{"pwrite64", false}, {"ftruncate", false},
	{"openat", true}, {"write", true}, {"renameat", true}, {"unlinkat", true}, {"mmap", true},
}

// sufferer has two lives. In each life, sufferer opens the store, makes the ordered number of
// changes, and closes the store. If a step fails, sufferer reports the error, reports the answers
// of the store about a valid key, and continues with the next life:
//
//	open ERROR
//	after WHAT ERROR
//	close ERROR
//	hung in WHAT
func sufferer(dir string) error {
	// If a call does not return, report the step and end the process.
	var changes int
	if _, err := fmt.Scan(&changes); err != nil {
		return err
	}
	var doing atomic.Value
	time.AfterFunc(hung, func() {
		report("hung in %v", doing.Load())
		os.Exit(1)
	})
	for range 2 {
		doing.Store("open")
		store, err := keystore.Open(dir, nil)
		report("open %s", describe(err))
		if err != nil {
			continue
		}
		doing.Store("a change")
		good, live, err := suffer(store, changes)
		if err != nil {
			afterwards(store, good, live)
		}
		doing.Store("close")
		report("close %s", describe(store.Close()))
	}
	return nil
}

// suffer makes changes until one fails. suffer returns a key that the changes do not affect, and a
// session of this key. Both are nil if they could not be made.
func suffer(store *keystore.Store, changes int) (*keystore.Issued, *keystore.Session, error) {
	good, err := create(store, 0)
	if err != nil {
		return nil, nil, err
	}
	live, err := store.Bind(context.Background(), good.Secret.Reveal())
	if err != nil {
		return good, nil, err
	}
	_, err = write(store, nil, func() bool { changes--; return changes >= 0 })
	return good, live, err
}

func afterwards(store *keystore.Store, good *keystore.Issued, live *keystore.Session) {
	ctx := context.Background()
	_, err := create(store, 0)
	report("after create %s", describe(err))
	if good == nil {
		return
	}
	_, err = store.Verify(ctx, good.Secret.Reveal())
	report("after verify %s", describe(err))
	_, err = store.Get(ctx, good.Key.ID)
	report("after get %s", describe(err))
	err = act(store, good.Key.ID, revoke, 1)
	report("after revoke %s", describe(err))
	if _, err = store.Verify(ctx, good.Secret.Reveal()); err == nil {
		report("after revoked admitted")
	}
	if live != nil && live.Context().Err() == nil {
		report("after live goes on")
	}
}

// Each system call fails in turn, either once or from this call on. Afterwards, all acknowledged
// changes must be present. Between the first failure and the end of the life, the store must admit
// no key and acknowledge no change.
func TestInjectedErrors(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("NOT RUN: strace is not installed")
	}
	out, err := exec.Command(strace, "-f", "-qq", "-o", os.DevNull, "true").CombinedOutput()
	if err != nil {
		t.Skipf("NOT RUN: strace is not allowed to trace: %s", out)
	}
	began, runs, hits := time.Now(), 0, 0
	totals := make(map[string]int) // the number of runs with an injected error, by outcome
	var notes, bad []string
	kinds := []struct{ failure, onwards string }{
		{"EIO", ""}, {"EIO", "+"}, {"ENOSPC", ""}, {"ENOSPC", "+"},
	}
	// The last two outcomes break no guarantee, and are only counted: see inject.
	good := []string{"ok", "unopened", "recovered"}
	for _, call := range syscalls {
		if *calls != "" && !slices.Contains(strings.Split(*calls, ","), call.name) {
			continue
		}
		outcomes := make(map[string]int)
		places := make(map[int]bool)
		// Stop if no error was injected for each kind of error, because there are no more such
		// calls. Also stop after two victims that hang.
		for n, missed := 1, 0; n <= *injections && missed < len(kinds) &&
			outcomes["hung"] < 2; n++ {
			for k, kind := range kinds {
				if !*exhaustive && k != n%len(kinds) {
					continue
				}
				runs++
				place, outcome := inject(t, strace, call.name, call.confined,
					kind.failure, fmt.Sprintf("%d%s", n, kind.onwards))
				if place == 0 {
					missed++
					continue
				}
				hits++
				places[place] = true
				word, _, _ := strings.Cut(outcome, " ")
				totals[word]++
				if outcomes[word]++; word != "ok" {
					notes = append(notes, fmt.Sprintf("%s %s at %d%s: %s",
						call.name, kind.failure, n, kind.onwards, outcome))
				}
				if !slices.Contains(good, word) {
					bad = append(bad, notes[len(notes)-1])
				}
			}
		}
		if len(places) > 0 {
			t.Logf("%-9s %v, at %v", call.name, outcomes, sorted(places))
		}
	}
	t.Logf("outcomes other than ok:\n%s", strings.Join(notes[:min(len(notes), 30)], "\n"))
	require.Positive(t, hits, "no error was injected")
	require.Zero(t, len(bad), "%d of %d runs:\n%s", len(bad), hits, strings.Join(bad, "\n"))
	figures.Record(t, "%d runs, %d with an injected error: nothing false was acknowledged, "+
		"nothing was lost; outcomes %v; %.2f s for each run",
		runs, hits, totals, time.Since(began).Seconds()/float64(runs))
}

func sorted(places map[int]bool) []int {
	var s []int
	for place := range places {
		s = append(s, place)
	}
	slices.Sort(s)
	return s
}

// inject runs a victim with an injected error. place is the position of the first injected error
// among all such calls of the process, or 0 if no error was injected. (strace counts the calls of
// each thread separately.) outcome is "ok", or "unopened" if the process ended in Open, or
// "recovered" if nothing is lost but only Options.Recover can open the directory again. Any other
// outcome describes what was wrong.
func inject(
	t *testing.T, strace, call string, confined bool, failure, when string,
) (place int, outcome string) {
	t.Helper()
	dir := filepath.Join(memoryDir(t), "store")
	log := filepath.Join(t.TempDir(), "strace")
	args := []string{strace, "-f", "--seccomp-bpf", "-qq", "-o", log, "-e", "trace=" + call,
		"-e", "inject=" + call + ":error=" + failure + ":when=" + when}
	if confined {
		for _, path := range storePaths(dir) {
			args = append(args, "-P", path)
		}
	}
	p := start(t, "sufferer", dir, args...)
	p.order("%d", max(20, *injections/2)) // the number of changes in each of the two lives
	o := newOracle()
	complaint := ""
	var failed bool                  // whether a change has failed in this life
	var opened, closed = false, "ok" // whether the store is open; the result of the last Close
	for line, ok := p.line(); ok; line, ok = p.line() {
		o.hear(line)
		words := strings.Fields(line)
		switch words[0] {
		case "open":
			failed, opened = false, words[1] == "ok"
			switch words[1] {
			case "ok", "unavailable", "other":
			case "corrupt": // checked below
			case "locked":
				// The store of the first life may still hold the lock if Close failed. The process
				// releases the lock at its end.
				if closed == "ok" {
					complaint = line
				}
			default:
				complaint = line
			}
		case "close":
			opened, closed = false, words[1]
		case "failed":
			failed = true
			if words[3] != "unavailable" {
				complaint = line
			}
		case "created", "done":
			// After ENOSPC a store may continue, because it may have detected the error before a
			// write.
			if failed && failure != "ENOSPC" {
				complaint = "acknowledged after a failure: " + words[0]
			}
		case "hung":
			complaint = line
		case "after":
			if words[2] == "unavailable" ||
				words[2] == "ok" && failure == "ENOSPC" && words[1] != "revoked" {
				continue
			}
			complaint = line
		}
	}
	err, died := p.cmd.Wait(), ""
	text, readErr := os.ReadFile(log)
	require.NoError(t, readErr)
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, " "+call+"(") {
			place++
		}
		if strings.Contains(line, "(INJECTED)") {
			break
		}
	}
	if !strings.Contains(string(text), "(INJECTED)") {
		place = 0
	}
	if strings.HasPrefix(complaint, "hung") {
		return place, complaint
	}
	if err != nil {
		reason, _, _ := strings.Cut(p.stderr.String(), "\n")
		// Badger ends the process if it cannot create its file DISCARD. This happens during Open,
		// before the store serves any call.
		if opened || complaint != "" {
			return place, fmt.Sprintf("died %v: %s %s", err, complaint, reason)
		}
		died = "unopened " + reason
	}
	if complaint != "" {
		return place, "untrue " + complaint
	}
	outcome = "ok"
	store, err := keystore.Open(dir, nil)
	if errors.Is(err, keystore.ErrCorrupt) {
		// Badger continues after an error, up to its Close. If the sync of the manifest fails, the
		// manifest may list tables that Badger then deletes. If the sync of a log fails, Badger may
		// already have merged tables. All data is present, but Open cannot know this.
		outcome = "recovered after " + err.Error()
		store, err = keystore.Open(dir, &keystore.Options{Recover: func(error) {}})
	}
	if err != nil {
		return place, "unopenable " + err.Error()
	}
	if err := o.check(t.Context(), store, o.ids(), true); err != nil {
		return place, "lost " + err.Error()
	}
	if err := checkEvents(t.Context(), store); err != nil {
		return place, "lost " + err.Error()
	}
	if _, err := store.Create(t.Context(), keystore.Spec{Name: "afterwards"}); err != nil {
		return place, "unrecovered " + err.Error()
	}
	if err := store.Close(); err != nil {
		return place, "unclosable " + err.Error()
	}
	if died != "" {
		return place, died
	}
	return place, outcome
}

// storePaths returns the paths of all files that a store may have. The fixed names come from
// fileNames. The numbered names start at 0.
func storePaths(dir string) []string {
	paths := []string{dir, filepath.Join(dir, "MANIFEST-REWRITE")}
	for _, name := range fileNames() {
		paths = append(paths, filepath.Join(dir, name))
	}
	for n := range 12 {
		for _, pattern := range []string{"%05d.mem", "%06d.vlog", "%06d.sst"} {
			paths = append(paths, filepath.Join(dir, fmt.Sprintf(pattern, n)))
		}
	}
	return paths
}

// fileNames returns the names without a number of the files of a store, both while the store is
// open and after Close.
var fileNames = sync.OnceValue(func() (names []string) {
	dir, err := os.MkdirTemp("", "crashtest")
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	look := func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if !slices.Contains(names, e.Name()) &&
				!strings.ContainsAny(e.Name()[:1], "0123456789") {
				names = append(names, e.Name())
			}
		}
	}
	store, err := keystore.Open(dir, nil)
	if err != nil {
		panic(err)
	}
	if _, err := store.Create(context.Background(), keystore.Spec{Name: "first"}); err != nil {
		panic(err)
	}
	look()
	if err := store.Close(); err != nil {
		panic(err)
	}
	look()
	return names
})
