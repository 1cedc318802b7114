package fence

import (
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// When one call ends many bindings, the first Ended callback runs only after all of them have ended
// and have been released. The call does not wait for AfterEnd.
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

// A change of another process notifies in a goroutine of the fence. An Ended that ends the
// goroutine does not keep the contexts from being cancelled.
func TestEndedThatEndsItsGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFence(4)
		load(f, 1, oldValue)
		followed := false
		f.Get(id(1), &Binding[value]{
			Changed:  func(*value) bool { return true },
			Ended:    runtime.Goexit,
			AfterEnd: func() { followed = true },
		})
		f.Publish(id(1), just(val(1, newValue)), nil)
		synctest.Wait()
		require.True(t, followed)
	})
}

// An AfterEnd call that blocks delays the other calls once, wherever it is in the list. If every
// call blocks, every call has started after a short time.
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
			}) // synctest.Test also waits until every goroutine has ended
		})
	}
}

// AfterEnd calls that take less than blockedAfter run one after the other.
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
