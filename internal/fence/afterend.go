package fence

import (
	"sync/atomic"
	"time"
)

// blockedAfter is how long one AfterEnd call may delay the others.
const blockedAfter = 10 * time.Millisecond

// runAfterEnd calls the AfterEnd of each binding, one after the other as long as no call blocks. A
// goroutine for each binding would be simpler. But when ten thousand goroutines become ready at the
// same moment, the rest of the process waits for a processor until all of these goroutines have
// run, and so does the caller of Revoke.
//
// A worker that is blocked for longer than blockedAfter starts two more workers, and they do the
// same. So a call that never returns delays the other calls once. If every call blocks, the number
// of active workers doubles every blockedAfter, and after a moment each binding has a goroutine.
// The last worker ends with the last call.
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
