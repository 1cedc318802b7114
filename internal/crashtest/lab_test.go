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

var seed = flag.Uint64("seed", 0, "of the corruptions and of the moments; 0 draws one and says which")

// seeded returns a source of randomness that -seed repeats.
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

// What the environment of a process says that is this test binary, run again as something else.
const (
	roleVar = "CRASHTEST_ROLE"
	dirVar  = "CRASHTEST_DIR"
)

// The programs that this binary can be run as. Each works on the directory, reports to its standard
// output, one line at a time, and takes orders from its standard input.
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

// report writes a line to the parent: one write each, without a buffer, so that what a process had
// time to say arrives whole.
func report(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	_, _ = os.Stdout.WriteString(strings.ReplaceAll(line, "\n", " / ") + "\n")
}

// What happens to keys. Each raises the revision of a key by one, because the victims do only what
// changes something.
const (
	revoke  = "revoke"
	disable = "disable"
	enable  = "enable"
	update  = "update"
	rotate  = "rotate"
)

// A state is what a key is between two changes.
type state struct {
	Revision uint64
	Status   keystore.Status
	Name     string
	Token    string // empty: the key was rotated, and nobody was told the secret
}

// after returns the state that an action makes of s. A rotation's token is not known until it is
// acknowledged.
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

// nameAt is the name that an update to a revision gives: whoever knows the revision knows the name.
func nameAt(revision uint64) string { return fmt.Sprintf("name %d", revision) }

// act does an action, and returns the new token if it was a rotation. It reports what it is about
// to do and what has been acknowledged:
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
			spec.Name = nameAt(revision + 1)
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

// create makes a key and reports
//
//	created ID TOKEN
//	failed - create ERROR
func create(store *keystore.Store, padding int) (*keystore.Issued, error) {
	spec := keystore.Spec{Name: nameAt(1)}
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

// The error values that the parent can tell apart over the pipe, the more special before the more
// general.
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

// describe is the word for an error, and its text.
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

// writer creates and changes keys, its own and those that it finds, from several goroutines, until
// it is killed.
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

// write changes keys that nobody else changes, and creates some, while it may go on. It returns
// them as they are then.
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
		// One of the latest, mostly, so that keys live through several changes; or one from long ago.
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

// A key is what the parent knows of one.
type key struct {
	Acked state    // the last state that was acknowledged
	Doubt *state   // what the change made of it that was under way when the process ended, unless nil
	Old   []string // tokens that were acknowledged to be replaced
}

// An oracle is what the parent knows of a store. It outlives every process: whatever was
// acknowledged in any cycle holds in each later one.
type oracle struct {
	Keys         map[string]*key
	Acknowledged int // changes
	touched      map[string]bool
	heard        func() // called for each change that is acknowledged, unless nil
}

func newOracle() *oracle { return &oracle{Keys: make(map[string]*key), touched: make(map[string]bool)} }

// hear takes in a line of a report, and says whether it was one.
func (o *oracle) hear(line string) bool {
	words := strings.Fields(line)
	if len(words) < 3 {
		return false
	}
	id := words[1]
	if words[0] != "created" && o.Keys[id] == nil {
		return true // its creation was not acknowledged: the process ended before, and a later one has found it
	}
	switch words[0] {
	case "created":
		o.Keys[id] = &key{Acked: state{Revision: 1, Status: keystore.StatusActive, Name: nameAt(1), Token: words[2]}}
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
	case "failed": // it may have happened: the doubt stays
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

func (o *oracle) ids() []string { return slices.Sorted(maps.Keys(o.Keys)) }

// recent returns the keys that were changed since it was called last, and some others.
func (o *oracle) recent(others int) []string {
	ids := slices.Collect(maps.Keys(o.touched))
	clear(o.touched)
	for id := range o.Keys { // in no order
		if others--; others < 0 {
			break
		}
		ids = append(ids, id)
	}
	return ids
}

// A wrong is an answer of a store that the oracle knows better.
type wrong struct{ text string }

func (w *wrong) Error() string { return w.text }

// check compares keys with what the store says, and returns a *wrong if it says of any what is not
// so, or else the first of the store's own errors if it could not tell of all. If it could, what
// was in doubt is decided then.
func (o *oracle) check(ctx context.Context, store *keystore.Store, ids []string, settle bool) (trouble error) {
	for _, id := range ids {
		err := o.checkKey(ctx, store, id, settle)
		if w := new(wrong); errors.As(err, &w) {
			return err
		}
		if trouble == nil {
			trouble = err
		}
	}
	return trouble
}

func (o *oracle) checkKey(ctx context.Context, store *keystore.Store, id string, settle bool) error {
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
		return &wrong{fmt.Sprintf("key %s is %v %q at revision %d: acknowledged was %v %q at %d",
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
	if settle && k.Doubt != nil {
		k.Acked, k.Doubt, k.Old = is, nil, old
	}
	return nil
}

// admission is what Verify says of a key of a status.
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
		return &wrong{fmt.Sprintf("key %s: Verify says %v: it should say %v", id, err, want)}
	default:
		return err
	}
}

// checkEvents returns a *wrong unless there is one event for each revision of each key, in order:
// no change without its event, and no event without its change.
func checkEvents(ctx context.Context, store *keystore.Store) error {
	revisions := make(map[string]uint64)
	for e, err := range store.Events(ctx, keystore.EventQuery{}) {
		if err != nil {
			return err
		}
		revisions[e.KeyID]++
		if revisions[e.KeyID] != e.Revision {
			return &wrong{fmt.Sprintf("key %s: the event of revision %d comes in place %d", e.KeyID, e.Revision, revisions[e.KeyID])}
		}
	}
	for key, err := range store.List(ctx, keystore.Query{}) {
		if err != nil {
			return err
		}
		if revisions[key.ID] != key.Revision {
			return &wrong{fmt.Sprintf("key %s is at revision %d and has %d events", key.ID, key.Revision, revisions[key.ID])}
		}
		delete(revisions, key.ID)
	}
	if len(revisions) > 0 {
		return &wrong{fmt.Sprintf("events of %d keys that are not there", len(revisions))}
	}
	return nil
}

// checkAll opens the directory, which must work, and requires that it has all that the oracle
// knows, or that it has what was changed lately and a sample of the rest.
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

// write stores the oracle for a judge.
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

// A process is this test binary at work as something else.
type process struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	stderr *tail
}

// start runs a role on a directory; under what wraps the command, if that is not empty.
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
	t.Cleanup(func() { // of one that has not been waited for
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	})
	return p
}

// line returns the next line of the report, or false when the process has ended. A line that was
// cut off was not acknowledged.
func (p *process) line() (string, bool) {
	line, err := p.out.ReadString('\n')
	return strings.TrimSuffix(line, "\n"), err == nil
}

func (p *process) order(format string, args ...any) {
	_, _ = fmt.Fprintf(p.in, format+"\n", args...) // to a process that is dead: line tells
}

// kill ends the process, lets the oracle hear what it had still said, and requires that it lived
// until then.
func (p *process) kill(t *testing.T, o *oracle) {
	t.Helper()
	_ = p.cmd.Process.Kill()
	for line, ok := p.line(); ok; line, ok = p.line() {
		o.hear(line)
	}
	require.ErrorContains(t, p.cmd.Wait(), "signal: killed", "it was dead already: %s", p.stderr)
}

// A tail keeps the beginning of what a process says as it dies: the reason, without a thousand
// goroutines.
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
