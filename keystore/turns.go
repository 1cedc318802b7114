package keystore

import (
	"context"
	"sync"

	"github.com/grpc-api-key/grpc-api-key/internal/token"
)

// A turns lets changes of one key through that others keep coming before.
//
// A change makes its first attempt at once. One that has lost its race, because another change of the key was committed
// between its read and its write, stands in the key's line from then on, and makes its next attempts when it is at the
// head. While a key has a line, changes that begin go to its end.
//
// The invariant: the head of a line races only against changes that began before there was a line, each of which can
// come before it once, and goes to the end when it loses; against writes of many keys; and against other processes. So
// in one process every change gets through, in the order of the line.
//
// Nobody stands in line for a key that nobody else is changing, and no line holds up another key.
type turns struct {
	mu    sync.Mutex // guards all below; not held while anybody waits
	lines map[token.ID]*line
}

type line struct {
	head chan struct{} // has room for the one at the head; the others wait to send, and are served as they came
	size int           // of the line, with its head
}

// take waits until the caller is at the head of the key's line, and returns what to call when it is through, which may be
// called again. For a caller that has not lost there need not be a line: over is nil then. The error is that of the
// context; over is nil then too.
func (t *turns) take(ctx context.Context, id token.ID, lost bool) (over func(), err error) {
	t.mu.Lock()
	l := t.lines[id]
	if l == nil {
		if !lost {
			t.mu.Unlock()
			return nil, nil
		}
		l = &line{head: make(chan struct{}, 1)}
		if t.lines == nil {
			t.lines = make(map[token.ID]*line)
		}
		t.lines[id] = l
	}
	l.size++
	t.mu.Unlock()
	select {
	case l.head <- struct{}{}:
		return sync.OnceFunc(func() {
			<-l.head
			t.leave(id, l)
		}), nil
	case <-ctx.Done():
		t.leave(id, l)
		return nil, endOf(ctx)
	}
}

func (t *turns) leave(id token.ID, l *line) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if l.size--; l.size == 0 {
		delete(t.lines, id)
	}
}
