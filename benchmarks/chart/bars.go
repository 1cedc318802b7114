// Package chart draws charts of horizontal bars and charts of lines as SVG. The charts are readable
// in light and dark mode.
package chart

import (
	"cmp"
	"slices"
)

// A Chart is a chart of any kind.
type Chart interface {
	// Head returns the name of the file, without .svg, and the title.
	Head() (name, title string)
	// SVG draws the chart.
	SVG() string
}

// Bars is a chart of horizontal bars.
type Bars struct {
	Name  string // the name of the file, without .svg
	Title string
	Note  string // how to read the chart
	Log   bool   // whether the scale is logarithmic
	bars  []bar
}

type bar struct {
	label, text string
	value       float64
	ours        bool
}

// Add adds a bar. The label is to the left of the bar, and text, which contains the value, is to
// the right. If ours is true, the bar has another colour.
func (b *Bars) Add(label string, value float64, text string, ours bool) {
	b.bars = append(b.bars, bar{label, text, value, ours})
}

// Sort sorts the bars by value, with the shortest or the longest bar first.
func (b *Bars) Sort(longestFirst bool) {
	slices.SortStableFunc(b.bars, func(x, y bar) int {
		if longestFirst {
			x, y = y, x
		}
		return cmp.Compare(x.value, y.value)
	})
}

// Head returns the name of the file and the title.
func (b *Bars) Head() (name, title string) { return b.Name, b.Title }
