package sharedlab

import (
	"context"
	"errors"
	"iter"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// wrongs are the controls: each makes the protocol wrong, in every process, between the store and
// the engine. The chaos must notice each of them.
var wrongs = map[string]func(backend.Feeder) backend.Feeder{
	"forgetful": func(b backend.Feeder) backend.Feeder { return forgetful{b} },
	"confident": func(b backend.Feeder) backend.Feeder {
		return &confident{Feeder: b, pretended: make(chan backend.Batch, 16)}
	},
	"hasty": func(b backend.Feeder) backend.Feeder { return &hasty{Feeder: b} },
}

// A forgetful Feeder leaves the records of keys out of its feeds, and nothing else.
type forgetful struct{ backend.Feeder }

func (f forgetful) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		for batch, err := range f.Feeder.Feed(ctx, from, to, after) {
			batch.Changes = slices.DeleteFunc(batch.Changes, func(e backend.Entry) bool {
				return e.Key[0] == 'k'
			})
			if !yield(batch, err) {
				return
			}
		}
	}
}

// isMember reports whether a key is that of a member record.
func isMember(key []byte) bool { return len(key) == 17 && key[0] == 'm' }

// A confident Feeder confirms and delivers each heartbeat that does not reach the engine. So the
// gate of the process never closes.
type confident struct {
	backend.Feeder
	pretended chan backend.Batch
	failed    atomic.Int64  // when a heartbeat did not reach the engine, in Unix nanoseconds
	delivered atomic.Uint64 // the last position that the engine has delivered
}

// isCut reports whether a heartbeat has just failed to reach the engine.
func (c *confident) isCut() bool {
	return time.Since(time.Unix(0, c.failed.Load())) < time.Second/2
}

// errCut ends a call of the protocol that would delay the next heartbeat.
var errCut = errors.New("sharedlab: the engine does not answer")

func (c *confident) Apply(ctx context.Context, changes ...backend.Change) error {
	h := changes[0]
	if len(changes) != 1 || h.Expect == 0 || !isMember(h.Key) || h.Delete {
		if c.isCut() && h.Key[0] == 'm' {
			return errCut
		}
		return c.Feeder.Apply(ctx, changes...)
	}
	if c.isCut() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 20*time.Millisecond)
		defer cancel()
	}
	err := c.Feeder.Apply(ctx, changes...)
	if err == nil || errors.Is(err, backend.ErrConflict) {
		c.failed.Store(0)
		return err
	}
	c.failed.Store(time.Now().UnixNano())
	batch := backend.Batch{Changes: []backend.Entry{
		{Key: h.Key, Value: h.Value, Revision: h.NewRevision()},
	}}
	select {
	case c.pretended <- batch:
		return nil
	default: // no feed reads
		return err
	}
}

func (c *confident) Get(ctx context.Context, key []byte) (backend.Entry, error) {
	if c.isCut() && key[0] == 'm' {
		return backend.Entry{}, errCut
	}
	return c.Feeder.Get(ctx, key)
}

func (c *confident) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	last := after // a record acks earlier positions only, so the pretended positions ascend
	if at := backend.Position(c.delivered.Load()); after > at {
		after = at // the engine does not know the positions of pretended heartbeats
	}
	return func(yield func(backend.Batch, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		type step struct {
			batch backend.Batch
			err   error
		}
		steps := make(chan step)
		go func() { // may end later: the end of a connection waits for the network
			defer close(steps)
			for batch, err := range c.Feeder.Feed(ctx, from, to, after) {
				select {
				case steps <- step{batch, err}:
				case <-ctx.Done():
					return
				}
			}
		}()
		for {
			var s step
			select {
			case next, ok := <-steps:
				if s = next; !ok {
					return
				}
				if s.err == nil {
					last = s.batch.Position
					c.delivered.Store(uint64(last))
				}
			case s.batch = <-c.pretended:
				last++
				s.batch.Position = last
			}
			if !yield(s.batch, s.err) {
				return
			}
		}
	}
}

// A hasty Feeder says after each heartbeat of the process that all other members are gone. So no
// change waits for them.
type hasty struct {
	backend.Feeder

	mu  sync.Mutex
	own []byte // the key of the member record of this process
}

func (h *hasty) Apply(ctx context.Context, changes ...backend.Change) error {
	for _, c := range changes {
		if isMember(c.Key) && c.Expect == 0 {
			h.mu.Lock()
			h.own = slices.Clone(c.Key)
			h.mu.Unlock()
		}
	}
	return h.Feeder.Apply(ctx, changes...)
}

func (h *hasty) Feed(
	ctx context.Context, from, to []byte, after backend.Position,
) iter.Seq2[backend.Batch, error] {
	return func(yield func(backend.Batch, error) bool) {
		others := make(map[string]bool)
		for batch, err := range h.Feeder.Feed(ctx, from, to, after) {
			h.mu.Lock()
			own := string(h.own)
			h.mu.Unlock()
			beat := false
			for _, e := range batch.Changes {
				if isMember(e.Key) && string(e.Key) != own {
					others[string(e.Key)] = true
				}
				beat = beat || string(e.Key) == own
			}
			if !yield(batch, err) {
				return
			}
			if !beat || err != nil {
				continue
			}
			gone := backend.Batch{Position: batch.Position}
			for key := range others {
				gone.Changes = append(gone.Changes, backend.Entry{Key: []byte(key)})
			}
			clear(others)
			if len(gone.Changes) > 0 && !yield(gone, nil) {
				return
			}
		}
	}
}
