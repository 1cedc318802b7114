// Package badlink puts a bad network between a process and a store that several processes have
// open, for tests. All waiting follows the clock and the contexts of the caller, so the package
// works in a bubble of testing/synctest.
package badlink

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend/backendtest"
)

// Faults are what is wrong with the network now. The zero Faults is a good network.
type Faults struct {
	// Delay is the time that each request takes to the engine. The engine makes an Apply after this
	// time even if the context of the caller has ended, or the Link was closed.
	Delay time.Duration
	// Drop keeps requests from the engine. A call waits until its context ends, or until Drop is
	// false again and the request reaches the engine.
	Drop bool
	// LoseAnswers loses the answers of requests that reached the engine. A call waits until its
	// context ends.
	LoseAnswers bool
	// Silent keeps Batches from the reader of a feed. Once Silent is false again, the feed
	// continues without a gap.
	Silent bool
	// FeedDelay is the time that each Batch takes to the reader.
	FeedDelay time.Duration
	// FeedError, if not nil, ends each feed before the next Batch.
	FeedError error
	// Stopped holds every call and every Batch, as if the process of the Link was stopped: a call
	// returns only once Stopped is false again, even if the context of the call has ended.
	Stopped bool
}

// A Link is the handle of one process, with a network between the process and the store. The
// methods are safe for concurrent use.
type Link struct {
	// Tests that force an order of steps set these hooks before the first call. OnApply and OnGet
	// run instead of a call, and make the call with next. With OnGet, GetAll calls OnGet for each
	// key. OnBatch runs before Feed yields a Batch.
	OnApply func(ctx context.Context, changes []backend.Change,
		next func(context.Context) error) error
	OnGet func(ctx context.Context, key []byte,
		next func(context.Context) (backend.Entry, error)) (backend.Entry, error)
	OnBatch func(ctx context.Context, b backend.Batch)

	own     backend.Feeder // what the process has open; closed by Close
	network backend.Feeder // makes the changes that are on their way; never closed
	late    sync.WaitGroup // the changes that are on their way
	done    chan struct{}  // closed by Close
	close   sync.Once

	mu      sync.Mutex // guards all below
	faults  Faults
	changed chan struct{} // closed when faults change
	feeds   int           // how many feeds have begun
	mute    int           // feeds up to this number deliver nothing any more
}

// Open opens a handle of the store. The network is good.
func Open(s *backendtest.Shared) *Link {
	return &Link{own: s.Open(), network: s.Open(), done: make(chan struct{}),
		changed: make(chan struct{})}
}

// Set replaces the faults. Calls that wait follow the new faults.
func (l *Link) Set(f Faults) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.faults = f
	close(l.changed)
	l.changed = make(chan struct{})
}

// MuteFeeds silences the feeds that run now, for good and without an error. Feeds that begin later
// are not affected.
func (l *Link) MuteFeeds() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mute = l.feeds
}

// Close closes the handle of the process. Changes that are on their way arrive later.
func (l *Link) Close() error {
	l.close.Do(func() { close(l.done) })
	return l.own.Close()
}

// Wait waits until no change is on its way.
func (l *Link) Wait() { l.late.Wait() }

// AwaitRunning waits while the process is stopped. A test calls AwaitRunning before each call of
// the process.
func (l *Link) AwaitRunning() {
	_, _ = l.until(context.Background(), func(Faults) bool { return false })
}

// until waits while bad reports true for the faults, and returns the faults afterwards.
func (l *Link) until(ctx context.Context, bad func(Faults) bool) (Faults, error) {
	for {
		l.mu.Lock()
		f, changed := l.faults, l.changed
		l.mu.Unlock()
		if f.Stopped {
			select {
			case <-changed:
				continue
			case <-l.done:
				return f, backend.ErrClosed
			}
		}
		if err := ctx.Err(); err != nil {
			return f, err
		}
		select {
		case <-l.done:
			return f, backend.ErrClosed
		default:
		}
		if !bad(f) {
			return f, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
		case <-l.done:
		}
	}
}

// sleep waits for d.
func (l *Link) sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-l.done:
		return backend.ErrClosed
	}
}

// request waits until a request has reached the engine.
func (l *Link) request(ctx context.Context) error {
	f, err := l.until(ctx, func(f Faults) bool { return f.Drop })
	if err != nil {
		return err
	}
	defer l.AwaitRunning()
	return l.sleep(ctx, f.Delay)
}

// answer returns err if the answer of a request reaches the caller. Otherwise answer waits for the
// end of the context.
func (l *Link) answer(ctx context.Context, err error) error {
	l.AwaitRunning()
	l.mu.Lock()
	lost := l.faults.LoseAnswers
	l.mu.Unlock()
	if !lost {
		return err
	}
	defer l.AwaitRunning()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-l.done:
		return backend.ErrClosed
	}
}

// Apply implements backend.Backend.
func (l *Link) Apply(ctx context.Context, changes ...backend.Change) error {
	if l.OnApply == nil {
		return l.apply(ctx, changes)
	}
	return l.OnApply(ctx, changes, func(ctx context.Context) error { return l.apply(ctx, changes) })
}

func (l *Link) apply(ctx context.Context, changes []backend.Change) error {
	f, err := l.until(ctx, func(f Faults) bool { return f.Drop })
	if err != nil {
		return err
	}
	if f.Delay <= 0 {
		return l.answer(ctx, l.own.Apply(ctx, changes...))
	}
	outcome := make(chan error, 1)
	l.late.Go(func() {
		time.Sleep(f.Delay)
		outcome <- l.network.Apply(context.WithoutCancel(ctx), changes...)
	})
	select {
	case err := <-outcome:
		return l.answer(ctx, err)
	case <-ctx.Done():
		l.AwaitRunning()
		return ctx.Err()
	case <-l.done:
		return backend.ErrClosed
	}
}

// Get implements backend.Backend.
func (l *Link) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if l.OnGet == nil {
		return l.get(ctx, key)
	}
	return l.OnGet(ctx, key,
		func(ctx context.Context) (backend.Entry, error) { return l.get(ctx, key) })
}

func (l *Link) get(ctx context.Context, key []byte) (backend.Entry, error) {
	if err := l.request(ctx); err != nil {
		return backend.Entry{}, err
	}
	e, err := l.own.Get(ctx, key)
	if err = l.answer(ctx, err); err != nil {
		return backend.Entry{}, err
	}
	return e, nil
}

// GetAll implements backend.AllGetter. All entries travel as the answer of one request.
func (l *Link) GetAll(ctx context.Context, keys [][]byte) ([]backend.Entry, error) {
	if l.OnGet == nil {
		if err := l.request(ctx); err != nil {
			return nil, err
		}
		all, err := l.own.(backend.AllGetter).GetAll(ctx, keys)
		if err = l.answer(ctx, err); err != nil {
			return nil, err
		}
		return all, nil
	}
	all := make([]backend.Entry, len(keys))
	for i, key := range keys {
		var err error
		all[i], err = l.Get(ctx, key)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return nil, err
		}
	}
	return all, nil
}

// Scan implements backend.Backend.
func (l *Link) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return l.scan(ctx, l.own.Scan(ctx, from, to))
}

// Snapshot implements backend.Backend.
func (l *Link) Snapshot(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return l.scan(ctx, l.own.Snapshot(ctx, from, to))
}

// ScanDown implements backend.DownScanner.
func (l *Link) ScanDown(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	return l.scan(ctx, l.own.(backend.DownScanner).ScanDown(ctx, from, to))
}

// scan yields entries. All entries travel as the answer of one request.
func (l *Link) scan(
	ctx context.Context, entries iter.Seq2[backend.Entry, error],
) iter.Seq2[backend.Entry, error] {
	return func(yield func(backend.Entry, error) bool) {
		if err := l.request(ctx); err != nil {
			yield(backend.Entry{}, err)
			return
		}
		if err := l.answer(ctx, nil); err != nil {
			yield(backend.Entry{}, err)
			return
		}
		entries(yield)
	}
}

// Feed implements backend.Feeder.
func (l *Link) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		l.mu.Lock()
		l.feeds++
		number := l.feeds
		l.mu.Unlock()
		for b, err := range l.own.Feed(ctx, from, to, after) {
			if late := l.deliver(ctx, number); late != nil {
				err = late
			}
			if err != nil {
				yield(backend.Batch{}, err)
				return
			}
			if l.OnBatch != nil {
				l.OnBatch(ctx, b)
			}
			if !yield(b, nil) {
				return
			}
		}
	}
}

// deliver waits until a Batch, or an error of the engine, has reached the reader of a feed.
func (l *Link) deliver(ctx context.Context, number int) error {
	f, err := l.until(ctx, func(f Faults) bool {
		return f.FeedError == nil && (f.Silent || l.isMute(number))
	})
	if err != nil {
		return err
	}
	if f.FeedError != nil {
		return f.FeedError
	}
	defer l.AwaitRunning()
	return l.sleep(ctx, f.FeedDelay)
}

// isMute reports whether MuteFeeds has silenced a feed.
func (l *Link) isMute(number int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return number <= l.mute
}
