package fence

import (
	"sync/atomic"
	"time"
)

// blockedAfter is how long one AfterEnd holds up the others.
const blockedAfter = 10 * time.Millisecond

// runAfterEnd calls the AfterEnd of each binding, one after the other as long as they do not block. A goroutine for each would
// be simpler; but ten thousand that become ready at once are what everything else in the process then waits behind for a
// processor, the caller of a Revoke too.
//
// Whoever is held up calls in two to help, as do those. So one that does not come back delays the others once, and where
// all of them block, those at work double each time: after a moment it is as if each had its own goroutine. The last of
// them ends with the last call.
func runAfterEnd[V any](all []*Binding[V]) {
	var next atomic.Int64
	var work func()
	work = func() {
		help := time.AfterFunc(blockedAfter, func() {
			go work()
			work()
		})
		defer help.Stop()
		for i := next.Add(1); i <= int64(len(all)); i = next.Add(1) {
			all[i-1].AfterEnd()
			help.Reset(blockedAfter)
		}
	}
	work()
}
