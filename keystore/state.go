package keystore

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// A storeState is the entry of the backend about the whole store. The value has 8 bytes for since,
// a byte for complete, and the state of the indexes: a byte for the version, a byte for the phase,
// 8 bytes for since, and the cursor.
//
// A program without indexes writes the first 9 bytes only. So after such a program has opened the
// store, the state lacks the indexes, and the next Open builds the indexes again.
type storeState struct {
	since    time.Time // some uses before since may be unknown
	complete bool      // all uses from since on have been written, and no store is open
	index    indexState
}

// An indexState says how much of the indexes exists.
type indexState struct {
	version byte  // 0: the store has no indexes, or a program without indexes has opened the store
	phase   byte  // of the migration
	since   int64 // all events of the keys that were created earlier have index entries
	// the last storage key that the phase has read; nil: the phase reads from its start
	cursor []byte
}

// indexVersion is the version of the indexes that this program reads and writes.
const indexVersion = 1

// The phases of a migration, in order.
const (
	phaseClear  = iota + 1 // remove the remains of earlier indexes
	phaseKeys              // index the keys by owner, and move the purged keys to the graveyard
	phaseEvents            // index the events by key
	phaseDone
)

// completeIndexes returns the indexState of complete indexes.
func completeIndexes(since int64) indexState {
	return indexState{version: indexVersion, phase: phaseDone, since: since}
}

// stateKey is the storage key of the storeState.
var stateKey = []byte{stateSpace}

func (st storeState) encode() []byte {
	value := binary.BigEndian.AppendUint64(nil, uint64(st.since.UnixNano()))
	complete := byte(0)
	if st.complete {
		complete = 1
	}
	value = append(value, complete)
	if st.index.version == 0 {
		return value
	}
	value = append(value, st.index.version, st.index.phase)
	value = binary.BigEndian.AppendUint64(value, uint64(st.index.since))
	return append(value, st.index.cursor...)
}

func parseState(e backend.Entry) (st storeState, err error) {
	v := e.Value
	if string(e.Key) != string(stateKey) || len(v) < 9 || v[8] > 1 {
		return storeState{}, fmt.Errorf("%w: the storage key %x does not hold the state of "+
			"the store",
			ErrCorrupt, e.Key)
	}
	st.since, st.complete = fromNanos(int64(binary.BigEndian.Uint64(v))), v[8] == 1
	if len(v) == 9 {
		return st, nil
	}
	i := &st.index
	if i.version = v[9]; i.version != indexVersion {
		return st, nil
	}
	if len(v) < 19 || v[10] < phaseClear || v[10] > phaseDone {
		return storeState{}, fmt.Errorf("%w: the state of the indexes cannot be read", ErrCorrupt)
	}
	i.phase, i.since = v[10], int64(binary.BigEndian.Uint64(v[11:]))
	if len(v) > 19 {
		i.cursor = v[19:]
	}
	return st, nil
}
