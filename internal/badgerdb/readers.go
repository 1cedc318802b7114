package badgerdb

import "sync/atomic"

// A readers counts the readers of Badger, in epochs. So old versions can be dropped although a
// reader is active at every moment.
//
// An epoch begins when the committer calls begin. The floor of the epoch is the value of durable at
// that moment. There is one counter for odd epochs, and one for even epochs. A reader enters: the
// reader loads the number of the current epoch, and counts itself in the counter of that epoch.
// Then the reader loads durable, reads, and leaves. The invariants:
//
//  1. A reader loads durable after the reader is counted. So the reader reads at the floor of the
//     epoch that is current at that moment, or later: durable never falls.
//  2. An epoch begins only when the counter of the epoch before the current one is zero.
//  3. The discard timestamp moves to the floor of the current epoch, no further, and only when the
//     counter of the epoch before is zero.
//  4. Only the committer moves durable, begins epochs and moves the discard timestamp. So durable
//     does not change during advance.
//
// So no reader reads below the discard timestamp. Let a reader load durable in epoch e. The discard
// timestamp can pass the reader only in epoch e+1 or later. Before, the committer must find both
// counters at zero: one counter in epoch e, the other counter in epoch e+1. The second look comes
// after the reader is counted. The first look may come before. Then the reader has loaded durable
// in the middle of the call that begins epoch e+1, and reads at the floor of e+1.
//
// A reader that loads the number of an epoch, and counts itself long after, may be in the counter
// of a later epoch. The argument still holds, because it needs only that the reader is in one of
// the two counters.
type readers struct {
	current atomic.Uint64 // the number of the current epoch
	// counts is indexed by the last bit of the epoch's number.
	counts [2]struct {
		n atomic.Int64
		_ [56]byte // fills a cache line
	}
	floor uint64 // of the current epoch; owned by the committer
}

// enter counts the caller as a reader. To end, the caller passes the epoch to leave. The caller
// loads durable after enter.
func (r *readers) enter() (epoch uint64) {
	epoch = r.current.Load()
	r.count(epoch)
	return epoch
}

func (r *readers) count(epoch uint64) { r.counts[epoch%2].n.Add(1) }
func (r *readers) leave(epoch uint64) { r.counts[epoch%2].n.Add(-1) }

// advance begins an epoch if invariant 2 allows a new epoch, and returns the timestamp to which the
// discard timestamp may move. Only the committer calls advance.
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
