// Package sequencer gives each event of a store its place in the order of the events, so that a
// reader can read the events once each and miss none.
//
// A writer calls Begin for the stamp of an event, writes the event, and calls End. A reader calls
// Wait, and then reads the events up to the stamp that Wait returned. A reader that follows the
// events as they come calls Next instead.
package sequencer

import (
	"context"
	"math"
	"sync"
	"time"
)

// A Sequencer gives out stamps. A stamp is a time in nanoseconds since the Unix epoch. The zero
// Sequencer is ready for use. A Sequencer is safe for concurrent use.
//
// The invariant: a stamp is greater than all earlier stamps, and stays pending until the store
// knows whether the event has been written. So once a stamp and all earlier stamps are no longer
// pending, no event with an earlier stamp will appear. A reader may use the stamp as a cursor.
type Sequencer struct {
	// Clock returns the time in nanoseconds since the Unix epoch. Nil means the clock of the
	// machine. Set Clock before the first use.
	Clock func() int64

	mu      sync.Mutex
	last    int64
	ended   int64          // the last stamp that is no longer pending
	pending map[int64]bool // the pending stamps, and whether the change may add a key
	moved   chan struct{}  // closed at the next End; nil while no reader waits

	// addsStarted counts the changes that may add a key. addsFinished counts how many of these
	// changes have ended.
	addsStarted, addsFinished uint64
}

func (s *Sequencer) now() int64 {
	if s.Clock != nil {
		return s.Clock()
	}
	return time.Now().UnixNano()
}

// Begin returns a new pending stamp: the time, or a little later. adds means that the change may
// add a key.
func (s *Sequencer) Begin(adds bool) int64 { return s.BeginAfter(0, adds) }

// BeginAfter is Begin with a stamp that is greater than another stamp, whatever the clock shows.
func (s *Sequencer) BeginAfter(other int64, adds bool) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last+1, s.now(), min(other, maxStamp)+1)
	if s.pending == nil {
		s.pending = make(map[int64]bool)
	}
	s.pending[s.last] = adds
	if adds {
		s.addsStarted++
	}
	return s.last
}

// maxStamp is the largest stamp that another process may have issued. The stamps that a Sequencer
// gives out after maxStamp do not overflow.
const maxStamp = math.MaxInt64 / 2

// Raise makes all later stamps greater than floor, for another process that reads the events up to
// floor. The results are of this moment. No stamp at or below watermark is pending or will be given
// out. No stamp above last was given out.
func (s *Sequencer) Raise(floor int64) (watermark, last int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, min(floor, maxStamp))
	watermark = s.last
	for stamp := range s.pending {
		watermark = min(watermark, stamp-1)
	}
	return watermark, s.last
}

// Pass makes all later stamps greater than stamp, unless stamp is in the future. A reader that
// wants the events from now on calls Pass with the present time, because a clock may show the same
// time to the reader and to a later change.
func (s *Sequencer) Pass(stamp int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if stamp <= s.now() {
		s.last = max(s.last, stamp)
	}
}

// End ends the stamps of changes whose outcome is known.
func (s *Sequencer) End(stamps ...int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, stamp := range stamps {
		if s.pending[stamp] {
			s.addsFinished++
		}
		delete(s.pending, stamp)
		s.ended = max(s.ended, stamp)
	}
	if s.moved != nil {
		close(s.moved)
		s.moved = nil
	}
}

// Adds returns how many changes that may add a key have started, and how many of these changes have
// finished.
func (s *Sequencer) Adds() (started, finished uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addsStarted, s.addsFinished
}

// Wait waits until no stamp given before the call is pending, and returns the last of these stamps.
// If ctx ends first, Wait returns the error of ctx.
func (s *Sequencer) Wait(ctx context.Context) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.last
	for s.pendingLocked(last) {
		if err := s.waitMovedLocked(ctx); err != nil {
			return 0, err
		}
	}
	return last, nil
}

// Next waits until there may be new events after the stamp after, and returns the stamp up to which
// the reader can read them: neither that stamp nor an earlier one is pending. Next waits for an
// End, so there may also be no new event, if the change failed, or if an earlier stamp is pending.
// If there may be new events already, Next returns even if ctx has ended. If ctx ends first, Next
// returns the error of ctx.
func (s *Sequencer) Next(ctx context.Context, after int64) (int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		next := s.ended
		for stamp := range s.pending {
			next = min(next, stamp-1)
		}
		if next > after {
			return next, nil
		}
		if err := s.waitMovedLocked(ctx); err != nil {
			return 0, err
		}
	}
}

// pendingLocked reports whether a stamp up to last is pending.
func (s *Sequencer) pendingLocked(last int64) bool {
	for stamp := range s.pending {
		if stamp <= last {
			return true
		}
	}
	return false
}

// waitMovedLocked returns after the next End. waitMovedLocked releases the lock while the caller
// waits.
func (s *Sequencer) waitMovedLocked(ctx context.Context) error {
	if s.moved == nil {
		s.moved = make(chan struct{})
	}
	moved := s.moved
	s.mu.Unlock()
	defer s.mu.Lock()
	select {
	case <-moved:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Resume makes the Sequencer continue after the last stored stamp, in case the clock has been set
// back. Call Resume before the first Begin. The function first returns the first stored stamp with
// from <= stamp < to, or -1 if no stored stamp is in this range. Resume returns an error of first
// unchanged.
//
// If the clock is years behind, all stamps are ahead of the clock. So Resume finds the last stamp
// by binary search.
func (s *Sequencer) Resume(first func(from, to int64) (int64, error)) error {
	// The last stamp is last, or is between last and end. The stamp of this moment is still free,
	// unless first finds it.
	last, end := s.now()-1, int64(math.MaxInt64)
	for from := last + 1; end-last > 1; from = last + (end-last)/2 {
		stamp, err := first(from, end)
		switch {
		case err != nil:
			return err
		case stamp >= 0:
			last = stamp
		default:
			end = from
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = max(s.last, last) // Raise may have been called before
	s.ended = s.last
	return nil
}
