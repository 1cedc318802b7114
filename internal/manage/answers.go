package manage

import (
	"context"
	"crypto/sha256"
	"errors"
	"sync"
	"time"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

const (
	maxAnswers = 1024
	keepAnswer = 10 * time.Minute
)

var (
	// ErrRequestReused means that the id of a request was used before, for another request.
	ErrRequestReused = errors.New("the request id was used before, for a request with other content")
	// ErrManyRequests means that too many requests with an id are in progress.
	ErrManyRequests = errors.New("too many requests with a request id are in progress")
)

// Answers keeps the answers to requests that have an id, so that a caller who has lost an answer
// can repeat the request. Answers hold secrets, so they are only in memory, 10 minutes long, and at
// most 1,024. An Answers is safe for concurrent use.
//
// Each entry is in progress, or answered. The answered entries are in the queue, in the order of
// their ends. An entry leaves the queue and the map together: because of its age, because the map
// is full, or because of Close. An entry whose call fails leaves the map when the call ends, so a
// repeat tries again.
type Answers struct {
	mu      sync.Mutex // guards all below
	entries map[Request]*answer
	queue   []*answer   // the answered entries, oldest first
	forget  *time.Timer // runs when the oldest answer is too old; nil: the queue is empty
	closed  bool
}

// A Request identifies a request.
type Request struct {
	Actor, Method, ID string
}

type answer struct {
	request Request
	content [sha256.Size]byte
	ended   chan struct{} // closed when the call has ended
	// Written before ended is closed.
	ok    bool // the call succeeded
	value any
	until time.Time
}

// NewAnswers returns an Answers without entries.
func NewAnswers() *Answers { return &Answers{entries: make(map[Request]*answer)} }

// Do returns the value that call returns, or the value that an earlier call for an equal request
// has returned. If such a call is in progress, Do waits for it, or until ctx ends. If the call
// fails, Do returns its error, and a caller who waits makes a call in turn.
//
// The content is a hash of the request. The error is ErrRequestReused if the earlier request had
// other content, ErrManyRequests, keystore.ErrClosed after Close, or an error of ctx or of call.
func (a *Answers) Do(
	ctx context.Context, r Request, content [sha256.Size]byte, call func() (any, error),
) (any, error) {
	for {
		mine, e, err := a.enter(r, content)
		if err != nil {
			return nil, err
		}
		if mine {
			return a.run(e, call)
		}
		select {
		case <-e.ended:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if e.ok {
			return e.value, nil
		}
	}
}

// enter returns the entry of a request. If mine is true, the entry is new, and the caller must call
// run.
func (a *Answers) enter(r Request, content [sha256.Size]byte) (mine bool, e *answer, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return false, nil, keystore.ErrClosed
	}
	a.dropLocked(time.Now())
	if e := a.entries[r]; e != nil {
		if e.content != content {
			return false, nil, ErrRequestReused
		}
		return false, e, nil
	}
	if len(a.entries) >= maxAnswers {
		if len(a.queue) == 0 {
			return false, nil, ErrManyRequests
		}
		a.dropFirstLocked()
	}
	e = &answer{request: r, content: content, ended: make(chan struct{})}
	a.entries[r] = e
	return true, e, nil
}

// run makes the call of a new entry.
func (a *Answers) run(e *answer, call func() (any, error)) (any, error) {
	defer a.end(e) // also if call panics
	value, err := call()
	if err != nil {
		return nil, err
	}
	e.ok, e.value = true, value
	return value, nil
}

func (a *Answers) end(e *answer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	defer close(e.ended)
	if !e.ok || a.closed {
		delete(a.entries, e.request)
		return
	}
	e.until = time.Now().Add(keepAnswer)
	a.queue = append(a.queue, e)
	if a.forget == nil {
		a.forget = time.AfterFunc(keepAnswer, a.drop)
	}
}

// drop drops the answers that are too old, and sets the timer for the next one.
func (a *Answers) drop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forget = nil
	now := time.Now()
	a.dropLocked(now)
	if len(a.queue) > 0 {
		a.forget = time.AfterFunc(a.queue[0].until.Sub(now), a.drop)
	}
}

// dropLocked drops the answers that are too old. The caller holds mu.
func (a *Answers) dropLocked(now time.Time) {
	for len(a.queue) > 0 && !now.Before(a.queue[0].until) {
		a.dropFirstLocked()
	}
}

// dropFirstLocked drops the oldest answer. The caller holds mu.
func (a *Answers) dropFirstLocked() {
	delete(a.entries, a.queue[0].request)
	a.queue[0] = nil
	a.queue = a.queue[1:]
}

// Close drops all answers. A call that is in progress continues, and its answer is not kept. After
// Close, Do returns keystore.ErrClosed.
func (a *Answers) Close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	for len(a.queue) > 0 {
		a.dropFirstLocked()
	}
	if a.forget != nil {
		a.forget.Stop()
		a.forget = nil
	}
}
