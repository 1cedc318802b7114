package keystore

import (
	"context"
	"iter"
	"math"
	"time"
)

// Follow is like Events, but waits for more events instead of ending. Follow yields each event soon
// after its change, misses none and repeats none. Follow ends when Limit is reached, and after
// Until. If both are zero, Follow does not end. To follow only the changes from now on, set After
// to the present time. A query with Newest gives ErrInvalid.
//
// If something else ends the list, the last pair has an error: the error of ctx once ctx is done,
// ErrClosed after Close, ErrUnavailable if the store has stopped (see Err), or an error of a read.
// To continue after an error, set After to the At of the last event.
//
// Follow holds no lock and no event while the loop body runs: a slow consumer reads the events from
// the store later. But Options.EventRetention may remove an event that the consumer has not read.
// While the storage has not answered a change, the events of later changes wait. If several
// processes have the store open, Follow yields the events of all processes. A process that died
// delays the events until the other processes have removed it, for about three times the freshness
// of the store. Follow starts no goroutine, and each call may have a different query.
func (s *Store) Follow(ctx context.Context, q EventQuery) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		if err := s.follow(ctx, q, yield); err != nil {
			yield(Event{}, err)
		}
	}
}

// follow returns the error that ends the list. If the consumer or the query ended the list, follow
// returns nil.
func (s *Store) follow(ctx context.Context, q EventQuery, yield func(Event, error) bool) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	if q.Newest {
		return invalid("EventQuery.Newest: Follow yields the events in the order of the changes")
	}
	only, err := q.keyID()
	if err != nil {
		return err
	}
	until := int64(math.MaxInt64 - 1)
	if !q.Until.IsZero() {
		until = stampAt(q.Until)
	}
	yield = atMost(q.Limit, yield)
	after := stampAt(q.After)
	s.sequencer.Pass(after) // a change may follow in the same tick of the clock
	w := eventWaiter{store: s}
	for after < until {
		last, final, err := w.awaitEvents(ctx, after, q.Until)
		if err != nil {
			return err
		}
		last = min(last, until)
		more, err := s.readEvents(ctx, &q, only, after+1, last, yield)
		if err != nil || !more || final {
			return err
		}
		after = max(after, last)
	}
	return nil
}

// An eventWaiter waits for events on behalf of one Follow.
//
// In a store of several processes, an eventWaiter asks all processes for a stamp up to which the
// events can be read, when the feed has delivered a record of a key since the last time. The feed
// delivers no record for the event of a Restore that adds only the grave of a purged key. So an
// eventWaiter also asks every followInterval.
type eventWaiter struct {
	store   *Store
	changed <-chan struct{} // closed after the next delivered record; nil: ask without delay
}

const followInterval = 10 * time.Second

// next waits until there may be events after the stamp after, and returns the stamp up to which the
// events can be read. There may also be no new event. If ctx ends first, next returns an error.
func (w *eventWaiter) next(ctx context.Context, after int64) (int64, error) {
	p := w.store.processes
	if p == nil {
		return w.store.sequencer.Next(ctx, after)
	}
	for {
		if w.changed != nil {
			timer := time.NewTimer(followInterval)
			select {
			case <-w.changed:
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return 0, ctx.Err()
			}
			timer.Stop()
		}
		changed := p.nextChange() // before the request, so that no record is missed
		w.changed = nil
		last, err := p.cluster.Watermark(ctx)
		if err != nil {
			return 0, err
		}
		w.changed = changed
		if last > after {
			return last, nil
		}
	}
}

// awaitEvents waits until there may be events after the stamp after, and returns the stamp up to
// which the events can be read now. final means that the time until has passed, so that all later
// events are after until. If until is zero, final is false.
func (w *eventWaiter) awaitEvents(
	ctx context.Context, after int64, until time.Time,
) (last int64, final bool, err error) {
	s := w.store
	for {
		waiting, cancel := s.whileServing(ctx, until)
		last, err := w.next(waiting, after)
		cancel()
		switch {
		case err == nil:
			return last, false, nil
		case s.serving() != nil:
			return 0, false, s.serving()
		case ctx.Err() != nil:
			return 0, false, ctx.Err()
		case !until.IsZero() && time.Now().After(until):
			last, err := s.awaitChanges(ctx)
			return last, true, err
		}
	}
}

// whileServing returns a context that ends with ctx, when the store stops serving, and after the
// time until or a little earlier. If until is zero, there is no such time.
func (s *Store) whileServing(ctx context.Context, until time.Time) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.serves, cancel)
	end := func() { stop(); cancel() }
	if until.IsZero() {
		return ctx, end
	}
	// A change at the time until itself is wanted, so wait one nanosecond longer.
	ctx, cancelTimer := context.WithTimeout(ctx, min(time.Until(until)+1, clockCheck))
	return ctx, func() { cancelTimer(); end() }
}
