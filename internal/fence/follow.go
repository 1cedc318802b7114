package fence

import (
	"sync/atomic"
	"time"
)

// patience is how long one Follow holds up the others.
const patience = 10 * time.Millisecond

// follow calls the Follow of each binding, one after the other as long as they do not block. A goroutine for each would
// be simpler; but ten thousand that become ready at once are what everything else in the process then waits behind for a
// processor, the caller of a Revoke too.
//
// Whoever is held up calls in two to help, as do those. So one that does not come back delays the others once, and where
// all of them block, those at work double each time: after a moment it is as if each had its own goroutine. The last of
// them ends with the last call.
func follow[V any](all []*Binding[V]) {
	var next atomic.Int64
	var work func()
	work = func() {
		help := time.AfterFunc(patience, func() {
			go work()
			work()
		})
		defer help.Stop()
		for i := next.Add(1); i <= int64(len(all)); i = next.Add(1) {
			all[i-1].Follow()
			help.Reset(patience)
		}
	}
	work()
}
