package pgstore

import (
	"context"
	"sync"

	"github.com/jackc/pgx/v5"

	"github.com/grpc-api-key/grpc-api-key/keystore/backend"
)

// An absence makes sure that entries do not exist. A primary that was deposed lacks the entries
// that the new primary has. So before Get returns ErrNotFound, or GetAll leaves an entry out, a
// commit that began after the call shows that the server is still the primary: a deposed primary
// has no standby, and confirms no commit.
//
// Calls that run at the same time share a commit. So callers that guess keys cause one commit after
// the other, and use one connection, however many they are.
//
// Invariants:
//
//  1. A call joins a question that has not begun. So the commit begins after the call.
//  2. At most one running question is not late. A question is late once a caller has left it: its
//     connection may be dead, and must not delay the callers of the next question.
//  3. A question that all callers have left is canceled.
type absence struct {
	mu      sync.Mutex // guards all below, and the fields of questions that name mu
	next    *question  // has not begun; nil: none
	running bool       // a question that is not late
}

// A question is whether some entries exist.
type question struct {
	keys    [][]byte // guarded by mu; complete once the question has begun
	waiting int      // guarded by mu; the callers that wait
	late    bool     // guarded by mu
	begun   bool     // guarded by mu

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}            // closed once found and err are set
	found  map[string]backend.Entry // the entries that exist
	err    error
}

// confirmAbsent asks whether entries exist, and returns those that exist, and perhaps others. The
// caller is a running call. Several callers get the same map and the same bytes.
func (b *Backend) confirmAbsent(
	ctx context.Context, keys ...[]byte,
) (present map[string]backend.Entry, err error) {
	a := &b.absence
	a.mu.Lock()
	if a.next == nil {
		a.next = &question{done: make(chan struct{})}
		a.next.ctx, a.next.cancel = context.WithCancel(b.calls.Context())
	}
	q := a.next
	q.keys = append(q.keys, keys...)
	q.waiting++
	b.startQuestionLocked()
	a.mu.Unlock()
	select {
	case <-q.done:
	case <-ctx.Done():
		b.leaveQuestion(q)
		return nil, ctx.Err()
	}
	return q.found, q.err
}

// startQuestionLocked begins the next question, unless a question is under way. The caller is a
// running call, or a running question.
func (b *Backend) startQuestionLocked() {
	a := &b.absence
	if a.next == nil || a.running {
		return
	}
	q := a.next
	a.next, a.running, q.begun = nil, true, true
	b.calls.Go(func() {
		defer q.cancel()
		b.answer(q)
		a.mu.Lock()
		defer a.mu.Unlock()
		if !q.late {
			a.running = false
			b.startQuestionLocked()
		}
	})
}

// leaveQuestion notes that a caller no longer waits.
func (b *Backend) leaveQuestion(q *question) {
	a := &b.absence
	a.mu.Lock()
	defer a.mu.Unlock()
	if q.waiting--; q.waiting == 0 {
		q.cancel()
		if a.next == q {
			a.next = nil
		}
	}
	if q.begun && !q.late {
		q.late = true
		a.running = false
		b.startQuestionLocked()
	}
}

// answer asks the server.
func (b *Backend) answer(q *question) {
	defer close(q.done)
	q.err = b.confirm(q.ctx, func(r querier, _ *state) error {
		rows, err := r.Query(q.ctx, b.sql.present, q.keys)
		if err != nil {
			return err
		}
		q.found = make(map[string]backend.Entry)
		var key, value []byte
		var revision int64
		_, err = pgx.ForEachRow(rows, []any{&key, &value, &revision}, func() error {
			q.found[string(key)] = backend.Entry{Value: value, Revision: uint64(revision)}
			value = nil // the next row gets another buffer
			return nil
		})
		return err
	})
}
