package fence

import (
	"sync/atomic"
	"unsafe"
)

// A stripedCounter counts what many goroutines do at once. One counter for all would be a cache line that every core fetches from
// the one that wrote it last: two that count in one get less done together than one does alone.
//
// So each goroutine counts in one of many stripes, which the address of its stack selects: no two stacks are in one
// place. Which stripe it is does not matter to the sum. A stack that moves goes on in another one.
type stripedCounter struct{ stripes [1 << counterBits]stripe }

const counterBits = 6

// A stripe has what the processor fetches at once to itself.
type stripe struct {
	n atomic.Uint64
	_ [120]byte
}

func (t *stripedCounter) add() {
	var here byte
	// Stacks begin at multiples of 2 KiB and more; the multiplication (Fibonacci hashing) spreads them.
	stack := uint64(uintptr(unsafe.Pointer(&here))) >> 11
	t.stripes[stack*0x9e37_79b9_7f4a_7c15>>(64-counterBits)].n.Add(1)
}

// sum counts every add that has returned.
func (t *stripedCounter) sum() (n uint64) {
	for i := range t.stripes {
		n += t.stripes[i].n.Load()
	}
	return n
}
