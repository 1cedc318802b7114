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

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var (
	injections = flag.Int("injections", 1, "up to which call of each kind to inject an error, in turn; needs strace")
	exhaustive = flag.Bool("exhaustive", false, "inject each of the errors into each of these calls, not one after the other")
	calls      = flag.String("calls", "", "inject into these only, as in msync,fsync")
)

// hung is far longer than both lives of a victim take.
const hung = 30 * time.Second

func init() { roles["sufferer"] = sufferer }

// The calls that a store makes of the kernel to write. Those that would hit other files of the
// process too are confined to the store's.
var syscalls = []struct {
	name     string
	confined bool
}{
	{"msync", false}, {"fsync", false}, {"fdatasync", false}, {"pwrite64", false}, {"ftruncate", false},
	{"openat", true}, {"write", true}, {"renameat", true}, {"unlinkat", true}, {"mmap", true},
}

// sufferer lives twice: it opens the store, changes keys, as often as it is ordered to, and closes
// it. What fails it reports, and then what is said of a key that was good, and goes on to the next
// life:
//
//	open ERROR
//	after WHAT ERROR
//	close ERROR
//	hung in WHAT
func sufferer(dir string) error {
	// A call that never returns ends the process; the report says behind what.
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

// suffer makes changes until one fails. It returns a key that they leave alone, if there is one,
// and a context that is bound to it.
func suffer(store *keystore.Store, changes int) (*keystore.Issued, context.Context, error) {
	good, err := create(store, 0)
	if err != nil {
		return nil, nil, err
	}
	live, _, _, err := store.Bind(context.Background(), good.Secret.Reveal())
	if err != nil {
		return good, nil, err
	}
	_, err = write(store, nil, func() bool { changes--; return changes >= 0 })
	return good, live, err
}

func afterwards(store *keystore.Store, good *keystore.Issued, live context.Context) {
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
	if live != nil && live.Err() == nil {
		report("after live goes on")
	}
}

// With every call failing in turn, once or from then on: what was acknowledged is there afterwards,
// and nothing was admitted or acknowledged between the first failure and the end of that life.
func TestInjectedErrors(t *testing.T) {
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("NOT RUN: there is no strace")
	}
	if out, err := exec.Command(strace, "-f", "-qq", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("NOT RUN: strace may not trace here: %s", out)
	}
	began, runs, hits := time.Now(), 0, 0
	var notes, bad []string
	kinds := []struct{ failure, onwards string }{{"EIO", ""}, {"EIO", "+"}, {"ENOSPC", ""}, {"ENOSPC", "+"}}
	// The last two are no failures of what is promised, and are counted: see inject.
	good := []string{"ok", "unopened", "recovered"}
	for _, call := range syscalls {
		if *calls != "" && !slices.Contains(strings.Split(*calls, ","), call.name) {
			continue
		}
		outcomes := make(map[string]int)
		places := make(map[int]bool)
		// No errors from some call on: there are no more such calls. Two that hang: enough to know.
		for n, missed := 1, 0; n <= *injections && missed < len(kinds) && outcomes["hung"] < 2; n++ {
			for k, kind := range kinds {
				if !*exhaustive && k != n%len(kinds) {
					continue
				}
				runs++
				place, outcome := inject(t, strace, call.name, call.confined, kind.failure, fmt.Sprintf("%d%s", n, kind.onwards))
				if place == 0 {
					missed++
					continue
				}
				hits++
				places[place] = true
				word, _, _ := strings.Cut(outcome, " ")
				if outcomes[word]++; word != "ok" {
					notes = append(notes, fmt.Sprintf("%s %s at %d%s: %s", call.name, kind.failure, n, kind.onwards, outcome))
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
	t.Logf("not quite as good as ok:\n%s", strings.Join(notes[:min(len(notes), 30)], "\n"))
	t.Logf("%d runs, %d with an injected error; %.2f s each", runs, hits, time.Since(began).Seconds()/float64(runs))
	require.Positive(t, hits, "no error was injected")
	require.Zero(t, len(bad), "%d of %d runs:\n%s", len(bad), hits, strings.Join(bad, "\n"))
}

func sorted(places map[int]bool) []int {
	var s []int
	for place := range places {
		s = append(s, place)
	}
	slices.Sort(s)
	return s
}

// inject runs the victim with an error, and returns at the how-manieth of all such calls it was hit
// first (strace counts those of each thread by themselves), 0 if it was not, and what came of it:
// "ok"; "unopened", if the process ended in Open; "recovered", if nothing is lost and it took
// Options.Recover to open the directory again; or what was wrong.
func inject(t *testing.T, strace, call string, confined bool, failure, when string) (place int, outcome string) {
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
	p.order("%d", max(20, *injections/2)) // each of two lives has that many changes
	o := newOracle()
	complaint := ""
	var failed bool                  // in this life
	var opened, closed = false, "ok" // whether it is open; what the last Close said
	for line, ok := p.line(); ok; line, ok = p.line() {
		o.hear(line)
		words := strings.Fields(line)
		switch words[0] {
		case "open":
			failed, opened = false, words[1] == "ok"
			switch words[1] {
			case "ok", "unavailable", "other":
			case "corrupt": // what that is worth is seen below
			case "locked": // by the one before, if it could not be closed: the directory is free when the process is gone
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
			// After ENOSPC a store may go on: it may have found out before it wrote anything.
			if failed && failure != "ENOSPC" {
				complaint = "acknowledged after a failure: " + words[0]
			}
		case "hung":
			complaint = line
		case "after":
			if words[2] == "unavailable" || words[2] == "ok" && failure == "ENOSPC" && words[1] != "revoked" {
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
		// Badger ends the process if it cannot make its file DISCARD. That is while it is opened:
		// nobody was served.
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
		// Badger goes on after an error, and closes what has failed: it names tables in the
		// manifest that it then deletes, if the manifest could not be synced, and has merged tables
		// when the logs could not be. All is there, but Open cannot know.
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

// storePaths are the files that a store may have. The directory of one that was used is looked at
// for their names; numbers count up.
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

// fileNames are those that a store has when it is open, and when it was closed.
var fileNames = sync.OnceValue(func() (names []string) {
	dir, err := os.MkdirTemp("", "crashtest")
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	look := func() {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if !slices.Contains(names, e.Name()) && !strings.ContainsAny(e.Name()[:1], "0123456789") {
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
