// Package crashtest kills stores and looks at what is left.
package crashtest

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var cycles = flag.Int("cycles", 50, "how many times to kill the process")

// victimDir names the directory in the environment of the process that is to be killed.
const victimDir = "CRASHTEST_VICTIM_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(victimDir); dir != "" {
		if err := victim(dir); err != nil {
			fmt.Fprintln(os.Stderr, "victim:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// victim creates and revokes keys until it is killed, from several goroutines, and reports to the parent, over a
// pipe, what it is about to do and what has been acknowledged:
//
//	created ID TOKEN
//	revoking ID
//	revoked ID
func victim(dir string) error {
	store, err := keystore.Open(dir, nil)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var mu sync.Mutex
	report := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf(format+"\n", args...) // one write each, without a buffer
	}
	report("open")
	failed := make(chan error)
	for range 4 {
		go func() {
			for {
				issued, err := store.Create(ctx, keystore.Spec{Name: "victim"})
				if err != nil {
					failed <- err
					return
				}
				report("created %s %s", issued.Key.ID, issued.Secret.Reveal())
				if rand.N(2) == 0 {
					continue
				}
				report("revoking %s", issued.Key.ID)
				if err := store.Revoke(ctx, issued.Key.ID, "crash test"); err != nil {
					failed <- err
					return
				}
				report("revoked %s", issued.Key.ID)
			}
		}()
	}
	return <-failed
}

// A fate is what the parent knows of a key.
type fate struct {
	token    string
	revoking bool // whether it is revoked is open
	revoked  bool // acknowledged
}

// The oracle outlives every process: whatever was acknowledged in any cycle holds in each later one.
func TestKill(t *testing.T) {
	dir := t.TempDir()
	keys := make(map[string]*fate)
	acknowledged := 0
	for cycle := range *cycles {
		acknowledged += kill(t, dir, keys)
		store, err := keystore.Open(dir, nil)
		require.NoError(t, err, "cycle %d", cycle)
		for id, f := range keys {
			_, err := store.Verify(t.Context(), f.token)
			switch {
			case f.revoked:
				require.ErrorIs(t, err, keystore.ErrRevoked, "cycle %d: key %s is back from the dead", cycle, id)
			case f.revoking:
				if err != nil {
					require.ErrorIs(t, err, keystore.ErrRevoked, "cycle %d: key %s", cycle, id)
				}
				f.revoking, f.revoked = false, errors.Is(err, keystore.ErrRevoked) // it is decided now
			default:
				require.NoError(t, err, "cycle %d: key %s was acknowledged and is lost", cycle, id)
			}
		}
		matchEvents(t, store)
		require.NoError(t, store.Close())
	}
	require.Greater(t, acknowledged, 10**cycles, "the victims did hardly anything")
	t.Logf("%d cycles, %d acknowledged changes, %d keys: none lost, none back", *cycles, acknowledged, len(keys))
}

// kill runs a victim, kills it at a random moment, and returns how many changes it saw acknowledged.
func kill(t *testing.T, dir string, keys map[string]*fate) (acknowledged int) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), victimDir+"="+dir)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	lines := bufio.NewReader(pipe)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			break // a line that was cut off was not acknowledged
		}
		words := strings.Fields(line)
		switch words[0] {
		case "open":
			time.AfterFunc(rand.N(150*time.Millisecond), func() { _ = cmd.Process.Kill() })
		case "created":
			keys[words[1]] = &fate{token: words[2]}
			acknowledged++
		case "revoking":
			keys[words[1]].revoking = true
		case "revoked":
			keys[words[1]].revoking, keys[words[1]].revoked = false, true
			acknowledged++
		}
	}
	require.ErrorContains(t, cmd.Wait(), "signal: killed")
	return acknowledged
}

// matchEvents requires one event for each revision of each key, in order: no change without its event, and no event
// without its change.
func matchEvents(t *testing.T, store *keystore.Store) {
	t.Helper()
	revisions := make(map[string]uint64)
	for e, err := range store.Events(t.Context(), keystore.EventQuery{}) {
		require.NoError(t, err)
		revisions[e.KeyID]++
		require.Equal(t, revisions[e.KeyID], e.Revision, "key %s: %s", e.KeyID, e.Action)
	}
	for key, err := range store.List(t.Context(), keystore.Query{}) {
		require.NoError(t, err)
		require.Equal(t, key.Revision, revisions[key.ID], "key %s", key.ID)
		delete(revisions, key.ID)
	}
	require.Empty(t, revisions, "events of keys that are not there")
}
