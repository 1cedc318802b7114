package keystore

import (
	"context"
	"fmt"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// sharedReads reads the records of keys for Verify and Bind, in a store of several processes, where
// a read is a round trip to the storage. Calls that arrive while a record is being read share the
// next read of the record. The next read begins after the arrival of all these calls, so no call
// gets a record from before its arrival, as fence.Fence requires. Calls that shared the running
// read could get such a record.
//
// At most maxReads reads run at the same time. Otherwise a storage that has become slow would hold
// a goroutine and a request for each call of the service.
type sharedReads struct {
	// get reads an entry.
	get func(context.Context, token.ID) (backend.Entry, error)
	// limit limits the time of a shared read, which belongs to no caller.
	limit func(context.Context) (context.Context, context.CancelFunc)

	mu      sync.Mutex // guards all below
	closed  bool       // no shared read begins
	running int
	// next has an element for each record that is being read: the read that follows, or nil if no
	// call waits for a read that follows.
	next   map[token.ID]*sharedRead
	shared sync.WaitGroup // the running shared reads; grows under mu, while closed is false
}

// A sharedRead is a read whose result several calls get. entry and err are set before done is
// closed.
type sharedRead struct {
	done  chan struct{}
	entry backend.Entry
	err   error
}

const maxReads = 256

var errManyReads = fmt.Errorf("%w: %d reads of the storage are running: try again later",
	ErrUnavailable, maxReads)

func newSharedReads(
	get func(context.Context, token.ID) (backend.Entry, error),
	limit func(context.Context) (context.Context, context.CancelFunc),
) *sharedReads {
	return &sharedReads{get: get, limit: limit, next: make(map[token.ID]*sharedRead)}
}

// read returns the entry of a key, as the entry was at some moment of the call, and otherwise an
// error of the backend, the error of ctx, errManyReads or ErrClosed. ctx has a timeout. The caller
// must not change the entry, because other calls may have the entry too.
func (r *sharedReads) read(ctx context.Context, id token.ID) (backend.Entry, error) {
	shared, err := r.join(id)
	if err != nil {
		return backend.Entry{}, err
	}
	if shared == nil {
		defer r.finished(id)
		return r.get(ctx, id)
	}
	select {
	case <-shared.done:
		return shared.entry, shared.err
	case <-ctx.Done():
		return backend.Entry{}, ctx.Err()
	}
}

// join returns the next read of a record, or nil if the record is not being read: the caller then
// reads the record, and calls finished.
func (r *sharedReads) join(id token.ID) (*sharedRead, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	shared, isRead := r.next[id]
	switch {
	case shared != nil:
		return shared, nil
	case isRead:
		shared = &sharedRead{done: make(chan struct{})}
	case r.running == maxReads:
		return nil, errManyReads
	default:
		r.running++
	}
	r.next[id] = shared
	return shared, nil
}

// finished notes that the read of a record has ended, and begins the next read if a call waits.
func (r *sharedReads) finished(id token.ID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	shared := r.next[id]
	if shared == nil || r.closed {
		delete(r.next, id)
		r.running--
		if shared != nil {
			shared.err = ErrClosed
			close(shared.done)
		}
		return
	}
	r.next[id] = nil
	r.shared.Go(func() {
		defer r.finished(id)
		defer close(shared.done)
		ctx, cancel := r.limit(context.Background())
		defer cancel()
		shared.entry, shared.err = r.get(ctx, id)
	})
}

// close waits for the shared reads. No shared read begins afterwards. Close the backend before
// close, so that the reads end.
func (r *sharedReads) close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.shared.Wait()
}
