package keystore

import (
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A jittery backend takes its time, now and then, around what it does, so that what is rare in a
// race becomes common: a read may wait for the next write of its key to be made, and a write may
// take long to return when it has been made.
type jittery struct {
	backend.Backend
	mu   sync.Mutex
	made map[string]chan struct{} // closed at the next write of the key
}

func newJittery(b backend.Backend) backend.Backend {
	return &jittery{Backend: b, made: make(map[string]chan struct{})}
}

// wait waits for a write of the key, but not for long: there may be none.
func (b *jittery) wait(key []byte) {
	b.mu.Lock()
	made := b.made[string(key)]
	if made == nil {
		made = make(chan struct{})
		b.made[string(key)] = made
	}
	b.mu.Unlock()
	timer := time.NewTimer(5 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-made:
	case <-timer.C:
	}
}

func pause() {
	switch rand.IntN(8) {
	case 0:
		runtime.Gosched()
	case 1:
		for range rand.IntN(1 << 14) {
		}
	case 2:
		time.Sleep(rand.N(500 * time.Microsecond))
	case 3:
		time.Sleep(rand.N(2 * time.Millisecond))
	}
}

func (b *jittery) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if rand.IntN(8) == 0 {
		b.wait(key)
	} else {
		pause()
	}
	defer pause()
	return b.Backend.Get(ctx, key)
}

func (b *jittery) Apply(ctx context.Context, changes ...backend.Change) error {
	pause()
	err := b.Backend.Apply(ctx, changes...)
	b.mu.Lock()
	for _, c := range changes {
		if made := b.made[string(c.Key)]; made != nil {
			close(made)
			delete(b.made, string(c.Key))
		}
	}
	b.mu.Unlock()
	if rand.IntN(4) == 0 {
		time.Sleep(rand.N(2 * time.Millisecond))
	}
	return err
}

// A failing backend fails now and then: a read, or a write before it is made, or after.
type failing struct{ backend.Backend }

var errInjected = errors.New("injected")

func (b failing) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	// Without the state of the store, Open returns the error.
	if rand.IntN(30) == 0 && key[0] != stateSpace {
		return backend.Entry{}, errInjected
	}
	return b.Backend.Get(ctx, key)
}

func (b failing) Apply(ctx context.Context, changes ...backend.Change) error {
	x := rand.IntN(20)
	if string(changes[len(changes)-1].Key) == string(stateKey) {
		x = 2 // as for Get: a migration that fails is an error of Open
	}
	if x == 0 {
		return errInjected
	}
	err := b.Backend.Apply(ctx, changes...)
	if x == 1 && err == nil {
		err = errInjected
	}
	return err
}

// A hasty backend is wrong: it acknowledges a write before it makes it.
type hasty struct {
	backend.Backend
	queue chan []backend.Change
	done  chan struct{}
}

func newHasty(b backend.Backend) *hasty {
	h := &hasty{b, make(chan []backend.Change, 1<<10), make(chan struct{})}
	go func() {
		defer close(h.done)
		for changes := range h.queue {
			_ = h.Backend.Apply(context.Background(), changes...)
		}
	}()
	return h
}

func (h *hasty) Apply(_ context.Context, changes ...backend.Change) error {
	h.queue <- changes
	return nil
}

func (h *hasty) Close() error {
	close(h.queue)
	<-h.done
	return h.Backend.Close()
}

// A forgetful backend is wrong: it acknowledges writes that it has in memory, where everybody sees
// them, makes them some time later, all at once, and forgets at Close which it has not made yet.
type forgetful struct {
	backend.Backend
	mu      sync.Mutex
	pending [][]backend.Change
}

func (f *forgetful) getLocked(ctx context.Context, key []byte) (backend.Entry, error) {
	for _, changes := range slices.Backward(f.pending) {
		for _, c := range changes {
			if string(c.Key) == string(key) {
				revision := max(c.Revision, c.Expect+1)
				return backend.Entry{Key: c.Key, Value: c.Value, Revision: revision}, nil
			}
		}
	}
	return f.Backend.Get(ctx, key)
}

func (f *forgetful) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.getLocked(ctx, key)
}

func (f *forgetful) Apply(ctx context.Context, changes ...backend.Change) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range changes {
		e, err := f.getLocked(ctx, c.Key)
		if err != nil && !errors.Is(err, backend.ErrNotFound) {
			return err
		}
		if e.Revision != c.Expect {
			return backend.ErrConflict
		}
	}
	f.pending = append(f.pending, changes)
	if len(f.pending) < 8 {
		return nil
	}
	return f.flushLocked(ctx)
}

func (f *forgetful) flushLocked(ctx context.Context) error {
	for _, changes := range f.pending {
		if err := f.Backend.Apply(ctx, changes...); err != nil {
			return err
		}
	}
	f.pending = nil
	return nil
}

func (f *forgetful) Scan(ctx context.Context, from, to []byte) iter.Seq2[backend.Entry, error] {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.flushLocked(ctx); err != nil {
		return func(yield func(backend.Entry, error) bool) { yield(backend.Entry{}, err) }
	}
	return f.Backend.Scan(ctx, from, to)
}
