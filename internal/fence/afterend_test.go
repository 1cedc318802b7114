package fence

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Of the bindings that one call ends, all have ended and been released when the first is to do more, and End does not wait
// for what follows.
func TestAllEndBeforeAnyCallback(t *testing.T) {
	const bindings = 100
	for name, end := range map[string]func(f *Fence[value]){
		"End":    func(f *Fence[value]) { f.Begin(id(1)); f.End(id(1), val(1, newValue)) },
		"Notify": func(f *Fence[value]) { f.Notify(id(1), val(1, newValue)) },
		"Cut":    func(f *Fence[value]) { f.Cut(id(1), nil) },
		"Close":  func(f *Fence[value]) { f.Close(nil) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFence(4)
			load(f, 1, oldValue)
			ended, reported := 0, 0
			returned := make(chan struct{})
			var followed sync.WaitGroup
			followed.Add(bindings)
			for range bindings {
				f.Get(id(1), &Binding[value]{
					Changed: func(*value) bool { ended++; return true },
					Cut:     func(error) { ended++ },
					Ended: func() {
						require.Equal(t, bindings, ended)
						require.Zero(t, f.Stats().Bound)
						reported++
					},
					AfterEnd: func() {
						<-returned
						followed.Done()
					},
				})
			}
			end(f)
			require.Equal(t, bindings, reported)
			close(returned)
			followed.Wait()
		})
	}
}

// What follows and does not come back holds up the others once, wherever in the line it is. If all of it blocks, all of it
// is soon under way.
func TestAfterEndThatBlocks(t *testing.T) {
	const all = 1000
	for name, tt := range map[string]struct {
		blocks func(i int) bool
		within time.Duration
	}{
		"none":      {func(int) bool { return false }, 0},
		"the first": {func(i int) bool { return i == 0 }, blockedAfter},
		"some":      {func(i int) bool { return i%100 == 0 }, 10 * blockedAfter},
		"all":       {func(int) bool { return true }, 9 * blockedAfter}, // 1+2+4+…+2^9 > 1000
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				release := make(chan struct{})
				var begun, finished sync.WaitGroup
				var bindings []*Binding[value]
				for i := range all {
					begun.Add(1)
					finished.Add(1)
					bindings = append(bindings, &Binding[value]{AfterEnd: func() {
						begun.Done()
						if tt.blocks(i) {
							<-release
						}
						finished.Done()
					}})
				}
				start := time.Now()
				go runAfterEnd(bindings)
				begun.Wait()
				require.LessOrEqual(t, time.Since(start), tt.within)
				close(release)
				finished.Wait()
			}) // which also waits until every goroutine has ended
		})
	}
}

// Followers that are slow, and none slower than blockedAfter, are called one after the other.
func TestAfterEndThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var bindings []*Binding[value]
		under, calls := 0, 0
		for range 100 {
			bindings = append(bindings, &Binding[value]{AfterEnd: func() {
				under++
				require.Equal(t, 1, under)
				time.Sleep(blockedAfter - time.Nanosecond)
				under--
				calls++
			}})
		}
		runAfterEnd(bindings)
		require.Equal(t, 100, calls)
	})
}
