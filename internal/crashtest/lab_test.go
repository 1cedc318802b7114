package crashtest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var seed = flag.Uint64("seed", 0,
	"seed of the random damage and of the random times; 0 means a random seed, which is logged")

// seeded returns a random source with the seed of the flag -seed.
func seeded(t *testing.T) *rand.Rand {
	n := *seed
	if n == 0 {
		n = rand.Uint64()
	}
	t.Logf("-seed %d", n)
	return rand.New(rand.NewPCG(n, 0))
}

func moment(random *rand.Rand, within time.Duration) time.Duration {
	return time.Duration(random.Int64N(int64(within)))
}

// Environment variables for a process that runs this test binary in another role.
const (
	roleVar = "CRASHTEST_ROLE"
	dirVar  = "CRASHTEST_DIR"
)

// roles contains the roles of this binary. Each role works on a directory, writes reports to
// standard output, one line for each report, and reads orders from standard input.
var roles = map[string]func(dir string) error{
	"writer": writer,
	"worker": worker,
	"judge":  judge,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleVar); role != "" {
		if err := roles[role](os.Getenv(dirVar)); err != nil {
			fmt.Fprintln(os.Stderr, role+":", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// report writes a line to the parent. Each line is one write without a buffer, so that the parent
// receives only complete lines if the process is killed.
func report(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	_, _ = os.Stdout.WriteString(strings.ReplaceAll(line, "\n", " / ") + "\n")
}

// The actions on a key. Each action raises the revision of the key by one, because the victims make
// only actions that change the key.
const (
	revoke  = "revoke"
	disable = "disable"
	enable  = "enable"
	update  = "update"
	rotate  = "rotate"
)

// A state is the state of a key between two changes.
type state struct {
	Revision uint64
	Status   keystore.Status
	Name     string
	Token    string // empty after a rotation whose new secret was not reported
}

// after returns the state after an action in state s. The token after a rotation is unknown until
// the rotation is acknowledged.
func (s state) after(action string) state {
	s.Revision++
	switch action {
	case revoke:
		s.Status = keystore.StatusRevoked
	case disable:
		s.Status = keystore.StatusDisabled
	case enable:
		s.Status = keystore.StatusActive
	case update:
		s.Name = nameAt(s.Revision)
	case rotate:
		s.Token = ""
	}
	return s
}

// nameAt returns the name that an update to a revision sets. So the revision determines the name.
func nameAt(revision uint64) string { return fmt.Sprintf("name %d", revision) }

// ownerAt returns the owner that an update to a revision sets, so that updates move the key in the
// index of owners.
func ownerAt(revision uint64) string { return fmt.Sprintf("owner %d", revision%5) }

// act runs an action. act reports the action before the call and the result after the call, with
// the new token if the action is a rotation:
//
//	trying ID ACTION
//	done ID ACTION [TOKEN]
//	failed ID ACTION ERROR
func act(store *keystore.Store, id, action string, revision uint64) error {
	ctx := context.Background()
	report("trying %s %s", id, action)
	token := ""
	var err error
	switch action {
	case revoke:
		err = store.Revoke(ctx, id, "crash test")
	case disable:
		err = store.Disable(ctx, id, "crash test")
	case enable:
		err = store.Enable(ctx, id)
	case update:
		_, err = store.Update(ctx, id, func(spec *keystore.Spec) error {
			spec.Name, spec.Owner = nameAt(revision+1), ownerAt(revision+1)
			return nil
		})
	case rotate:
		var issued *keystore.Issued
		if issued, err = store.Rotate(ctx, id, 0); err == nil {
			token = issued.Secret.Reveal()
		}
	default:
		return fmt.Errorf("no such action: %q", action)
	}
	if err != nil {
		report("failed %s %s %s", id, action, describe(err))
		return err
	}
	report("done %s %s %s", id, action, token)
	return nil
}

// create creates a key and reports one of these lines:
//
//	created ID TOKEN
//	failed - create ERROR
func create(store *keystore.Store, padding int) (*keystore.Issued, error) {
	spec := keystore.Spec{Name: nameAt(1), Owner: ownerAt(1)}
	if padding > 0 {
		spec.Metadata = map[string]string{"padding": strings.Repeat("x", padding)}
	}
	issued, err := store.Create(context.Background(), spec)
	if err != nil {
		report("failed - create %s", describe(err))
		return nil, err
	}
	report("created %s %s", issued.Key.ID, issued.Secret.Reveal())
	return issued, nil
}

// sentinels maps errors to words, so that the parent can distinguish the errors. More specific
// errors come before more general errors.
var sentinels = []struct {
	word string
	err  error
}{
	{"unavailable", keystore.ErrUnavailable},
	{"corrupt", keystore.ErrCorrupt},
	{"locked", keystore.ErrLocked},
	{"closed", keystore.ErrClosed},
	{"notfound", keystore.ErrNotFound},
	{"revoked", keystore.ErrRevoked},
	{"disabled", keystore.ErrDisabled},
	{"unknown", keystore.ErrUnknown},
}

// describe returns the word for an error, followed by the text of the error.
func describe(err error) string {
	if err == nil {
		return "ok"
	}
	for _, s := range sentinels {
		if errors.Is(err, s.err) {
			return s.word + " " + err.Error()
		}
	}
	return "other " + err.Error()
}

// writer creates keys, and changes new and existing keys, from several goroutines, until the
// process is killed.
func writer(dir string) error {
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	const writers = 4
	found := make([][]keystore.Key, writers)
	n := 0
	for key, err := range store.List(context.Background(), keystore.Query{}) {
		if err != nil {
			return err
		}
		found[n%writers] = append(found[n%writers], *key)
		n++
	}
	report("open")
	failed := make(chan error)
	for _, mine := range found {
		go func() {
			_, err := write(store, mine, func() bool { return true })
			failed <- err
		}()
	}
	return <-failed
}

// write creates and changes keys as long as goOn returns true. No other goroutine changes the keys
// in mine. write returns the keys in their last state.
func write(store *keystore.Store, mine []keystore.Key, goOn func() bool) ([]keystore.Key, error) {
	for goOn() {
		if len(mine) == 0 || rand.N(3) == 0 {
			issued, err := create(store, 0)
			if err != nil {
				return mine, err
			}
			mine = append(mine, *issued.Key)
			continue
		}
		// Mostly choose one of the latest keys, so that a key has several changes. Sometimes choose
		// any key.
		n := len(mine) - 1 - rand.N(min(len(mine), 8))
		if rand.N(4) == 0 {
			n = rand.N(len(mine))
		}
		key := &mine[n]
		var action string
		switch key.Status() {
		case keystore.StatusRevoked:
			mine = slices.Delete(mine, n, n+1)
			continue
		case keystore.StatusDisabled:
			action = []string{enable, revoke, rotate}[rand.N(3)]
		default:
			action = []string{revoke, revoke, disable, update, rotate}[rand.N(5)]
		}
		if err := act(store, key.ID, action, key.Revision); err != nil {
			return mine, err
		}
		key.Revision++
		switch action {
		case revoke:
			key.RevokedAt = time.Now()
		case disable:
			key.DisabledAt = time.Now()
		case enable:
			key.DisabledAt = time.Time{}
		}
	}
	return mine, nil
}

// A key is the knowledge of the parent about one key.
type key struct {
	Acked state    // the last acknowledged state
	Doubt *state   // the state after a change whose outcome is unknown, or nil
	Old   []string // tokens that an acknowledged rotation has replaced
}

// An oracle is the knowledge of the parent about a store. The oracle exists during the whole test,
// over many processes: a change that was acknowledged in one cycle must be present in each later
// cycle.
type oracle struct {
	Keys         map[string]*key
	Acknowledged int // the number of acknowledged changes
	touched      map[string]bool
	heard        func() // called after each acknowledged change, unless nil
}

func newOracle() *oracle {
	return &oracle{Keys: make(map[string]*key), touched: make(map[string]bool)}
}

// hear updates the oracle with a line of output, and reports whether the line was a report about a
// key.
func (o *oracle) hear(line string) bool {
	words := strings.Fields(line)
	if len(words) < 3 {
		return false
	}
	id := words[1]
	if words[0] != "created" && o.Keys[id] == nil {
		// The process ended before it reported the creation of the key, and a later process found
		// the key.
		return true
	}
	switch words[0] {
	case "created":
		o.Keys[id] = &key{Acked: state{
			Revision: 1, Status: keystore.StatusActive, Name: nameAt(1), Token: words[2],
		}}
		o.Acknowledged++
	case "trying":
		doubt := o.Keys[id].Acked.after(words[2])
		o.Keys[id].Doubt = &doubt
	case "done":
		k := o.Keys[id]
		next := *k.Doubt
		if words[2] == rotate {
			k.Old = append(k.Old, k.Acked.Token)
			next.Token = words[3]
		}
		k.Acked, k.Doubt = next, nil
		o.Acknowledged++
	case "failed": // the change may have happened: the doubt remains
		return true
	default:
		return false
	}
	if o.touched != nil {
		o.touched[id] = true
	}
	if o.heard != nil && words[0] != "trying" {
		o.heard()
	}
	return true
}

// enough is the number of acknowledged changes that aim waits for.
const enough = 22

// aim returns a function that hears each line of a writer, and reports whether the process may be
// killed from now on. A process may be killed once the process has opened the store. If late is
// true, the process must also have made enough changes, however slow the disk is.
func (o *oracle) aim(late bool) func(line string) bool {
	open, first := false, o.Acknowledged
	return func(line string) bool {
		o.hear(line)
		open = open || line == "open"
		return open && (!late || o.Acknowledged >= first+enough)
	}
}

func (o *oracle) ids() []string { return slices.Sorted(maps.Keys(o.Keys)) }

// recent returns the keys that were changed since the last call of recent, and some other keys.
func (o *oracle) recent(others int) []string {
	ids := slices.Collect(maps.Keys(o.touched))
	clear(o.touched)
	for id := range o.Keys { // in random order
		if others--; others < 0 {
			break
		}
		ids = append(ids, id)
	}
	return ids
}

// A wrong is the error for an answer of a store that contradicts the oracle.
type wrong struct{ text string }

func (w *wrong) Error() string { return w.text }

// check compares the keys in the store with the oracle. check returns a *wrong if an answer of the
// store contradicts the oracle, and otherwise the first error of the store. If decide is true and
// the store answers, the answer decides a change whose outcome was unknown.
func (o *oracle) check(
	ctx context.Context, store *keystore.Store, ids []string, decide bool,
) (trouble error) {
	for _, id := range ids {
		err := o.checkKey(ctx, store, id, decide)
		if w := new(wrong); errors.As(err, &w) {
			return err
		}
		if trouble == nil {
			trouble = err
		}
	}
	return trouble
}

func (o *oracle) checkKey(
	ctx context.Context, store *keystore.Store, id string, decide bool,
) error {
	k := o.Keys[id]
	got, err := store.Get(ctx, id)
	if errors.Is(err, keystore.ErrNotFound) {
		return &wrong{fmt.Sprintf("key %s, at revision %d, is lost", id, k.Acked.Revision)}
	}
	if err != nil {
		return err
	}
	is := k.Acked
	if k.Doubt != nil && got.Revision == k.Doubt.Revision {
		is = *k.Doubt
	}
	if got.Revision != is.Revision || got.Status() != is.Status || got.Name != is.Name {
		return &wrong{fmt.Sprintf(
			"key %s is %v %q at revision %d, but the acknowledged state is %v %q at revision %d",
			id, got.Status(), got.Name, got.Revision, is.Status, is.Name, is.Revision)}
	}
	old := k.Old
	if is.Token != "" {
		if err := expect(ctx, store, id, is.Token, admission(is.Status)); err != nil {
			return err
		}
	} else {
		old = append(slices.Clip(old), k.Acked.Token)
	}
	for _, token := range old {
		if token == "" {
			continue
		}
		if err := expect(ctx, store, id, token, keystore.ErrUnknown); err != nil {
			return err
		}
	}
	if decide && k.Doubt != nil {
		k.Acked, k.Doubt, k.Old = is, nil, old
	}
	return nil
}

// admission returns the error of Verify for a key with a status.
func admission(s keystore.Status) error {
	switch s {
	case keystore.StatusRevoked:
		return keystore.ErrRevoked
	case keystore.StatusDisabled:
		return keystore.ErrDisabled
	default:
		return nil
	}
}

func expect(ctx context.Context, store *keystore.Store, id, token string, want error) error {
	_, err := store.Verify(ctx, token)
	switch {
	case want == nil && err == nil, want != nil && errors.Is(err, want):
		return nil
	case err == nil || errors.Is(err, keystore.ErrDenied):
		return &wrong{fmt.Sprintf("key %s: Verify returns %v, but must return %v", id, err, want)}
	default:
		return err
	}
}

// checkEvents returns a *wrong unless there is exactly one event for each revision of each key, in
// order. So there is no change without its event, and no event without its change.
func checkEvents(ctx context.Context, store *keystore.Store) error {
	revisions := make(map[string]uint64)
	for e, err := range store.Events(ctx, keystore.EventQuery{}) {
		if err != nil {
			return err
		}
		revisions[e.KeyID]++
		if revisions[e.KeyID] != e.Revision {
			return &wrong{fmt.Sprintf("key %s: the event of revision %d is at position %d",
				e.KeyID, e.Revision, revisions[e.KeyID])}
		}
	}
	for key, err := range store.List(ctx, keystore.Query{}) {
		if err != nil {
			return err
		}
		if revisions[key.ID] != key.Revision {
			return &wrong{fmt.Sprintf("key %s is at revision %d and has %d events",
				key.ID, key.Revision, revisions[key.ID])}
		}
		delete(revisions, key.ID)
	}
	if len(revisions) > 0 {
		return &wrong{fmt.Sprintf("there are events of %d missing keys", len(revisions))}
	}
	return checkIndexes(ctx, store)
}

// checkIndexes returns a *wrong unless the lists of the keys of each owner are together the list of
// all keys, and unless the list of the events of each key is complete.
func checkIndexes(ctx context.Context, store *keystore.Store) error {
	owners := make(map[string][]*keystore.Key)
	for key, err := range store.List(ctx, keystore.Query{}) {
		if err != nil {
			return err
		}
		if key.Owner != "" {
			owners[key.Owner] = append(owners[key.Owner], key)
		}
	}
	for owner, keys := range owners {
		next := 0
		for key, err := range store.List(ctx, keystore.Query{Owner: owner}) {
			if err != nil {
				return err
			}
			if next == len(keys) || keys[next].ID != key.ID {
				return &wrong{fmt.Sprintf("the list of %s has key %s at position %d", owner, key.ID, next)}
			}
			next++
			revision := uint64(0)
			for e, err := range store.Events(ctx, keystore.EventQuery{KeyID: key.ID}) {
				if err != nil {
					return err
				}
				if revision++; e.Revision != revision {
					return &wrong{fmt.Sprintf("key %s: the event of revision %d is at position %d "+
						"of the list of the key", key.ID, e.Revision, revision)}
				}
			}
			if revision != key.Revision {
				return &wrong{fmt.Sprintf("key %s is at revision %d, and the list of its events has %d",
					key.ID, key.Revision, revision)}
			}
		}
		if next != len(keys) {
			return &wrong{fmt.Sprintf("the list of %s has %d of %d keys", owner, next, len(keys))}
		}
	}
	return store.CheckIntegrity(ctx)
}

// checkAll opens the directory, and requires that the store agrees with the oracle. If whole is
// true, checkAll checks all keys and events. Otherwise, checkAll checks the recently changed keys
// and a sample of the rest.
func (o *oracle) checkAll(t *testing.T, dir string, whole bool) {
	t.Helper()
	store, err := keystore.Open(dir, nil)
	require.NoError(t, err)
	ids := o.recent(500)
	if whole {
		ids = o.ids()
		require.NoError(t, checkEvents(t.Context(), store))
	}
	require.NoError(t, o.check(t.Context(), store, ids, true))
	require.NoError(t, store.Close())
}

// write writes the oracle to a file, for a judge.
func (o *oracle) write(t *testing.T, path string) {
	t.Helper()
	text, err := json.Marshal(o)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(path, text, 0o600))
}

func readOracle(path string) (*oracle, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	o := new(oracle)
	return o, json.Unmarshal(text, o)
}

// A process is this test binary in another role.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr *tail
}

// start starts a process with a role on a directory. If wrapper is not empty, wrapper is a command
// that runs the process, such as strace.
func start(t *testing.T, role, dir string, wrapper ...string) *process {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	argv := append(wrapper, self)
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), stderr: new(tail)}
	p.cmd.Env = append(os.Environ(), roleVar+"="+role, dirVar+"="+dir)
	p.cmd.Stderr = p.stderr
	p.in, err = p.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	p.out = bufio.NewReader(out)
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() { // in case the test has not waited for the process
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

// line returns the next line of the report, or false if the process has ended. An incomplete line
// does not count as a report.
func (p *process) line() (string, bool) {
	line, err := p.out.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err == nil
}

func (p *process) order(format string, args ...any) {
	_, _ = fmt.Fprintf(p.in, format+"\n", args...) // if the process is dead, line returns false
}

// kill kills the process, and passes the last reports to the oracle. kill requires that the process
// was alive.
func (p *process) kill(t *testing.T, o *oracle) {
	t.Helper()
	_ = p.cmd.Process.Kill()
	for line, ok := p.line(); ok; line, ok = p.line() {
		o.hear(line)
	}
	require.ErrorContains(t, p.cmd.Wait(), "signal: killed",
		"the process was dead already: %s", p.stderr)
}

// A tail keeps the first 2,000 bytes of the standard error of a process. These bytes contain the
// reason of a crash, without the stacks of all goroutines.
type tail struct {
	mu   sync.Mutex
	text []byte
}

func (s *tail) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.text = append(s.text, p[:min(len(p), 2000-min(2000, len(s.text)))]...)
	return len(p), nil
}

func (s *tail) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(s.text)
}
