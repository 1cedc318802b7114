package keystore

import (
	"context"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A changeQueue orders the changes of one key. Changes that restrict the key (Revoke, Disable and
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
//     ordinary changes. The reason: an ordinary change first reads the key, then calls mustYield,
//     and then writes. So each ordinary write that may come after the call of acquire expects a
//     revision that the key had by the time of the call. At most one of these writes succeeds.
//  2. The head of a line races only against four kinds of changes. The first kind are changes that
//     began before the line existed: each can come before the head once, and joins the line after a
//     lost race. The others are restricting changes, writes of many keys, and changes by other
//     processes. So in one process every change succeeds in the end, in the order of the line.
//
// No change waits if no other change of the key is under way. No key delays the changes of another
// key.
type changeQueue struct {
	mu   sync.Mutex // guards all fields below, and every keyQueue; not held while a change waits
	keys map[token.ID]*keyQueue
}

// A keyQueue exists while a line of its key has members, or a change that restricts the key is
// under way.
type keyQueue struct {
	restricting int           // changes under way that restrict the key
	unlocked    chan struct{} // closed when restricting drops to 0; nil while no change waits
	lines       [2]line       // of ordinary changes, and of changes that restrict the key
}

type line struct {
	// The channel has capacity for the head. The other members wait to send, and proceed in the order
	// of arrival.
	head chan struct{}
	size int // the members of the line, including the head
}

// A turn is the place of a change among the changes of its key. The same goroutine calls acquire,
// mustYield and retry. Another goroutine may call release.
type turn struct {
	queue     *changeQueue
	id        token.ID
	restricts bool

	inLine   bool // guarded by queue.mu: the change is the head of its line
	released bool // guarded by queue.mu
}

// acquire returns a turn when the change may make its first attempt. The caller calls release when
// no attempt is left to make. An error is the error of the context.
func (q *changeQueue) acquire(ctx context.Context, id token.ID, restricts bool) (*turn, error) {
	t := &turn{queue: q, id: id, restricts: restricts}
	if restricts {
		q.mu.Lock()
		q.ofLocked(id).restricting++
		q.mu.Unlock()
	}
	if err := t.wait(ctx, false); err != nil {
		t.release()
		return nil, err
	}
	return t, nil
}

// mustYield reports whether the change must call retry instead of committing its attempt.
func (t *turn) mustYield() bool {
	t.queue.mu.Lock()
	defer t.queue.mu.Unlock()
	k := t.queue.keys[t.id]
	return !t.restricts && k != nil && k.restricting > 0
}

// retry waits until a change that lost a race, or had to yield, may make its next attempt.
func (t *turn) retry(ctx context.Context) error { return t.wait(ctx, true) }

func (t *turn) wait(ctx context.Context, lost bool) error {
	q := t.queue
	q.mu.Lock()
	k := q.keys[t.id]
	if k != nil && k.restricting > 0 && !t.restricts {
		lost = true // wait in line, as after a lost race
	}
	if !t.inLine && (lost || k != nil && k.lineOf(t).size > 0) {
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
			return endOf(ctx)
		}
		q.mu.Lock()
	}
	q.mu.Unlock()
	return nil
}

// joinLocked joins the line of the change, and returns when the change is the head. joinLocked
// releases the lock while the change waits.
func (t *turn) joinLocked(ctx context.Context) (err error) {
	q := t.queue
	k := q.ofLocked(t.id)
	l := k.lineOf(t)
	if l.head == nil {
		l.head = make(chan struct{}, 1)
	}
	l.size++
	q.mu.Unlock()
	select {
	case l.head <- struct{}{}:
	case <-ctx.Done():
		err = endOf(ctx)
	}
	q.mu.Lock()
	if t.inLine = err == nil; !t.inLine {
		l.size--
		q.dropLocked(t.id, k)
	}
	return err
}

// release ends the turn. A second call does nothing.
func (t *turn) release() {
	q := t.queue
	q.mu.Lock()
	defer q.mu.Unlock()
	k := q.keys[t.id]
	if t.released || k == nil {
		return
	}
	t.released = true
	if t.inLine {
		l := k.lineOf(t)
		<-l.head
		l.size--
	}
	if t.restricts {
		if k.restricting--; k.restricting == 0 && k.unlocked != nil {
			close(k.unlocked)
			k.unlocked = nil
		}
	}
	q.dropLocked(t.id, k)
}

func (q *changeQueue) ofLocked(id token.ID) *keyQueue {
	k := q.keys[id]
	if k == nil {
		k = new(keyQueue)
		if q.keys == nil {
			q.keys = make(map[token.ID]*keyQueue)
		}
		q.keys[id] = k
	}
	return k
}

func (q *changeQueue) dropLocked(id token.ID, k *keyQueue) {
	if k.restricting == 0 && k.lines[0].size == 0 && k.lines[1].size == 0 {
		delete(q.keys, id)
	}
}

func (k *keyQueue) lineOf(t *turn) *line {
	if t.restricts {
		return &k.lines[1]
	}
	return &k.lines[0]
}
