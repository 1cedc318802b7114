package keystore

import (
	"errors"
	"flag"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/badgerdb"
	"github.com/grpc-api-key/grpc-api-key/internal/fence"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

var (
	rounds    = flag.Int("rounds", fullRounds, "how many histories to check for linearizability")
	firstSeed = flag.Uint64("seed", 0, "of the first history; the next ones count up; 0 is any")
	drawings  = flag.String("drawings", "", "a directory for drawings of histories that are not "+
		"linearizable")
)

// A round is 6 clients with 18 ops each on 3 keys, and what they look at after a change.
const (
	roundKeys    = 3
	roundClients = 6
	roundOps     = 18
)

// renewEvery is after how many rounds a store makes room for a new one, so that it does not grow
// for ever.
const renewEvery = 500

// A wrapping puts something between the store and Badger.
type wrapping func(backend.Backend) backend.Backend

// patience makes every call wait until it is decided what has come of it, however slow the machine
// is.
const patience = -1

// openPlain is Open, with patience.
func openPlain(dir string) (*Store, error) { return Open(dir, &Options{Timeout: patience}) }

// openWrapped is Open, of a store whose fence goes by v.
func openWrapped(dir string, cacheSize int, v fence.Variant, wrap wrapping) (*Store, error) {
	s, err := newStore(&Options{CacheSize: cacheSize, Timeout: patience})
	if err != nil {
		return nil, err
	}
	db, err := badgerdb.Open(dir, badgerdb.Options{Logger: s.log})
	if err != nil {
		return nil, err
	}
	s.readsUninterruptible = true
	s.fence.Break(v)
	if err := s.start(wrap(db)); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return s, nil
}

// openForgetful opens a store that loses what it acknowledged.
func openForgetful(dir string) (*Store, error) {
	return openWrapped(dir, 0, fence.TwoPhase,
		func(b backend.Backend) backend.Backend { return &forgetful{Backend: b} })
}

func seedOf() uint64 {
	if *firstSeed != 0 {
		return *firstSeed
	}
	return 1 + rand.Uint64N(1<<40)
}

// An arena is a store for one round after the other, each with keys of its own.
type arena struct {
	open   func(dir string) (*Store, error)
	store  *Store
	dir    string
	used   int
	cursor time.Time // behind the events of earlier rounds
	deaf   bool
}

func (a *arena) play(dir string, seed uint64, count tally) (err error) {
	if a.used%renewEvery == 0 {
		if err := a.close(); err != nil {
			return err
		}
		if a.dir, err = os.MkdirTemp(dir, ""); err != nil {
			return err
		}
		if a.store, err = a.open(a.dir); err != nil {
			return err
		}
	}
	a.used++
	tr := newTrial(seed, roundKeys)
	p := tr.player(a.store, 0)
	p.final, p.deaf = true, a.deaf
	p.play(roundClients, roundOps)
	a.cursor, err = tr.finish(p, a.cursor)
	if err == nil && tr.troubled() {
		err = tr.violation(0, "a sound store has failed")
	}
	count.add(tr)
	return err
}

// troubled reports whether a change failed, which it does not on a store without faults.
func (t *trial) troubled() bool {
	for _, o := range t.ops {
		if o.Result == inDoubt {
			return true
		}
	}
	return false
}

func (a *arena) close() error {
	if a.store == nil {
		return nil
	}
	err := a.store.Close()
	a.store = nil
	return errors.Join(err, os.RemoveAll(a.dir))
}

// restarts plays one history on a store that is opened several times.
func restarts(
	in string, seed uint64, count tally, openings int, open func(dir string) (*Store, error),
) error {
	dir, err := os.MkdirTemp(in, "")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r := rand.New(rand.NewPCG(seed, 1))
	tr := newTrial(seed, roundKeys)
	for n := range openings {
		s, err := open(dir)
		if err != nil {
			return err
		}
		p := tr.player(s, n)
		last := n == openings-1
		p.final = last
		if r.IntN(2) == 0 || last {
			p.play(roundClients, roundOps)
			if last {
				_, err = tr.finish(p, time.Time{})
			}
			err = errors.Join(err, p.close())
		} else {
			var wg sync.WaitGroup
			var once sync.Once
			now := make(chan struct{})
			enough := tr.last.Load() + r.Int32N(200)
			p.record = func(o op, secret string) {
				tr.record(o, secret)
				if o.N >= enough {
					once.Do(func() { close(now) })
				}
			}
			wg.Go(func() {
				p.play(roundClients, roundOps)
				once.Do(func() { close(now) })
			})
			<-now // amid the ops
			err = p.close()
			wg.Wait()
			p.sampleAll()
			p.release()
		}
		if err != nil || last {
			count.add(tr)
			return err
		}
	}
	return nil
}

// needsDirectory skips a test that needs a store in a directory, on a 32-bit system.
func needsDirectory(t *testing.T) {
	t.Helper()
	if bits.UintSize < 64 {
		t.Skip("SKIPPED: a 32-bit system has no store in a directory")
	}
}

// The real store is linearizable, key by key, with the revisions that it returns; what Bind gives
// out ends before the change that ends it returns. See the models for what that means.
func TestLinearizable(t *testing.T) {
	needsDirectory(t)
	// A round mostly waits for the disk. Several at once, on stores of their own, keep the
	// processors busy.
	const workers = 4
	seed := seedOf()
	dir := t.TempDir()
	began := time.Now()
	count := make(tally)
	play := func(from, to int) {
		var next atomic.Int64
		next.Store(int64(from))
		var wg sync.WaitGroup
		counts := make([]tally, workers)
		errs := make([]error, workers)
		for w := range workers {
			counts[w] = make(tally)
			wg.Go(func() { errs[w] = work(t, dir, seed, &next, to, counts[w]) })
		}
		wg.Wait()
		require.NoError(t, errors.Join(errs...))
		for _, c := range counts {
			for what, n := range c {
				count[what] += n
			}
		}
	}
	played := *rounds
	play(0, played)
	// What a few rounds come to is chance; that they come to all of it some time is not.
	for *rounds >= fullRounds && count.lacks() != "" && played < 50*fullRounds {
		play(played, played+fullRounds)
		played += fullRounds
	}
	t.Logf("what the rounds came to:\n%v", count)
	if *rounds >= fullRounds {
		require.Empty(t, count.lacks(), "what the rounds never came to")
	}
	operations := 0
	for _, n := range count {
		operations += n
	}
	figures.Record(t, "%d rounds from seed %d, %d operations, %.0f rounds a minute: 0 violations",
		played, seed, operations, float64(played)/time.Since(began).Minutes())
}

// fullRounds have every kind of round among them.
const fullRounds = 20

// lacks is an outcome that rounds should come to and have not; "" if there is none.
func (c tally) lacks() string {
	for _, what := range []string{
		"verify ok", "verify unknown", "verify revoked", "verify expired", "verify disabled",
		"bind ok", "bind unknown", "bind revoked", "bind expired", "bind disabled",
		"sample alive", "sample revoked", "sample expired", "sample disabled", "sample narrowed",
		"update ok", "update in doubt", "update conflict", "rotate ok", "rotate conflict",
		"disable ok", "enable ok", "revoke ok",
		"get ok", "list ok", "list absent", "events ok",
	} {
		if c[what] == 0 {
			return what
		}
	}
	return ""
}

// work plays rounds until they are used up, or one is not linearizable.
func work(
	t *testing.T, dir string, first uint64, next *atomic.Int64, end int, count tally,
) (err error) {
	plain := &arena{open: openPlain}
	slow := &arena{open: func(dir string) (*Store, error) {
		// A small cache is one shard, whose keys disturb each other, and which evicts.
		return openWrapped(dir, 2, fence.TwoPhase, newJittery)
	}}
	defer func() { err = errors.Join(err, plain.close(), slow.close()) }()
	for {
		n := next.Add(1) - 1
		if n >= int64(end) {
			return nil
		}
		var err error
		switch seed := first + uint64(n); {
		case seed%fullRounds == 0:
			err = restarts(dir, seed, count, 3, openPlain)
		case seed%fullRounds == fullRounds/2:
			err = restarts(dir, seed, count, 3, func(dir string) (*Store, error) {
				return openWrapped(dir, 0, fence.TwoPhase,
					func(b backend.Backend) backend.Backend { return failing{newJittery(b)} })
			})
		case seed%2 == 0:
			err = plain.play(dir, seed, count)
		default:
			err = slow.play(dir, seed, count)
		}
		if errors.Is(err, errClock) {
			t.Log(err)
			continue
		}
		if err != nil {
			next.Store(int64(end)) // the others need not go on
			return fmt.Errorf("again: go test ./keystore -run Linearizable -rounds 1 -seed %d: %w",
				first+uint64(n), err)
		}
	}
}

// Each wrong store is caught, by the same code.
func TestLinearizableCatches(t *testing.T) {
	needsDirectory(t)
	slow := wrapping(newJittery)
	for _, tt := range []struct {
		name     string
		variant  fence.Variant
		wrap     wrapping
		openings int
		deaf     bool
	}{
		{"look-aside", fence.LookAside, slow, 1, false},
		{"bump before only", fence.BumpBefore, slow, 1, false},
		{"bump after only", fence.BumpAfter, slow, 1, false},
		{"acknowledges before it commits", fence.TwoPhase,
			func(b backend.Backend) backend.Backend { return newHasty(b) }, 1, false},
		{"loses what it acknowledged", fence.TwoPhase,
			func(b backend.Backend) backend.Backend { return &forgetful{Backend: b} }, 2, false},
		{"leaves contexts alive", fence.TwoPhase, slow, 1, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			open := func(dir string) (*Store, error) {
				return openWrapped(dir, 0, tt.variant, tt.wrap)
			}
			a := &arena{open: open, deaf: tt.deaf}
			defer func() { require.NoError(t, a.close()) }()
			dir := t.TempDir()
			count := make(tally)
			caught(t, func(seed uint64) error {
				if tt.openings > 1 {
					return restarts(dir, seed, count, tt.openings, open)
				}
				return a.play(dir, seed, count)
			})
		})
	}
}

// caught plays rounds until one of them is not linearizable, which must be soon.
func caught(t *testing.T, round func(seed uint64) error) {
	t.Helper()
	seed := seedOf()
	began := time.Now()
	for n := uint64(0); time.Since(began) < time.Minute; n++ {
		err := round(seed + n)
		var v *violation
		if errors.As(err, &v) {
			t.Logf("caught in round %d, after %v: %s", n+1,
				time.Since(began).Round(time.Millisecond), v.what)
			return
		}
		if !errors.Is(err, errClock) {
			require.NoError(t, err)
		}
	}
	t.Fatal("not caught within a minute")
}
