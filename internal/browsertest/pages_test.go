package browsertest

import (
	"bytes"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

var screenshots = flag.String("screenshots", "", "the directory for new screenshots of every page")

// No page is wider than the window, from 320 pixels on, and axe-core finds nothing on any page, in
// light and in dark mode. With -screenshots, the test writes a picture of each page in each look.
func TestPages(t *testing.T) {
	var axe []byte
	if path := os.Getenv("AXE"); path != "" {
		var err error
		axe, err = os.ReadFile(path)
		require.NoError(t, err)
	}
	browser := startBrowser(t)
	s := newScenery(t)
	p := open(t, browser, s.base, true)
	for _, page := range s.pages {
		p.look(looks[0])
		page.open(p)
		p.do(chromedp.Evaluate[chromedp.Void](string(axe))) // a debugger may do what no page may
		for _, l := range looks {
			p.look(l)
			require.Empty(t, get(p, chromedp.Evaluate[[]string](tooWide)),
				"%s, %s: the page is wider than the window", page.name, l)
			if axe != nil {
				for _, fault := range p.axe() {
					t.Errorf("%s, %s: %s", page.name, l, fault)
				}
			}
			if *screenshots != "" && l.width > narrowest {
				name := fmt.Sprintf("%s-%s.png", page.name, l)
				picture := small(t, get(p, chromedp.FullScreenshot(100)))
				require.NoError(t, os.WriteFile(filepath.Join(*screenshots, name), picture, 0o644))
			}
		}
	}
	if axe == nil {
		t.Skip("NOT RUN: the checks of axe-core, which is not there: npm pack axe-core@4.14.1, unpack " +
			"it, and set AXE to the path of axe.min.js")
	}
	// axe-core does find something where there is something.
	p.do(chromedp.Evaluate[chromedp.Void](`document.documentElement.removeAttribute("lang");
		document.querySelector("main h1").style.color = "#bbb"`))
	require.Len(t, p.axe(), 2)
}

// axe returns what axe-core finds on the page.
func (p *tab) axe() (faults []string) {
	p.t.Helper()
	var violations []struct {
		ID, Help string
		Nodes    []struct{ HTML, FailureSummary string }
	}
	found := get(p, chromedp.Evaluate[string](`axe.run({resultTypes: ["violations"]})
		.then((result) => JSON.stringify(result.violations))`, chromedp.EvalAwaitPromise))
	require.NoError(p.t, json.Unmarshal([]byte(found), &violations))
	for _, v := range violations {
		for _, n := range v.Nodes {
			faults = append(faults, fmt.Sprintf("%s: %s\n\t%s\n\t%s", v.ID, v.Help, n.HTML,
				strings.ReplaceAll(n.FailureSummary, "\n", "\n\t")))
		}
	}
	return faults
}

// A look is how a user sees a page.
type look struct {
	dark  bool
	width int64
}

const narrowest = 320 // pixels

var looks = []look{{false, 1280}, {true, 1280}, {false, 360}, {true, 360}, {false, narrowest}}

func (l look) scheme() string {
	if l.dark {
		return "dark"
	}
	return "light"
}

func (l look) String() string { return fmt.Sprintf("%s-%d", l.scheme(), l.width) }

// look shows the page with another look.
func (p *tab) look(l look) {
	p.t.Helper()
	call(p, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{
			{Name: "prefers-color-scheme", Value: l.scheme()},
			{Name: "prefers-reduced-motion", Value: "reduce"},
		}})
	p.do(chromedp.EmulateViewport(l.width, 800))
}

// tooWide has the elements that reach out of the window, if the page is wider than the window.
const tooWide = `document.documentElement.scrollWidth <= innerWidth ? [] :
	[...document.querySelectorAll("main *")]
		.filter((e) => e.getBoundingClientRect().right > innerWidth)
		.map((e) => e.outerHTML.slice(0, 100))`

// small returns a picture with few colors: those of surfaces, and the most frequent of the others
// that differ from each other.
func small(t *testing.T, picture []byte) []byte {
	t.Helper()
	full, err := png.Decode(bytes.NewReader(picture))
	require.NoError(t, err)
	count := make(map[color.RGBA]int)
	for y := range full.Bounds().Dy() {
		for x := range full.Bounds().Dx() {
			count[color.RGBAModel.Convert(full.At(x, y)).(color.RGBA)]++
		}
	}
	byCount := slices.SortedFunc(maps.Keys(count), func(a, b color.RGBA) int {
		return cmp.Or(count[b]-count[a], cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)))
	})
	var palette color.Palette
	for _, c := range byCount {
		const colors, difference = 64, 24
		if len(palette) == colors {
			break
		}
		area := full.Bounds().Dx() * full.Bounds().Dy()
		if count[c] > area/500 || apart(c, palette.Convert(c).(color.RGBA)) > difference {
			palette = append(palette, c)
		}
	}
	few := image.NewPaletted(full.Bounds(), palette)
	draw.Draw(few, few.Bounds(), full, image.Point{}, draw.Src)
	var out bytes.Buffer
	require.NoError(t, (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, few))
	return out.Bytes()
}

// apart returns how far two colors are apart.
func apart(a, b color.RGBA) int {
	return max(int(a.R), int(b.R)) - min(int(a.R), int(b.R)) +
		max(int(a.G), int(b.G)) - min(int(a.G), int(b.G)) +
		max(int(a.B), int(b.B)) - min(int(a.B), int(b.B))
}
