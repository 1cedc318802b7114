package chart

import (
	"fmt"
	"html"
	"math"
	"strings"
	"unicode/utf8"
)

// The dimensions of a chart, in pixels. The width of a text is a generous estimate: in the common
// sans-serif fonts, a character is on average at most charWidth times the font size wide. So no
// label overlaps a bar.
const (
	width     = 860.0
	margin    = 24.0
	rowHeight = 30.0
	barHeight = 18.0
	head      = 74.0
	fontSize  = 13.0
	charWidth = 0.6
	least     = 4.0 // the length of the shortest bar
)

func textWidth(s string) float64 {
	return float64(utf8.RuneCountInString(s)) * fontSize * charWidth
}

// style contains the colours for light and dark mode. style also sets the background, so that the
// text is readable on every page.
const style = `
  .back { fill: #ffffff; stroke: #d0d7de; }
  text {
    fill: #1f2328;
    font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
  }
  .title { font-size: 17px; font-weight: 600; }
  .note { fill: #59636e; }
  .ours { fill: #0969da; }
  .other { fill: #afb8c1; }
  .line.line { fill: none; stroke-width: 2; }
  .ours.line, .ours.lead { stroke: #0969da; }
  .other.line, .other.lead { stroke: #afb8c1; }
  .lead { stroke-width: 1; stroke-dasharray: 2 2; }
  .grid { stroke: #d0d7de; stroke-width: 0.5; }
  .bold { font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117; stroke: #3d444d; }
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .ours { fill: #4493f8; }
    .other { fill: #656c76; }
    .ours.line, .ours.lead { stroke: #4493f8; }
    .other.line, .other.lead { stroke: #656c76; }
    .grid { stroke: #3d444d; }
  }
`

// SVG draws the chart.
func (b *Bars) SVG() string {
	labels, texts := 0.0, 0.0
	for _, bar := range b.bars {
		labels = max(labels, textWidth(bar.label))
		texts = max(texts, textWidth(bar.text))
	}
	left := margin + labels + 12
	room := width - left - 10 - texts - margin
	height := head + float64(len(b.bars))*rowHeight + margin - 10

	var s strings.Builder
	begin(&s, b.Title, b.Note, height)
	share := b.scale()
	for i, bar := range b.bars {
		y := head + float64(i)*rowHeight
		long := max(least, room*share(bar.value))
		class, weight := "other", ""
		if bar.ours {
			class, weight = "ours", ` class="bold"`
		}
		middle := y + barHeight/2 + fontSize*0.36
		fmt.Fprintf(&s, `<text%s x="%.1f" y="%.1f" text-anchor="end">%s</text>`,
			weight, left-12, middle, html.EscapeString(bar.label))
		fmt.Fprintf(&s, `<rect class="%s" x="%.1f" y="%.1f" width="%.1f" height="%.0f" rx="3"/>`,
			class, left, y, long, barHeight)
		fmt.Fprintf(&s, `<text%s x="%.1f" y="%.1f">%s</text>`+"\n",
			weight, left+long+8, middle, html.EscapeString(bar.text))
	}
	s.WriteString("</svg>\n")
	return s.String()
}

// begin writes what all charts begin with: the background, the title and the note.
func begin(s *strings.Builder, title, note string, height float64) {
	fmt.Fprintf(s, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" `+
		`viewBox="0 0 %.0f %.0f" role="img" aria-label="%s">`+"\n",
		width, height, width, height, html.EscapeString(title))
	fmt.Fprintf(s, "<style>%s</style>\n", style)
	fmt.Fprintf(s, `<rect class="back" x="0.5" y="0.5" width="%.0f" height="%.0f" rx="6"/>`+"\n",
		width-1, height-1)
	fmt.Fprintf(s, `<text class="title" x="%.0f" y="34">%s</text>`+"\n",
		margin, html.EscapeString(title))
	fmt.Fprintf(s, `<text class="note" x="%.0f" y="55">%s</text>`+"\n",
		margin, html.EscapeString(note))
}

// scale returns a function that maps a value to the length of its bar, as a share of the longest
// bar. On a logarithmic scale, the share counts the decades above a start value below the smallest
// value.
func (b *Bars) scale() func(float64) float64 {
	least, most := math.Inf(1), 0.0
	for _, bar := range b.bars {
		if bar.value > 0 {
			least, most = min(least, bar.value), max(most, bar.value)
		}
	}
	if most == 0 {
		return func(float64) float64 { return 0 }
	}
	if !b.Log {
		return func(v float64) float64 { return v / most }
	}
	from := math.Floor(math.Log10(least) - 0.2)
	decades := math.Log10(most) - from
	return func(v float64) float64 {
		if v <= 0 {
			return 0
		}
		return (math.Log10(v) - from) / decades
	}
}
