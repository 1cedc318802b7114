// Package chart draws horizontal bars as SVG, for documents that are read in light and in dark.
package chart

import (
	"cmp"
	"slices"
)

// Bars is a chart.
type Bars struct {
	Name  string // of its file, without .svg
	Title string
	Note  string // how to read it
	Log   bool   // bars grow with the logarithm of their values
	bars  []bar
}

type bar struct {
	label, text string
	value       float64
	ours        bool
}

// Add adds a bar: the label stands before it, and the text, which says the value, behind it. Ours is drawn in a colour of its
// own.
func (b *Bars) Add(label string, value float64, text string, ours bool) {
	b.bars = append(b.bars, bar{label, text, value, ours})
}

// Sort puts the bars in the order of their values, the shortest first or the longest.
func (b *Bars) Sort(longestFirst bool) {
	slices.SortStableFunc(b.bars, func(x, y bar) int {
		if longestFirst {
			x, y = y, x
		}
		return cmp.Compare(x.value, y.value)
	})
}
