package chart

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

// Lines is a chart of lines, with two logarithmic axes.
type Lines struct {
	Name  string // the name of the file, without .svg
	Title string
	Note  string               // how to read the chart
	X, Y  func(float64) string // the texts of the values at the axes
	lines []line
}

// A Point is a point of a line. Both coordinates must be positive.
type Point struct{ X, Y float64 }

type line struct {
	label  string
	ours   bool
	points []Point
}

// Add adds a line. The label is to the right of the last point. If ours is true, the line has
// another colour. A line without points is left out.
func (l *Lines) Add(label string, ours bool, points ...Point) {
	if len(points) > 0 {
		l.lines = append(l.lines, line{label, ours, points})
	}
}

// Head returns the name of the file and the title.
func (l *Lines) Head() (name, title string) { return l.Name, l.Title }

// The height of the plot, and the least distance between two labels, in pixels.
const (
	plotHeight = 320.0
	labelStep  = 17.0
)

// An axis maps the values between two powers of ten to pixels.
type axis struct {
	least, most float64 // exponents
	from, to    float64 // pixels
}

func newAxis(values []float64, from, to float64) axis {
	if len(values) == 0 {
		return axis{0, 1, from, to}
	}
	// The tolerance keeps a power of ten at the end of the axis.
	const tolerance = 1e-9
	least := math.Floor(math.Log10(slices.Min(values)) + tolerance)
	most := math.Ceil(math.Log10(slices.Max(values)) - tolerance)
	return axis{least, max(most, least+1), from, to}
}

func (a axis) at(v float64) float64 {
	return a.from + (math.Log10(v)-a.least)/(a.most-a.least)*(a.to-a.from)
}

// ticks returns the powers of ten.
func (a axis) ticks() (values []float64) {
	for e := a.least; e <= a.most; e++ {
		values = append(values, math.Pow(10, e))
	}
	return values
}

// SVG draws the chart.
func (l *Lines) SVG() string {
	var xs, ys []float64
	labels := 0.0
	for _, line := range l.lines {
		labels = max(labels, textWidth(line.label))
		for _, p := range line.points {
			xs, ys = append(xs, p.X), append(ys, p.Y)
		}
	}
	bottom := head + plotHeight
	y := newAxis(ys, bottom, head)
	left := margin
	for _, v := range y.ticks() {
		left = max(left, margin+textWidth(l.Y(v))+10)
	}
	x := newAxis(xs, left, width-margin-labels-16)

	var s strings.Builder
	begin(&s, l.Title, l.Note, bottom+margin+20)
	for _, v := range x.ticks() {
		fmt.Fprintf(&s, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`,
			x.at(v), head, x.at(v), bottom)
		fmt.Fprintf(&s, `<text class="note" x="%.1f" y="%.1f" text-anchor="middle">%s</text>`+"\n",
			x.at(v), bottom+20, html.EscapeString(l.X(v)))
	}
	for _, v := range y.ticks() {
		fmt.Fprintf(&s, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`,
			x.from, y.at(v), x.to, y.at(v))
		fmt.Fprintf(&s, `<text class="note" x="%.1f" y="%.1f" text-anchor="end">%s</text>`+"\n",
			x.from-10, y.at(v)+fontSize*0.36, html.EscapeString(l.Y(v)))
	}
	var last []float64 // the heights of the last points
	for _, line := range l.lines {
		last = append(last, y.at(line.points[len(line.points)-1].Y))
	}
	for i, at := range spreadOut(last, head, bottom) {
		line := l.lines[i]
		class, weight := "other", ""
		if line.ours {
			class, weight = "ours", ` class="bold"`
		}
		var path strings.Builder
		for _, p := range line.points {
			fmt.Fprintf(&path, "%.1f,%.1f ", x.at(p.X), y.at(p.Y))
		}
		fmt.Fprintf(&s, `<polyline class="%s line" points="%s"/>`,
			class, strings.TrimSpace(path.String()))
		for _, p := range line.points {
			fmt.Fprintf(&s, `<circle class="%s" cx="%.1f" cy="%.1f" r="3.5"/>`,
				class, x.at(p.X), y.at(p.Y))
		}
		end := x.at(line.points[len(line.points)-1].X)
		fmt.Fprintf(&s, `<line class="%s lead" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`,
			class, end, last[i], x.to+10, at)
		fmt.Fprintf(&s, `<text%s x="%.1f" y="%.1f">%s</text>`+"\n",
			weight, x.to+14, at+fontSize*0.36, html.EscapeString(line.label))
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// spreadOut moves heights apart, so that labels at these heights do not overlap. spreadOut keeps
// the order of the heights, and prefers heights between top and bottom.
func spreadOut(heights []float64, top, bottom float64) []float64 {
	order := make([]int, len(heights))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		if heights[a] < heights[b] {
			return -1
		}
		return 1
	})
	moved := slices.Clone(heights)
	for i, n := range order {
		if i == 0 {
			moved[n] = max(moved[n], top)
		} else {
			moved[n] = max(moved[n], moved[order[i-1]]+labelStep)
		}
	}
	limit := bottom
	for _, n := range slices.Backward(order) {
		moved[n] = min(moved[n], limit)
		limit = moved[n] - labelStep
	}
	return moved
}
