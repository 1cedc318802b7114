package cluster

import (
	"context"
	"iter"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A fault is what a link does to the calls of a process.
type fault struct {
	stopped   bool          // no call begins or returns, and nothing is delivered
	dropCalls bool          // calls do not reach the engine
	dropReply bool          // calls reach the engine, and their answers are lost
	late      bool          // an Apply reaches the engine after its caller has given up
	silent    bool          // the feed delivers nothing
	deadFeed  int           // feeds with this number or a lower one deliver nothing, even later
	delay     time.Duration // of calls and answers, at most
	feedDelay time.Duration // of each batch, at most
	feedErr   error         // the feed ends with this error
	steady    bool          // each batch takes feedDelay, and not a random part
}

// A link is the connection of one process to the engine.
type link struct {
	backend.Feeder
	rng *rand.Rand

	mu      sync.Mutex // guards all below
	fault   fault
	changed chan struct{}
	feeds   int
	pending sync.WaitGroup // the late calls

	began     map[uint64]time.Time // heartbeats by number
	confirmed map[uint64]bool
	delivered map[uint64]bool
	lastProof time.Time // when the last heartbeat began that is confirmed and delivered

	// Forced tests: the hook runs before and after an Apply, and after a Get. An error is the
	// result of the call.
	hook func(ctx context.Context, point string, changes []backend.Change) error
}

func newLink(b backend.Feeder, seed uint64) *link {
	return &link{Feeder: b, rng: rand.New(rand.NewPCG(seed, 1)), changed: make(chan struct{}),
		began: map[uint64]time.Time{}, confirmed: map[uint64]bool{}, delivered: map[uint64]bool{}}
}

// set changes the fault.
func (l *link) set(change func(*fault)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change(&l.fault)
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *link) heal() { l.set(func(f *fault) { f.heal() }) }

// heal keeps only what a network without faults does.
func (f *fault) heal() { *f = fault{delay: f.delay, feedDelay: f.feedDelay, deadFeed: f.deadFeed} }

// endFeeds makes the feeds that have begun deliver nothing any more.
func (l *link) endFeeds() { l.set(func(f *fault) { f.deadFeed = l.feeds }) }

// hooked reports whether the test forces an order with a hook.
func (l *link) hooked() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.hook != nil
}

func (l *link) now() fault {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fault
}

// await returns when the fault satisfies ok. If ctx ends first, await returns the error of ctx, but
// never while the process is stopped.
func (l *link) await(ctx context.Context, ok func(fault) bool) error {
	for {
		l.mu.Lock()
		f, changed := l.fault, l.changed
		l.mu.Unlock()
		switch {
		case f.stopped:
			<-changed
			continue
		case ok(f):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
		}
	}
}

// pause returns when the process is not stopped.
func (l *link) pause() { _ = l.await(context.Background(), func(fault) bool { return true }) }

func (l *link) random(limit time.Duration) time.Duration {
	if limit <= 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return time.Duration(l.rng.Int64N(int64(limit)))
}

// call makes a call with the present faults.
func (l *link) call(ctx context.Context, write bool, do func(context.Context) error) error {
	f := l.now()
	arrives := func(f fault) bool { return !f.dropCalls || write && f.late }
	if err := l.await(ctx, arrives); err != nil {
		return err
	}
	time.Sleep(l.random(f.delay))
	l.pause()
	f = l.now()
	if write && f.late {
		wait := l.random(3 * testFreshness)
		l.pending.Go(func() {
			time.Sleep(wait)
			_ = do(context.WithoutCancel(ctx))
		})
		<-ctx.Done()
		l.pause()
		return ctx.Err()
	}
	err := do(ctx)
	time.Sleep(l.random(f.delay))
	if f := l.now(); f.dropReply || f.dropCalls {
		<-ctx.Done()
	}
	l.pause()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func (l *link) at(ctx context.Context, point string, changes ...backend.Change) error {
	l.mu.Lock()
	hook := l.hook
	l.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(ctx, point, changes)
}

func (l *link) Get(ctx context.Context, key []byte) (e backend.Entry, err error) {
	err = l.call(ctx, false, func(ctx context.Context) error {
		var err error
		e, err = l.Feeder.Get(ctx, key)
		return err
	})
	if hooked := l.at(ctx, "got", backend.Change{Key: key}); hooked != nil {
		err = hooked
	}
	if err != nil {
		return backend.Entry{}, err
	}
	return e, nil
}

func (l *link) Apply(ctx context.Context, changes ...backend.Change) error {
	number := heartbeatOf(changes)
	l.mu.Lock()
	if number != 0 {
		l.began[number] = time.Now()
	}
	l.mu.Unlock()
	if err := l.at(ctx, "apply", changes...); err != nil {
		return err
	}
	err := l.call(ctx, true, func(ctx context.Context) error {
		return l.Feeder.Apply(ctx, changes...)
	})
	if hooked := l.at(ctx, "applied", changes...); hooked != nil {
		err = hooked
	}
	if err == nil && number != 0 {
		l.mu.Lock()
		l.confirmed[number] = true
		l.proveLocked(number)
		l.mu.Unlock()
	}
	return err
}

func (l *link) proveLocked(number uint64) {
	if l.confirmed[number] && l.delivered[number] && l.began[number].After(l.lastProof) {
		l.lastProof = l.began[number]
	}
}

// proof returns when the last heartbeat began that was confirmed and delivered.
func (l *link) proof() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastProof
}

// heartbeatOf returns the number of the heartbeat that an Apply writes, or 0. The link belongs to
// one process, and a process has one membership after the other, so the number and the ID of the
// member make a number that is used once.
func heartbeatOf(changes []backend.Change) uint64 {
	if c := changes[0]; len(changes) == 1 && len(c.Key) == memberKeyLen && c.Key[0] == memberSpace {
		return heartbeatNumber(c.Key, c.Value)
	}
	return 0
}

func heartbeatNumber(key, value []byte) uint64 {
	m, err := record.DecodeMember(value)
	if err != nil || m.Heartbeat == 0 {
		return 0
	}
	number := m.Heartbeat
	for _, b := range key {
		number = number*1099511628211 + uint64(b)
	}
	return number
}

func (l *link) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		err := l.call(ctx, false, func(context.Context) error { return nil })
		if err != nil {
			yield(backend.Entry{}, err)
			return
		}
		for e, err := range l.Feeder.Scan(ctx, from, to) {
			if !yield(e, err) {
				return
			}
		}
	}
}

func (l *link) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		l.mu.Lock()
		l.feeds++
		number := l.feeds
		l.mu.Unlock()
		for b, err := range l.Feeder.Feed(ctx, from, to, after) {
			if f := l.now(); f.steady {
				time.Sleep(f.feedDelay)
			} else {
				time.Sleep(l.random(f.feedDelay))
			}
			waited := l.await(ctx, func(f fault) bool {
				return !f.silent && !f.dropCalls && number > f.deadFeed || f.feedErr != nil
			})
			if err == nil {
				err = waited
			}
			if err == nil {
				err = l.now().feedErr
			}
			if err != nil {
				yield(backend.Batch{}, err)
				return
			}
			l.noteDelivered(b)
			if !yield(b, nil) {
				return
			}
		}
	}
}

// noteDelivered notes the heartbeats of this process that a batch contains.
func (l *link) noteDelivered(b backend.Batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range b.Changes {
		if e.Key[0] == memberSpace && len(e.Key) == memberKeyLen {
			number := heartbeatNumber(e.Key, e.Value)
			if !l.began[number].IsZero() {
				l.delivered[number] = true
				l.proveLocked(number)
			}
		}
	}
}
