package keystore

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
)

// victimJob holds what a process that is to be killed shall do, in its environment.
const victimJob = "KEYSTORE_LINEARIZABLE_VICTIM"

// A job is a part of a history: what to go on with.
type job struct {
	Dir   string
	Seed  uint64
	Opens int
	Last  int32 // op's number
	Keys  []*played
	Wrong bool // the store loses what it acknowledged
}

// A report is an op that is about to be called, or has returned; with the secret that it made.
type report struct {
	Op     op
	Secret string
}

// TestLinearizableVictim is no test, but the process that TestLinearizableOverKills kills. It plays
// clients, and says each op over its standard output before it calls it, and again when it has
// returned: what was not said before the end was not acknowledged.
func TestLinearizableVictim(t *testing.T) {
	text := os.Getenv(victimJob)
	if text == "" {
		t.Skip("SKIPPED: it is started, to be killed, by TestLinearizableOverKills")
	}
	var j job
	require.NoError(t, json.Unmarshal([]byte(text), &j))
	open := openPlain
	if j.Wrong {
		open = openForgetful
	}
	s, err := open(j.Dir)
	require.NoError(t, err)
	tr := newTrial(j.Seed, 0)
	tr.keys = j.Keys
	tr.last.Store(j.Last)
	p := tr.player(s, j.Opens)
	var mu sync.Mutex
	out := json.NewEncoder(os.Stdout) // one write for each op, without a buffer
	p.record = func(o op, secret string) {
		mu.Lock()
		defer mu.Unlock()
		if out.Encode(report{o, secret}) != nil {
			os.Exit(1) // the parent is gone
		}
	}
	p.play(roundClients, roundOps)
	_, _ = io.Copy(io.Discard, os.Stdin) // until it is killed, or its parent gone
	os.Exit(1)
}

// One history goes on over several processes, each of them killed somewhere amid its ops. Their
// moments are of one clock.
func TestLinearizableOverKills(t *testing.T) {
	needsDirectory(t)
	seed := seedOf()
	count := make(tally)
	trials := uint64(max(2, *rounds/50))
	for n := range trials {
		err := overKills(t, seed+n, false, count)
		if errors.Is(err, errClock) {
			t.Log(err)
			continue
		}
		require.NoError(t, err, "again: go test ./keystore -run OverKills -rounds 1 -seed %d", seed+
			n)
	}
	t.Logf("what the histories came to:\n%v", count)
	doubts := 0
	for what, n := range count {
		if strings.HasSuffix(what, inDoubt) {
			doubts += n
		}
	}
	require.NotZero(t, doubts, "nobody was killed amid a change")
	figures.Record(t, "%d histories of %d kills each from seed %d: 0 violations",
		trials, killsEach, seed)
}

// A store that loses at a kill what it acknowledged is caught.
func TestLinearizableOverKillsCatches(t *testing.T) {
	needsDirectory(t)
	caught(t, func(seed uint64) error { return overKills(t, seed, true, make(tally)) })
}

const killsEach = 3

func overKills(t *testing.T, seed uint64, wrong bool, count tally) error {
	r := rand.New(rand.NewPCG(seed, 2))
	dir, err := os.MkdirTemp(t.TempDir(), "")
	require.NoError(t, err)
	defer func() { require.NoError(t, os.RemoveAll(dir)) }()
	tr := newTrial(seed, roundKeys)
	for n := range killsEach {
		tr.kill(t, r, job{Dir: dir, Seed: seed, Opens: n, Last: tr.last.Load(), Keys: tr.keys,
			Wrong: wrong})
	}
	s, err := openPlain(dir)
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	p := tr.player(s, killsEach)
	p.final = true
	p.play(roundClients, roundOps)
	_, err = tr.finish(p, time.Time{})
	count.add(tr)
	return err
}

// kill runs a victim, and kills it when it has said so many ops.
func (t *trial) kill(tb *testing.T, r *rand.Rand, j job) {
	self, err := os.Executable()
	require.NoError(tb, err)
	text, err := json.Marshal(j)
	require.NoError(tb, err)
	cmd := exec.Command(self, "-test.run", "^TestLinearizableVictim$")
	cmd.Env = append(os.Environ(), victimJob+"="+string(text))
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	require.NoError(tb, err)
	stdin, err := cmd.StdinPipe()
	require.NoError(tb, err)
	defer stdin.Close()
	require.NoError(tb, cmd.Start())
	enough := 10 + r.IntN(250) // a whole part has more
	cut := make(map[int32]op)  // called, and not returned
	lines := bufio.NewReader(pipe)
	for said := 0; ; said++ {
		if said == enough {
			require.NoError(tb, cmd.Process.Kill())
		}
		line, err := lines.ReadString('\n')
		if err != nil {
			break // a line that was cut off was not said
		}
		var rep report
		require.NoError(tb, json.Unmarshal([]byte(line), &rep),
			"the victim has said something else: did it fail?")
		t.last.Store(max(t.last.Load(), rep.Op.N))
		if rep.Op.Return == 0 {
			cut[rep.Op.N] = rep.Op
			continue
		}
		delete(cut, rep.Op.N)
		t.record(rep.Op, "")
		t.learn(rep)
	}
	require.ErrorContains(tb, cmd.Wait(), "signal: killed")
	for _, o := range cut {
		o.Return, o.Result = now(), inDoubt
		if o.reads() {
			o.Result = isNothing
		}
		t.record(o, "")
	}
}

// learn takes up the secret that an op has made.
func (t *trial) learn(rep report) {
	if rep.Op.Result != isOK {
		return
	}
	switch rep.Op.Kind {
	case opCreate:
		id, secret, _ := strings.Cut(rep.Secret, " ")
		t.keys[rep.Op.Key] = &played{ID: id, Secrets: []numbered{{rep.Op.N, secret}}}
	case opRotate:
		k := t.keys[rep.Op.Key]
		k.Secrets = append(k.Secrets, numbered{rep.Op.N, rep.Secret})
	}
}
