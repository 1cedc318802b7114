// Package striped counts events of many concurrent goroutines.
//
// With a single counter, every core would fetch the cache line from the core that wrote the line
// last. Two goroutines on a single counter together do less than one goroutine alone.
//
// So each goroutine adds to one of many stripes. The address of the goroutine's stack selects the
// stripe, because no two stacks have the same address. The sum does not depend on the stripe. When
// a stack moves, the goroutine continues with another stripe.
package striped

import (
	"sync/atomic"
	"unsafe"
)

// bits is the logarithm of the number of stripes.
const bits = 6

// current returns the stripe of the calling goroutine. The compiler inlines current.
func current() uint64 {
	var here byte
	// Stacks begin at multiples of 2 KiB or more. The multiplication (Fibonacci hashing) spreads
	// the stacks over the stripes.
	stack := uint64(uintptr(unsafe.Pointer(&here))) >> 11
	return stack * 0x9e37_79b9_7f4a_7c15 >> (64 - bits)
}

// A Counter counts one kind of events. The zero Counter is ready for use. A Counter is safe for
// concurrent use.
type Counter struct {
	// A stripe fills all the memory that the processor fetches together.
	stripes [1 << bits]struct {
		n atomic.Uint64
		_ [120]byte
	}
}

// Add counts one event.
func (c *Counter) Add() { c.stripes[current()].n.Add(1) }

// Sum returns the number of events. Sum includes every Add that returned before Sum was called.
func (c *Counter) Sum() (n uint64) {
	for i := range c.stripes {
		n += c.stripes[i].n.Load()
	}
	return n
}

// Kinds is how many kinds of events Counters can count.
const Kinds = 32

// Counters count several kinds of events, from 0 to Kinds-1. The counters of a stripe share their
// memory, because one goroutine writes them. The zero Counters are ready for use. Counters are safe
// for concurrent use.
type Counters struct {
	stripes [1 << bits][Kinds]atomic.Uint64
}

// Add counts one event of a kind.
func (c *Counters) Add(kind int) { c.stripes[current()][kind].Add(1) }

// Sums returns the number of events of each kind, as Counter.Sum does.
func (c *Counters) Sums() (n [Kinds]uint64) {
	for i := range c.stripes {
		for kind := range n {
			n[kind] += c.stripes[i][kind].Load()
		}
	}
	return n
}
