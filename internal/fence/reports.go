package fence

import "sync"

// reports counts the calls of Ended that no caller waits for: those of Publish, Flush, EndAll and
// EndOne. The zero value is ready for use.
type reports struct {
	mu      sync.Mutex // guards all below
	running int
	over    chan struct{} // closed once no call runs after quiesce; nil before quiesce
}

// begin reports whether a call may begin. After true, the caller calls end.
func (r *reports) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over != nil {
		return false
	}
	r.running++
	return true
}

func (r *reports) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.running--; r.running == 0 && r.over != nil {
		close(r.over)
	}
}

func (r *reports) quiesce() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.over == nil {
		r.over = make(chan struct{})
		if r.running == 0 {
			close(r.over)
		}
	}
	return r.over
}

// Quiesce returns a channel that is closed when no call of Ended runs in the background any more.
// From the call of Quiesce on, no such call begins. Call Quiesce after Close, and after the last
// call of Publish, Flush and EndAll.
func (f *Fence[V]) Quiesce() <-chan struct{} { return f.reports.quiesce() }
