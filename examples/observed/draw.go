package main

import (
	"fmt"
	"html"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// The dimensions in pixels: of a column and a row of the dashboard's grid of 24 columns, and of the
// parts of a panel.
const (
	column    = 54.0
	rowHeight = 30.0
	gap       = 5.0
	charWidth = 6.3 // a generous estimate for a text of 11 pixels
)

var colours = []string{"#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#0a7d91",
	"#6e7781", "#bc4c00", "#57606a"}

const style = `
  .back { fill: #f6f8fa; }
  .panel { fill: #ffffff; stroke: #d0d7de; }
  text { fill: #1f2328; font: 11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
  .title { font-size: 12px; font-weight: 600; }
  .row { font-size: 14px; font-weight: 600; }
  .note { fill: #59636e; }
  .grid { stroke: #d0d7de; stroke-width: 0.5; }
  .mark { stroke: #cf222e; stroke-width: 1; stroke-dasharray: 3 3; }
  polyline { fill: none; stroke-width: 1.6; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #010409; }
    .panel { fill: #0d1117; stroke: #3d444d; }
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .grid { stroke: #3d444d; }
    polyline, .key { filter: brightness(1.5); }
  }
`

// draw returns an SVG of all panels, laid out as on the dashboard. Every panel marks the moment
// mark.
func draw(panels []*panel, from, to, mark time.Time) string {
	bottom := 0
	for _, p := range panels {
		bottom = max(bottom, p.GridPos.Y+p.GridPos.H)
	}
	width, height := 24*column+2*gap, float64(bottom)*rowHeight+2*gap
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" `+
		`viewBox="0 0 %.0f %.0f" role="img" aria-label="Panels of the dashboard">`+"\n",
		width, height, width, height)
	fmt.Fprintf(&s, "<style>%s</style>\n", style)
	fmt.Fprintf(&s, `<rect class="back" width="%.0f" height="%.0f"/>`+"\n", width, height)
	for _, p := range panels {
		x, y := gap+float64(p.GridPos.X)*column, gap+float64(p.GridPos.Y)*rowHeight
		if p.Type == "row" {
			fmt.Fprintf(&s, `<text class="row" x="%.1f" y="%.1f">%s</text>`+"\n", x+gap, y+20,
				html.EscapeString(p.Title))
			continue
		}
		p.draw(&s, x, y, from, to, mark)
	}
	s.WriteString("</svg>\n")
	return s.String()
}

func (p *panel) draw(s *strings.Builder, x, y float64, from, to, mark time.Time) {
	w, h := float64(p.GridPos.W)*column-gap, float64(p.GridPos.H)*rowHeight-gap
	fmt.Fprintf(s, `<rect class="panel" x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="4"/>`,
		x, y, w, h)
	fmt.Fprintf(s, `<text class="title" x="%.1f" y="%.1f">%s</text>`+"\n", x+10, y+18,
		html.EscapeString(p.Title))
	legend := p.legend(w - 20)
	left, right := x+56, x+w-12
	top, bottom := y+30, y+h-28-15*float64(len(legend))

	most := 0.0
	for _, l := range p.lines {
		for _, point := range l.points {
			if !math.IsNaN(point.value) && !math.IsInf(point.value, 0) {
				most = max(most, point.value)
			}
		}
	}
	most = niceMax(most)
	atX := func(t time.Time) float64 {
		return left + (right-left)*float64(t.Sub(from))/float64(to.Sub(from))
	}
	atY := func(v float64) float64 { return bottom - (bottom-top)*v/most }
	for i := range 3 {
		v := most * float64(i) / 2
		fmt.Fprintf(s, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`,
			left, atY(v), right, atY(v))
		fmt.Fprintf(s, `<text class="note" x="%.1f" y="%.1f" text-anchor="end">%s</text>`,
			left-6, atY(v)+4, format(v, p.FieldConfig.Defaults.Unit))
	}
	total := to.Sub(from)
	for i := range 4 {
		at := from.Add(total * time.Duration(i) / 3)
		fmt.Fprintf(s, `<text class="note" x="%.1f" y="%.1f" text-anchor="middle">%.0f s</text>`,
			min(atX(at), right-8), bottom+15, at.Sub(from).Seconds())
	}
	fmt.Fprintf(s, `<line class="mark" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`+"\n",
		atX(mark), top, atX(mark), bottom)
	for i, l := range p.lines {
		var path strings.Builder
		for _, point := range l.points {
			if !math.IsNaN(point.value) && !math.IsInf(point.value, 0) {
				fmt.Fprintf(&path, "%.1f,%.1f ", atX(point.at), atY(point.value))
			}
		}
		fmt.Fprintf(s, `<polyline style="stroke: %s" points="%s"/>`+"\n",
			colours[i%len(colours)], strings.TrimSpace(path.String()))
	}
	if len(p.lines) == 0 {
		fmt.Fprintf(s, `<text class="note" x="%.1f" y="%.1f" text-anchor="middle">no data</text>`,
			(left+right)/2, (top+bottom)/2)
	}
	for row, entries := range legend {
		at := x + 10
		for _, i := range entries {
			text := p.lines[i].legend
			entryY := bottom + 34 + 15*float64(row)
			fmt.Fprintf(s, `<rect class="key" x="%.1f" y="%.1f" width="9" height="3" fill="%s"/>`,
				at, entryY-5, colours[i%len(colours)])
			fmt.Fprintf(s, `<text x="%.1f" y="%.1f">%s</text>`+"\n", at+13, entryY,
				html.EscapeString(text))
			at += legendWidth(text)
		}
	}
}

// legend divides the lines into rows that fit into a width.
func (p *panel) legend(width float64) (rows [][]int) {
	used := width + 1
	for i, l := range p.lines {
		if used += legendWidth(l.legend); used > width {
			rows, used = append(rows, nil), legendWidth(l.legend)
		}
		rows[len(rows)-1] = append(rows[len(rows)-1], i)
	}
	return rows
}

func legendWidth(text string) float64 {
	return 24 + charWidth*float64(utf8.RuneCountInString(text))
}

// niceMax returns the end of an axis that shows values up to most.
func niceMax(most float64) float64 {
	if most <= 0 {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(most)))
	for _, f := range []float64{1, 2, 4, 6, 10} {
		if most <= f*power*(1+1e-9) {
			return f * power
		}
	}
	return 10 * power
}

// format returns a value with its unit, as Grafana names units.
func format(v float64, unit string) string {
	switch {
	case unit == "percentunit":
		return fmt.Sprintf("%.0f %%", v*100)
	case unit == "s" && v > 0 && v < 1:
		return number(v*1000) + " ms"
	case unit == "s":
		return number(v) + " s"
	case unit == "ops":
		return number(v) + "/s"
	case v >= 1e6:
		return number(v/1e6) + " M"
	default:
		return number(v)
	}
}

func number(v float64) string { return strconv.FormatFloat(v, 'g', 4, 64) }
