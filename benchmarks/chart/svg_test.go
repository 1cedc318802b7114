package chart_test

import (
	"encoding/xml"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/benchmarks/chart"
)

type drawing struct {
	Width float64 `xml:"width,attr"`
	Texts []struct {
		X      float64 `xml:"x,attr"`
		Anchor string  `xml:"text-anchor,attr"`
		Text   string  `xml:",chardata"`
	} `xml:"text"`
	Rects []struct {
		Class string  `xml:"class,attr"`
		X     float64 `xml:"x,attr"`
		Width float64 `xml:"width,attr"`
	} `xml:"rect"`
}

func draw(t *testing.T, b chart.Bars) drawing {
	t.Helper()
	var d drawing
	require.NoError(t, xml.Unmarshal([]byte(b.SVG()), &d))
	return d
}

// Labels end before their bars, values begin after their bars, and nothing extends beyond the
// drawing. This also holds for long labels, and for values that differ by many decades.
func TestNothingOverlaps(t *testing.T) {
	for _, log := range []bool{false, true} {
		b := chart.Bars{Title: "A < B & C", Note: "less is better", Log: log}
		b.Add("a label that is as long as any label of a real chart is", 0.001, "0.001", true)
		b.Add("b", 0, "0", false)
		b.Add("c", 12345, "12,345 calls a second", false)
		d := draw(t, b)
		require.Len(t, d.Rects, 4)
		require.Len(t, d.Texts, 8)
		require.Equal(t, "A < B & C", d.Texts[0].Text)
		for i, bar := range d.Rects[1:] {
			label, value := d.Texts[2+2*i], d.Texts[3+2*i]
			require.Equal(t, "end", label.Anchor)
			require.Less(t, label.X, bar.X)
			require.Greater(t, label.X, 7.0*float64(len(label.Text)), "the label begins inside the drawing")
			require.Greater(t, value.X, bar.X+bar.Width)
			require.Less(t, value.X+7*float64(len(value.Text)), d.Width)
			require.Positive(t, bar.Width)
		}
		require.Equal(t, "ours", d.Rects[1].Class)
		require.Equal(t, "other", d.Rects[2].Class)
		require.Greater(t, d.Rects[3].Width, d.Rects[1].Width)
	}
}

// The length of a bar is proportional to its value. With Log, equal factors give equal differences
// of length.
func TestScale(t *testing.T) {
	for _, log := range []bool{false, true} {
		b := chart.Bars{Log: log}
		for _, v := range []float64{10, 100, 1000} {
			b.Add(strconv.Itoa(int(v)), v, "", false)
		}
		r := draw(t, b).Rects[1:]
		if log {
			require.InDelta(t, r[1].Width-r[0].Width, r[2].Width-r[1].Width, 0.2)
		} else {
			require.InDelta(t, 10, r[2].Width/r[1].Width, 0.1)
		}
	}
	require.Len(t, draw(t, chart.Bars{}).Rects, 1, "an empty chart has a background")
}

func TestSort(t *testing.T) {
	var b chart.Bars
	for _, v := range []float64{2, 3, 1} {
		b.Add(strconv.Itoa(int(v)), v, "", false)
	}
	order := func() (labels string) {
		for i, text := range draw(t, b).Texts[2:] {
			if i%2 == 0 {
				labels += text.Text
			}
		}
		return labels
	}
	require.Equal(t, "231", order())
	b.Sort(false)
	require.Equal(t, "123", order())
	b.Sort(true)
	require.Equal(t, "321", order())
}

// The lines have logarithmic axes, and the labels of lines with equal values do not overlap.
func TestLines(t *testing.T) {
	text := func(v float64) string { return strconv.FormatFloat(v, 'f', -1, 64) }
	l := chart.Lines{Name: "it", Title: "A < B", X: text, Y: text}
	for _, label := range []string{"a long label of a line", "b", "c"} {
		l.Add(label, label == "b", chart.Point{X: 1000, Y: 20}, chart.Point{X: 100_000, Y: 2000})
	}
	l.Add("no points", false)
	var d struct {
		Width, Height float64 `xml:",attr"`
		Texts         []struct {
			X     float64 `xml:"x,attr"`
			Y     float64 `xml:"y,attr"`
			Class string  `xml:"class,attr"`
			Text  string  `xml:",chardata"`
		} `xml:"text"`
		Circles []struct {
			X float64 `xml:"cx,attr"`
			Y float64 `xml:"cy,attr"`
		} `xml:"circle"`
		Lines []struct {
			Class  string `xml:"class,attr"`
			Points string `xml:"points,attr"`
		} `xml:"polyline"`
	}
	require.NoError(t, xml.Unmarshal([]byte(l.SVG()), &d))
	require.Len(t, d.Lines, 3)
	require.Equal(t, "ours line", d.Lines[1].Class)
	require.Len(t, d.Circles, 6)
	var heights []float64
	for _, text := range d.Texts {
		if strings.Contains(text.Text, "label") || len(text.Text) == 1 && text.Text > "9" {
			heights = append(heights, text.Y)
			require.Greater(t, text.X, d.Circles[1].X)
		}
	}
	require.Len(t, heights, 3)
	require.GreaterOrEqual(t, heights[1]-heights[0], 13.0)
	require.GreaterOrEqual(t, heights[2]-heights[1], 13.0)
	for _, want := range []string{"1000", "10000", "100000", "10", "100"} {
		require.Contains(t, l.SVG(), ">"+want+"</text>")
	}
	name, title := l.Head()
	require.Equal(t, "it", name)
	require.Equal(t, "A < B", title)
	empty := chart.Lines{X: text, Y: text}
	require.Contains(t, empty.SVG(), "<svg")
}
