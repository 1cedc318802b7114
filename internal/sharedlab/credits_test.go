package sharedlab

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore"
)

var (
	creditsCount = flag.Int64("credits", 100_000, "how many credits the processes share")
	creditsKills = flag.Int("kills", 4, "how many processes TestCreditsOverKills kills")
)

const (
	spenders       = 3  // processes
	spendersCalls  = 64 // goroutines of each process
	creditPatience = 10 * time.Minute
)

// spending is what a spender spends.
type spending struct {
	Engine    string // of openers
	Addresses []string
	Space     string
	Token     string
	File      string // of the purse
	Index     int    // in the purse
	// Dies says after how many admitted calls the process kills itself; 0: never.
	Dies int64
}

// A purse is memory that the test shares with the spenders. It outlives a process that is killed.
type purse struct {
	begin    atomic.Int64 // 1: the spenders begin
	admitted [maxSpenders]atomic.Int64
	longest  [maxSpenders]atomic.Int64 // the longest call that was admitted, in nanoseconds
	leases   [maxSpenders]atomic.Int64
	away     [maxSpenders]atomic.Int64 // calls that were Unavailable
	done     [maxSpenders]atomic.Int64 // the calls of the process are over: the time, in nanoseconds
}

const maxSpenders = 512

// openPurse opens the file of a purse, and makes the file if there is none.
func openPurse(file string) (*purse, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size := int(unsafe.Sizeof(purse{}))
	if err := f.Truncate(int64(size)); err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE,
		syscall.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*purse)(unsafe.Pointer(&memory[0])), nil // until the process ends
}

func init() { children["spender"] = runSpender }

// runSpender makes calls in many goroutines until the key has no credits left.
func runSpender(text string, parent <-chan struct{}) error {
	var job spending
	if err := json.Unmarshal([]byte(text), &job); err != nil {
		return err
	}
	purse, err := openPurse(job.File)
	if err != nil {
		return err
	}
	ctx := context.Background()
	b, err := openers[job.Engine](ctx, job.Addresses, job.Space)
	if err != nil {
		return err
	}
	store, err := keystore.New(b, nil)
	if err != nil {
		return err
	}
	fmt.Println(ready)
	for purse.begin.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range spendersCalls {
		wg.Go(func() {
			for {
				began := time.Now()
				_, err := store.Verify(ctx, job.Token)
				if errors.As(err, new(*keystore.CreditsError)) {
					return
				}
				if errors.Is(err, keystore.ErrUnavailable) {
					// The goroutines have taken all processors, and the process is out of contact.
					// No credits were taken.
					if purse.away[job.Index].Add(1) == 1 {
						fmt.Fprintln(os.Stderr, err)
					}
					time.Sleep(10 * time.Millisecond)
					continue
				}
				if err != nil {
					failed.Store(&err)
					return
				}
				if purse.admitted[job.Index].Add(1) == job.Dies {
					_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				}
				raise(&purse.longest[job.Index], int64(time.Since(began)))
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	purse.leases[job.Index].Store(int64(store.Stats().Leases))
	purse.done[job.Index].Store(time.Now().UnixNano())
	<-parent
	return store.Close()
}

// A spree is the processes that spend the credits of one key.
type spree struct {
	t      *testing.T
	job    spending
	purse  *purse
	store  *keystore.Store // of the test
	key    *keystore.Key
	number int // of the next process
}

func newSpree(t *testing.T, engine Engine) *spree {
	s := &spree{t: t, job: spending{Engine: engine.Name(), Addresses: engine.Addresses(),
		Space: newPrefix(), File: filepath.Join(t.TempDir(), "purse")}}
	var err error
	s.purse, err = openPurse(s.job.File)
	require.NoError(t, err)
	b, err := openers[engine.Name()](t.Context(), engine.Addresses(), s.job.Space)
	require.NoError(t, err)
	s.store, err = keystore.New(b, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.store.Close()) })
	issued, err := s.store.Create(t.Context(), keystore.Spec{Name: "a",
		Credits: &keystore.Credits{Remaining: *creditsCount}})
	require.NoError(t, err)
	s.key, s.job.Token = issued.Key, issued.Secret.Reveal()
	return s
}

// A spender is a process of a spree.
type spender struct {
	*process
	index int
}

// spender starts a process, which begins to spend after begin.
func (s *spree) spender(dies int64) *spender {
	job := s.job
	job.Index, job.Dies = s.number, dies
	s.number++
	require.LessOrEqual(s.t, s.number, maxSpenders)
	p, err := startProcess("spender", job, (*exec.Cmd).Start)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { p.end((*process).stop) })
	require.NoError(s.t, p.wait())
	return &spender{p, job.Index}
}

// await waits until a process finds no credits, or has ended, and reports whether the process has
// ended.
func (s *spree) await(p *spender) (ended bool) {
	for limit := time.Now().Add(creditPatience); time.Now().Before(limit); {
		if s.purse.done[p.index].Load() != 0 {
			return false
		}
		if p.hasExited() {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	require.Fail(s.t, "the process does not come to an end", "%s", p.stderr())
	return false
}

// admitted returns how many calls all processes have admitted.
func (s *spree) admitted() (sum int64) {
	for i := range s.number {
		sum += s.purse.admitted[i].Load()
	}
	return sum
}

// remaining returns the credits that remain.
func (s *spree) remaining() int64 {
	c, err := s.store.Credits(s.t.Context(), s.key.ID)
	require.NoError(s.t, err)
	return c.Remaining
}

// overEngines runs a test on each engine that the flag -engine selects.
func overEngines(t *testing.T, test func(t *testing.T, engine Engine)) {
	for _, e := range []struct {
		name  string
		start func(t *testing.T) Engine
	}{
		{"etcd", func(t *testing.T) Engine { return StartEtcd(t, EtcdConfig{NoSync: true}) }},
		{"postgres", func(t *testing.T) Engine { return StartPostgres(t) }},
	} {
		if *onlyEngine == "" || *onlyEngine == e.name {
			t.Run(e.name, func(t *testing.T) { test(t, e.start(t)) })
		}
	}
}

// Three processes with 64 goroutines each spend one balance: exactly the balance. The long run is
//
//	GOWORK=off go test -run ProcessesShareCredits -v -timeout 0 -credits 20000000
func TestProcessesShareCredits(t *testing.T) {
	overEngines(t, func(t *testing.T, engine Engine) {
		s := newSpree(t, engine)
		var all []*spender
		for range spenders {
			all = append(all, s.spender(0))
		}
		began := time.Now()
		s.purse.begin.Store(1)
		var leases, away int64
		var longest, last time.Duration
		var shares []int64
		for _, p := range all {
			require.False(t, s.await(p), "the process has ended: %s", p.stderr())
			leases += s.purse.leases[p.index].Load()
			away += s.purse.away[p.index].Load()
			if text := p.stderr(); text != "" {
				t.Log(text)
			}
			longest = max(longest, time.Duration(s.purse.longest[p.index].Load()))
			last = max(last, time.Unix(0, s.purse.done[p.index].Load()).Sub(began))
			shares = append(shares, s.purse.admitted[p.index].Load())
		}
		for _, p := range all {
			p.end((*process).stop)
		}
		require.Equal(t, *creditsCount, s.admitted())
		require.Zero(t, s.remaining())
		slices.Sort(shares)
		figures.Record(t, "%d credits on %s, %d processes: exactly as many calls admitted, %.0f a "+
			"second, %d leases, %d to %d calls for each process, %d calls refused as unavailable, "+
			"the longest call %v",
			*creditsCount, engine.Name(), spenders, float64(s.admitted())/last.Seconds(), leases,
			shares[0], shares[len(shares)-1], away, longest.Round(time.Millisecond))
	})
}

// Processes are killed while they hold leases. All processes together never spend more than was
// granted, and each kill loses at most one lease. The long run is
//
//	GOWORK=off go test -run CreditsOverKills -v -timeout 0 -credits 20000000 -kills 200
func TestCreditsOverKills(t *testing.T) {
	overEngines(t, func(t *testing.T, engine Engine) {
		s := newSpree(t, engine)
		s.purse.begin.Store(1)
		var running []*spender
		kills, killed := *creditsKills, 0
		// A lease is an eighth of what remained before the lease, or as much as the callers waited
		// for. Each caller may have been admitted and not have counted.
		most := int64(0)
		for {
			for len(running) < spenders {
				dies := int64(0)
				if kills > 0 {
					kills--
					dies = max(1, s.remaining()/20)
					most += s.remaining()/8 + 2*spendersCalls
				}
				running = append(running, s.spender(dies))
			}
			ended := false
			running = slices.DeleteFunc(running, func(p *spender) bool {
				if !s.await(p) {
					return false
				}
				require.False(t, p.cmd.ProcessState.Exited(), "it was not killed: %s", p.stderr())
				ended = true
				killed++
				return true
			})
			if !ended {
				break
			}
		}
		for _, p := range running {
			p.end((*process).stop)
		}
		admitted, stored := s.admitted(), s.remaining()
		require.LessOrEqual(t, admitted+stored, *creditsCount, "more was spent than was granted")
		lost := *creditsCount - admitted - stored
		require.LessOrEqual(t, lost, most, "the kills have lost more than their leases")
		require.Equal(t, *creditsKills, killed, "there were too few credits for so many kills")
		require.NoError(t, s.store.CheckIntegrity(t.Context()))
		figures.Record(t, "%d credits on %s, %d processes killed: %d calls admitted, %d credits "+
			"lost, never more admitted than granted", *creditsCount, engine.Name(), killed, admitted,
			lost)
	})
}
