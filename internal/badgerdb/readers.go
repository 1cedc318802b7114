package badgerdb

import "sync/atomic"

// A readers counts who reads Badger, in epochs, so that old versions can be dropped although there is a reader at every
// moment.
//
// An epoch begins when the committer calls begin; its floor is the value of durable at that moment. There is one counter
// for odd epochs, and one for even epochs. A reader enters: the reader loads the number of the current epoch, and counts
// itself in the counter of that epoch. Then the reader loads durable, reads, and leaves. The invariants:
//
//  1. A reader loads durable after it is counted. So the reader reads at the floor of the epoch that is current at that
//     moment, or later: durable never falls.
//  2. An epoch begins only when the counter of the epoch before the current one is zero.
//  3. The discard timestamp moves to the floor of the current epoch, no further, and only when the counter of the epoch
//     before is zero.
//  4. Only the committer moves durable, begins epochs and moves the discard timestamp: durable stands still in advance.
//
// So no reader reads below the discard timestamp. Let a reader load durable in epoch e. The discard timestamp can pass
// the reader only in epoch e+1 or later. Before, the committer must find both counters at zero: one of them in epoch e,
// the other one in epoch e+1. The second look comes after the reader is counted. The first look may come before; then
// the reader has loaded durable in the middle of the call that begins epoch e+1, and reads at the floor of e+1.
//
// A reader that loads the number of an epoch, and counts itself long after, may be in the counter of a later epoch. That
// is as good: the argument needs only that the reader is in one of the two.
type readers struct {
	current atomic.Uint64 // the number of the current epoch
	counts  [2]struct {
		n atomic.Int64
		_ [56]byte // a cache line each
	} // by the last bit of the epoch's number
	floor uint64 // of the current epoch; the committer's
}

// enter counts the caller, until leave is called with what enter returns. The caller loads durable afterwards.
func (r *readers) enter() (epoch uint64) {
	epoch = r.current.Load()
	r.count(epoch)
	return epoch
}

func (r *readers) count(epoch uint64) { r.counts[epoch%2].n.Add(1) }
func (r *readers) leave(epoch uint64) { r.counts[epoch%2].n.Add(-1) }

// advance begins an epoch if invariant 2 allows that, and returns the timestamp to which the discard timestamp may move.
// Only the committer calls it.
func (r *readers) advance(durable uint64) (discard uint64, ok bool) {
	if !r.drained() {
		return 0, false
	}
	return r.begin(durable), true
}

// drained reports whether the counter of the epoch before the current one is zero.
func (r *readers) drained() bool { return r.counts[(r.current.Load()+1)%2].n.Load() == 0 }

// begin begins an epoch, and returns the floor of the epoch before.
func (r *readers) begin(durable uint64) (floor uint64) {
	floor, r.floor = r.floor, durable
	r.current.Add(1)
	return floor
}
