// Package striped counts events of many goroutines without a cache line that all cores write.
package striped

import (
	"sync/atomic"
	"unsafe"
)

// A Counter counts events of many concurrent goroutines. With a single counter, every core
// would fetch the cache line from the core that wrote the line last. Two goroutines on a single
// counter together do less than one goroutine alone.
//
// So each goroutine adds to one of many stripes. The address of the goroutine's stack selects the
// stripe, because no two stacks have the same address. The sum does not depend on the stripe. When
// a stack moves, the goroutine continues with another stripe.
//
// The zero Counter is ready for use, and a Counter is safe for concurrent use.
type Counter struct{ stripes [1 << bits]stripe }

const bits = 6

// A stripe fills all the memory that the processor fetches together.
type stripe struct {
	n atomic.Uint64
	_ [120]byte
}

// Add counts one event.
func (c *Counter) Add() {
	var here byte
	// Stacks begin at multiples of 2 KiB or more. The multiplication (Fibonacci hashing) spreads
	// the stacks over the stripes.
	stack := uint64(uintptr(unsafe.Pointer(&here))) >> 11
	c.stripes[stack*0x9e37_79b9_7f4a_7c15>>(64-bits)].n.Add(1)
}

// Sum returns the number of events. Sum includes every Add that returned before Sum was called.
func (c *Counter) Sum() (n uint64) {
	for i := range c.stripes {
		n += c.stripes[i].n.Load()
	}
	return n
}
