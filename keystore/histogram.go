package keystore

import (
	"sort"
	"sync/atomic"
	"time"
)

// A Histogram counts durations since the store was opened.
type Histogram struct {
	// Count is the number of durations, and Sum their sum.
	Count uint64
	Sum   time.Duration
	// AtMost has, for each of a fixed set of bounds from 1 ms to 10 s, the number of durations up
	// to the bound.
	AtMost map[time.Duration]uint64
}

// histogramBounds are the bounds of every Histogram. A write to a disk takes a few milliseconds,
// and Options.Timeout is 10 s.
var histogramBounds = [...]time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond,
	25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond,
	500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 5 * time.Second,
	10 * time.Second,
}

// A durations collects a Histogram. The zero durations is ready for use, and safe for concurrent
// use.
type durations struct {
	counts [len(histogramBounds) + 1]atomic.Uint64 // the last one is for longer durations
	sum    atomic.Int64
}

// since counts the duration since a moment.
func (d *durations) since(began time.Time) {
	took := time.Since(began)
	i := sort.Search(len(histogramBounds), func(i int) bool { return took <= histogramBounds[i] })
	d.counts[i].Add(1)
	d.sum.Add(int64(took))
}

// histogram returns the durations that were counted so far.
func (d *durations) histogram() Histogram {
	h := Histogram{
		Sum:    time.Duration(d.sum.Load()),
		AtMost: make(map[time.Duration]uint64, len(histogramBounds)),
	}
	for i, bound := range histogramBounds {
		h.Count += d.counts[i].Load()
		h.AtMost[bound] = h.Count
	}
	h.Count += d.counts[len(histogramBounds)].Load()
	return h
}
