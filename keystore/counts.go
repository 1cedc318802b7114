package keystore

import (
	"sync/atomic"

	"github.com/grpc-api-key/grpc-api-key/internal/record"
	"github.com/grpc-api-key/grpc-api-key/internal/striped"
)

// A storeCounts holds the counts of a Store. The counts are allocated apart from the Store, because
// calls write to the counts while most fields of the Store are only read.
type storeCounts struct {
	// calls counts the calls of Verify and Bind. The kinds are the numbers of the reasons for
	// refusals, and the kinds below.
	calls   striped.Counters
	changes [numActions]atomic.Uint64 // by record.Action
	ended   [numReasons]atomic.Uint64 // the sessions that the store has ended, by the cause
}

// numActions is one more than the largest record.Action.
const numActions = record.Action_ACTION_PURGE + 1

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
}
