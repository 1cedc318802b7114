package keystore

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/internal/cluster"
	"github.com/grpc-api-key/grpc-api-key/internal/figures"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// roundProcesses is how many stores a round of several processes has. The clients of a round are
// spread over the stores.
const roundProcesses = 3

// A jitteryFeeder is a jittery backend that also delays the feed.
type jitteryFeeder struct {
	backend.Feeder
	calls backend.Backend
}

func newJitteryFeeder(b backend.Feeder) backend.Feeder { return jitteryFeeder{b, newJittery(b)} }

func (j jitteryFeeder) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	return j.calls.Get(ctx, key)
}

func (j jitteryFeeder) Apply(ctx context.Context, changes ...backend.Change) error {
	return j.calls.Apply(ctx, changes...)
}

func (j jitteryFeeder) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		for b, err := range j.Feeder.Feed(ctx, from, to, after) {
			pause()
			if !yield(b, err) {
				return
			}
		}
	}
}

// A processArena is several stores on one engine, for one round after the other.
type processArena struct {
	wrong  processVariant
	jitter bool
	small  bool // the caches are small
	stores []*Store
	used   int
	cursor time.Time // after the events of earlier rounds
}

func (a *processArena) open() error {
	shared := backendtest.NewShared()
	for range roundProcesses {
		b := shared.Open()
		if a.jitter {
			b = newJitteryFeeder(b)
		}
		opts := &Options{Timeout: patience}
		if a.small {
			opts.CacheSize = 2
		}
		s, err := openProcess(b, opts, a.wrong, nil)
		if err != nil {
			return errors.Join(err, b.Close())
		}
		a.stores = append(a.stores, s)
	}
	return nil
}

func (a *processArena) close() (err error) {
	for _, s := range a.stores {
		err = errors.Join(err, s.Close())
	}
	a.stores = nil
	return err
}

// play plays one round.
func (a *processArena) play(seed uint64, count tally) error {
	if a.used%renewEvery == 0 {
		if err := errors.Join(a.close(), a.open()); err != nil {
			return err
		}
	}
	a.used++
	tr := newTrial(seed, roundKeys)
	var players []*player
	for i, s := range a.stores {
		p := tr.player(s, 0)
		p.process, p.final = i+1, true
		players = append(players, p)
	}
	players[0].makeKeys()
	var wg sync.WaitGroup
	for i, p := range players {
		p.peers = players
		each := roundClients / roundProcesses
		wg.Go(func() { p.runClients(i*each, (i+1)*each, roundOps) })
	}
	wg.Wait()
	reader := players[rand.IntN(len(players))]
	cursor, err := tr.finishProcesses(reader, a.cursor)
	a.cursor = cursor
	if err == nil && tr.troubled() {
		err = tr.violation(0, "a sound store has failed")
	}
	count.add(tr)
	return err
}

// finishProcesses is finish for a history of several processes.
func (t *trial) finishProcesses(p *player, after time.Time) (time.Time, error) {
	return t.finishWith(p, after, t.checkProcesses)
}

// Changes, Get and List are linearizable over several processes, and a Verify answers for no state
// older than the last change that had returned: see linearizable_regular_test.go. The long run is
//
//	go test ./keystore -run LinearizableProcesses -rounds 2000 -timeout 0
func TestLinearizableProcesses(t *testing.T) {
	const workers = 4
	seed := seedOf()
	began := time.Now()
	count := make(tally)
	play := func(from, to int) {
		var next atomic.Int64
		next.Store(int64(from))
		var wg sync.WaitGroup
		counts, errs := make([]tally, workers), make([]error, workers)
		for w := range workers {
			counts[w] = make(tally)
			wg.Go(func() { errs[w] = workProcesses(seed, &next, to, w, counts[w]) })
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
	// What a few rounds come to is chance.
	for *rounds >= fullRounds && lacksProcesses(count) != "" && played < 50*fullRounds {
		play(played, played+fullRounds)
		played += fullRounds
	}
	t.Logf("what the rounds came to:\n%v", count)
	if *rounds >= fullRounds {
		require.Empty(t, lacksProcesses(count), "what the rounds never came to")
	}
	operations := 0
	for _, n := range count {
		operations += n
	}
	figures.Record(t, "%d rounds of %d processes from seed %d, %d operations, %.0f rounds a minute: "+
		"0 violations", played, roundProcesses, seed, operations,
		float64(played)/time.Since(began).Minutes())
}

// lacksProcesses is lacks without the outcomes that need a backend that fails.
func lacksProcesses(c tally) string {
	c["update in doubt"]++
	defer func() { c["update in doubt"]-- }()
	return c.lacks()
}

func workProcesses(first uint64, next *atomic.Int64, end, worker int, count tally) (err error) {
	a := &processArena{jitter: worker > 0, small: worker == 1}
	defer func() { err = errors.Join(err, a.close()) }()
	for {
		n := next.Add(1) - 1
		if n >= int64(end) {
			return nil
		}
		err := a.play(first+uint64(n), count)
		if errors.Is(err, errClock) {
			continue
		}
		if err != nil {
			next.Store(int64(end)) // the others need not go on
			return fmt.Errorf("again: go test ./keystore -run LinearizableProcesses -rounds 1 "+
				"-seed %d: %w", first+uint64(n), err)
		}
	}
}

// Each wrong store is caught, by the same code.
func TestLinearizableProcessesCatches(t *testing.T) {
	for name, wrong := range map[string]processVariant{
		"a change returns before the acks": {protocol: cluster.ReturnEarly},
	} {
		t.Run(name, func(t *testing.T) {
			a := &processArena{wrong: wrong, jitter: true}
			defer func() { require.NoError(t, a.close()) }()
			count := make(tally)
			caught(t, func(seed uint64) error { return a.play(seed, count) })
		})
	}
}
