// Package changequeue prevents starvation among the changes of one key. A change that lost a race
// waits in line for its key instead of retrying against newcomers.
//
// The package is for a store that changes a key in three steps. The store reads the key, computes
// the new state, and writes the new state if the key still has the revision that the store read:
//
//	turn, err := queue.Acquire(ctx, id, restricts)
//	...
//	defer turn.Release()
//	for {
//		read the key
//		if !turn.MustYield() {
//			write the key; return unless another change came first
//		}
//		err := turn.Retry(ctx)
//		...
//	}
package changequeue

import (
	"context"
	"sync"
)

// An ID names a key.
type ID = [16]byte

// A Queue orders the changes of each key. Changes that restrict the key go before ordinary changes,
// and no change starves. The zero Queue is ready for use. A Queue is safe for concurrent use.
//
// A change makes its first attempt immediately. A change loses a race if another change of the key
// is committed between its read and its write. A change that lost a race joins the line for changes
// of its kind, and makes its next attempts at the head of the line. While a key has a line, new
// changes of the same kind join the end of the line.
//
// While a restricting change is under way, an ordinary change begins no attempt, and does not
// commit an attempt that has begun. The ordinary change joins its line. The head of the line begins
// again after the restricting changes.
//
// The invariants:
//
//  1. A restricting change waits for no ordinary change, and loses at most one race against
//     ordinary changes. The reason: an ordinary change first reads the key, then calls MustYield,
//     and then writes. So each ordinary write that may come after the call of Acquire expects a
//     revision that the key had by the time of the call. At most one of these writes succeeds.
//  2. The head of a line races only against four kinds of changes. The first kind are changes that
//     began before the line existed: each can come before the head once, and joins the line after a
//     lost race. The others are restricting changes, writes of many keys, and changes by other
//     processes. So in one process every change succeeds in the end, in the order of the line.
//  3. No change waits if no other change of the key is under way. No key delays the changes of
//     another key. A key without a change under way takes no memory.
type Queue struct {
	mu   sync.Mutex // guards all fields below, and every keyState; not held while a change waits
	keys map[ID]*keyState
}

// A keyState exists while a line of its key has members, or a change that restricts the key is
// under way.
type keyState struct {
	restricting int           // the restricting changes under way
	unblocked   chan struct{} // closed when restricting drops to 0; nil while no change waits
	ordinary    waiters
	urgent      waiters // the restricting changes that lost a race
}

// The waiters are the members of a line: the head, and the changes that wait to become the head.
type waiters struct {
	// The channel has capacity for the head. The other members wait to send, and proceed in the
	// order of arrival.
	head chan struct{}
	size int // the number of members, including the head
}

// A Turn is the place of a change among the changes of its key. The same goroutine calls Acquire,
// MustYield and Retry. Another goroutine may call Release.
type Turn struct {
	queue     *Queue
	id        ID
	restricts bool

	isHead   bool // guarded by queue.mu: the change is the head of its line
	released bool // guarded by queue.mu
}

// Acquire returns a Turn when the change may make its first attempt. If ctx ends first, Acquire
// returns the error of ctx. The caller calls Release when no attempt is left to make. The argument
// restricts is true for a restricting change.
func (q *Queue) Acquire(ctx context.Context, id ID, restricts bool) (*Turn, error) {
	t := &Turn{queue: q, id: id, restricts: restricts}
	q.mu.Lock()
	if restricts {
		q.stateLocked(id).restricting++
	}
	err := t.waitLocked(ctx, false)
	q.mu.Unlock()
	if err != nil {
		t.Release()
		return nil, err
	}
	return t, nil
}

// MustYield reports whether the change must call Retry instead of committing its attempt.
func (t *Turn) MustYield() bool {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	return t.blockedLocked()
}

// Retry waits until a change that lost a race, or had to yield, may make its next attempt. If ctx
// ends first, Retry returns the error of ctx. The caller must then call Release.
func (t *Turn) Retry(ctx context.Context) error {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	return t.waitLocked(ctx, true)
}

// Release ends the turn. A second call does nothing.
func (t *Turn) Release() {
	q := t.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	k := q.keys[t.id]
	if t.released || k == nil {
		return
	}
	t.released = true
	if t.isHead {
		w := k.waitersOf(t)
		<-w.head
		w.size--
	}
	if t.restricts {
		if k.restricting--; k.restricting == 0 && k.unblocked != nil {
			close(k.unblocked)
			k.unblocked = nil
		}
	}
	q.dropLocked(t.id, k)
}

// waitLocked returns when the change may make an attempt. lost means that the change has made an
// attempt before. waitLocked releases the lock while the change waits.
func (t *Turn) waitLocked(ctx context.Context, lost bool) error {
	k := t.queue.keys[t.id]
	mustJoin := lost || t.blockedLocked() || k != nil && k.waitersOf(t).size > 0
	if mustJoin && !t.isHead {
		if err := t.joinLocked(ctx); err != nil {
			return err
		}
	}
	for t.blockedLocked() {
		if err := t.waitUnblockedLocked(ctx); err != nil {
			return err
		}
	}
	return nil
}

// blockedLocked reports whether a restricting change is under way that goes before this change.
func (t *Turn) blockedLocked() bool {
	k := t.queue.keys[t.id]
	return !t.restricts && k != nil && k.restricting > 0
}

// joinLocked joins the line of the change, and returns when the change is the head. joinLocked
// releases the lock while the change waits.
func (t *Turn) joinLocked(ctx context.Context) error {
	q := t.queue
	k := q.stateLocked(t.id)
	w := k.waitersOf(t)
	if w.head == nil {
		w.head = make(chan struct{}, 1)
	}
	w.size++
	q.mu.Unlock()
	var err error
	select {
	case w.head <- struct{}{}:
	case <-ctx.Done():
		err = ctx.Err()
	}
	q.mu.Lock()
	if err != nil {
		w.size--
		q.dropLocked(t.id, k)
		return err
	}
	t.isHead = true
	return nil
}

// waitUnblockedLocked returns when the restricting changes that are under way have been released.
// waitUnblockedLocked releases the lock while the change waits.
func (t *Turn) waitUnblockedLocked(ctx context.Context) error {
	k := t.queue.keys[t.id]
	if k.unblocked == nil {
		k.unblocked = make(chan struct{})
	}
	unblocked := k.unblocked
	t.queue.mu.Unlock()
	defer t.queue.mu.Lock()
	select {
	case <-unblocked:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// stateLocked returns the state of a key, and makes a state for a key without changes.
func (q *Queue) stateLocked(id ID) *keyState {
	k := q.keys[id]
	if k == nil {
		k = new(keyState)
		if q.keys == nil {
			q.keys = make(map[ID]*keyState)
		}
		q.keys[id] = k
	}
	return k
}

// dropLocked forgets the state of a key if no change needs the state.
func (q *Queue) dropLocked(id ID, k *keyState) {
	if k.restricting == 0 && k.ordinary.size == 0 && k.urgent.size == 0 {
		delete(q.keys, id)
	}
}

func (k *keyState) waitersOf(t *Turn) *waiters {
	if t.restricts {
		return &k.urgent
	}
	return &k.ordinary
}
