// Package changequeue prevents starvation: a change of a key that lost a race waits in line for its
// key instead of retrying against newcomers.
package changequeue

import (
	"context"
	"sync"
)

// An ID names a key.
type ID = [16]byte

// A Queue orders the changes of one key. Changes that restrict the key (Revoke, Disable and
// RevokeAll) go before ordinary changes, and no change starves.
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
//
// No change waits if no other change of the key is under way. No key delays the changes of another
// key.
type Queue struct {
	mu   sync.Mutex // guards all fields below, and every keyState; not held while a change waits
	keys map[ID]*keyState
}

// A keyState exists while a line of its key has members, or a change that restricts the key is
// under way.
type keyState struct {
	restricting int           // changes under way that restrict the key
	unlocked    chan struct{} // closed when restricting drops to 0; nil while no change waits
	waiters     [2]waiters    // of ordinary changes, and of changes that restrict the key
}

type waiters struct {
	// The channel has capacity for the head. The other members wait to send, and proceed in the order
	// of arrival.
	head chan struct{}
	size int // the members of the line, including the head
}

// A Turn is the place of a change among the changes of its key. The same goroutine calls Acquire,
// MustYield and Retry. Another goroutine may call Release.
type Turn struct {
	queue     *Queue
	id        ID
	restricts bool

	inLine   bool // guarded by queue.mu: the change is the head of its line
	released bool // guarded by queue.mu
}

// Acquire returns a turn when the change may make its first attempt. The caller calls Release when
// no attempt is left to make. An error is the error of the context.
func (q *Queue) Acquire(ctx context.Context, id ID, restricts bool) (*Turn, error) {
	t := &Turn{queue: q, id: id, restricts: restricts}
	if restricts {
		q.mu.Lock()
		q.ofLocked(id).restricting++
		q.mu.Unlock()
	}
	if err := t.wait(ctx, false); err != nil {
		t.Release()
		return nil, err
	}
	return t, nil
}

// MustYield reports whether the change must call Retry instead of committing its attempt.
func (t *Turn) MustYield() bool {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	k := t.queue.keys[t.id]
	return !t.restricts && k != nil && k.restricting > 0
}

// Retry waits until a change that lost a race, or had to yield, may make its next attempt.
func (t *Turn) Retry(ctx context.Context) error { return t.wait(ctx, true) }

func (t *Turn) wait(ctx context.Context, lost bool) error {
	q := t.queue
	q.mu.Lock()
	k := q.keys[t.id]
	if k != nil && k.restricting > 0 && !t.restricts {
		lost = true // wait in line, as after a lost race
	}
	if !t.inLine && (lost || k != nil && k.waitersOf(t).size > 0) {
		if err := t.joinLocked(ctx); err != nil {
			q.mu.Unlock()
			return err
		}
	}
	for !t.restricts {
		if k = q.keys[t.id]; k == nil || k.restricting == 0 {
			break
		}
		if k.unlocked == nil {
			k.unlocked = make(chan struct{})
		}
		unlocked := k.unlocked
		q.mu.Unlock()
		select {
		case <-unlocked:
		case <-ctx.Done():
			return ctx.Err()
		}
		q.mu.Lock()
	}
	q.mu.Unlock()
	return nil
}

// joinLocked joins the line of the change, and returns when the change is the head. joinLocked
// releases the lock while the change waits.
func (t *Turn) joinLocked(ctx context.Context) (err error) {
	q := t.queue
	k := q.ofLocked(t.id)
	w := k.waitersOf(t)
	if w.head == nil {
		w.head = make(chan struct{}, 1)
	}
	w.size++
	q.mu.Unlock()
	select {
	case w.head <- struct{}{}:
	case <-ctx.Done():
		err = ctx.Err()
	}
	q.mu.Lock()
	if t.inLine = err == nil; !t.inLine {
		w.size--
		q.dropLocked(t.id, k)
	}
	return err
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
	if t.inLine {
		w := k.waitersOf(t)
		<-w.head
		w.size--
	}
	if t.restricts {
		if k.restricting--; k.restricting == 0 && k.unlocked != nil {
			close(k.unlocked)
			k.unlocked = nil
		}
	}
	q.dropLocked(t.id, k)
}

func (q *Queue) ofLocked(id ID) *keyState {
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

func (q *Queue) dropLocked(id ID, k *keyState) {
	if k.restricting == 0 && k.waiters[0].size == 0 && k.waiters[1].size == 0 {
		delete(q.keys, id)
	}
}

func (k *keyState) waitersOf(t *Turn) *waiters {
	if t.restricts {
		return &k.waiters[1]
	}
	return &k.waiters[0]
}
