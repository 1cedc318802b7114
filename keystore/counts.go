package keystore

import (
	"errors"
	"sync/atomic"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/striped"
	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A storeCounts holds the counts of a Store. The counts are allocated apart from the Store, because
// calls write to the counts while most fields of the Store are only read.
type storeCounts struct {
	// calls counts the calls of Verify and Bind. The kinds are the numbers of the reasons for
	// refusals, and the kinds below.
	calls   striped.Counters
	changes [numActions]atomic.Uint64 // by record.Action
	ended   [numReasons]atomic.Uint64 // the sessions that the store has ended, by the cause

	took         [numActions]durations // of the calls that change one key
	barriers     durations             // the waits for other processes
	fullWrites   atomic.Uint64         // the writes for which the storage had no space
	failedWrites atomic.Uint64         // the other writes that failed
	leases       atomic.Uint64         // of credits
	exhausted    atomic.Uint64         // the calls that found too few credits
}

// numActions is one more than the largest record.Action.
const numActions = record.Action_ACTION_IMPORT + 1

// Each hit of Verify that takes no lock counts once, under one of the first two kinds: a second
// counter would cost a few nanoseconds. The fence counts the other hits and the misses.
const (
	hitAdmitted   = numReasons + iota // a hit without a lock, admitted
	hitRefused                        // a hit without a lock, refused
	otherAdmitted                     // every other call that was admitted
	numKinds
)

// A compiler error here means that striped.Kinds is too small.
var _ [striped.Kinds - numKinds]struct{}

// fill sets the fields of st that come from the counts.
func (c *storeCounts) fill(st *Stats) {
	calls := c.calls.Sums()
	st.Hits += calls[hitAdmitted] + calls[hitRefused]
	st.Admitted = calls[hitAdmitted] + calls[otherAdmitted]
	st.Refusals = make(map[string]uint64)
	st.Ended = make(map[string]uint64)
	for i := range numReasons {
		st.Refused += calls[i]
		if reasons[i].of&refusal != 0 || calls[i] > 0 {
			st.Refusals[reasons[i].word] = calls[i]
		}
		if n := c.ended[i].Load(); reasons[i].of&sessionEnd != 0 || n > 0 {
			st.Ended[reasons[i].word] = n
		}
	}
	st.Changes = make(map[Action]uint64)
	for number, action := range actions {
		st.Changes[action] = c.changes[number].Load()
	}
	st.Durations = make(map[Action]Histogram)
	for _, number := range timedActions {
		st.Durations[actions[number]] = c.took[number].histogram()
	}
	st.Leases, st.Exhausted = c.leases.Load(), c.exhausted.Load()
	st.Barriers = c.barriers.histogram()
	st.FailedWrites = map[string]uint64{
		"full": c.fullWrites.Load(), "failed": c.failedWrites.Load(),
	}
}

// timedActions are the actions of Stats.Durations.
var timedActions = [...]record.Action{
	record.Action_ACTION_CREATE, record.Action_ACTION_UPDATE, record.Action_ACTION_ROTATE,
	record.Action_ACTION_DISABLE, record.Action_ACTION_ENABLE, record.Action_ACTION_REVOKE,
	record.Action_ACTION_REHASH, record.Action_ACTION_CREDITS,
}

// noteWrite counts the error of a write, unless err is nil, or concerns what was written: a
// conflict with another write, or a write that is too large.
func (c *storeCounts) noteWrite(err error) {
	switch {
	case err == nil, errors.Is(err, backend.ErrConflict), errors.Is(err, backend.ErrTooLarge):
	case errors.Is(err, backend.ErrFull):
		c.fullWrites.Add(1)
	default:
		c.failedWrites.Add(1)
	}
}
