package remote

import (
	"context"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// Calls are the running calls of a Backend, and its goroutines. The methods are safe for concurrent
// use.
//
// Invariant: once Close has returned, no call and no goroutine runs, and none begins.
type Calls struct {
	done    context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup // the calls that have begun, and the goroutines

	mu sync.Mutex // held while a call is counted, and while Close ends done
}

// NewCalls returns the Calls of a Backend that is open.
func NewCalls() *Calls {
	c := &Calls{}
	c.done, c.cancel = context.WithCancel(context.Background())
	return c
}

// Context returns a context that ends with Close.
func (c *Calls) Context() context.Context { return c.done }

// Begin counts a call, and returns a context that ends with the context of the caller and with
// Close. The caller of Begin calls end when the call is over. Begin returns the error of a context
// that has ended, and ErrClosed after Close.
func (c *Calls) Begin(ctx context.Context) (joined context.Context, end func(), err error) {
	joined, stop, err := c.Join(ctx)
	if err != nil {
		return nil, nil, err
	}
	if !c.count() {
		stop()
		return nil, nil, backend.ErrClosed
	}
	return joined, func() { stop(); c.running.Done() }, nil
}

// count counts a call, unless Close has ended done: then Close may have returned.
func (c *Calls) count() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done.Err() != nil {
		return false
	}
	c.running.Add(1)
	return true
}

// Join returns the same context as Begin does, and counts no call: Close does not wait for a caller
// of Join.
func (c *Calls) Join(ctx context.Context) (joined context.Context, stop func(), err error) {
	if err := c.Ended(ctx); err != nil {
		return nil, nil, err
	}
	joined, cancel := context.WithCancel(ctx)
	unhook := context.AfterFunc(c.done, cancel)
	return joined, func() { unhook(); cancel() }, nil
}

// Ended returns the error of a context that has ended, ErrClosed after Close, or nil.
func (c *Calls) Ended(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if c.done.Err() != nil {
		return backend.ErrClosed
	}
	return nil
}

// Go runs f in a goroutine that Close waits for. The caller of Go is a running call, a goroutine of
// Go, or the function that opens the Backend. f must return soon after Context has ended, and must
// not panic.
func (c *Calls) Go(f func()) { c.running.Go(f) }

// Close ends the contexts, and waits for the calls and the goroutines. A second Close waits too.
func (c *Calls) Close() {
	c.mu.Lock()
	c.cancel()
	c.mu.Unlock()
	c.running.Wait()
}
