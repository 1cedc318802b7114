package browsertest

import (
	"strings"
	"testing"

	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
)

// A tab notes each kind of fault: the other tests would fail.
func TestFaultsAreNoted(t *testing.T) {
	w := newWorld(t)
	p := open(t, startBrowser(t), w.base, true)
	p.at("Log in")
	const policy = "Content Security Policy"
	for script, fault := range map[string]string{
		`document.body.appendChild(document.createElement("script")).text = "1"`:  policy,
		`document.body.setAttribute("style", "color: red")`:                       policy,
		`document.body.append(Object.assign(new Image(), {src: "//127.0.0.2/"}))`: policy,
		`fetch("assets/missing")`:                 "status 404",
		`console.error("wrong")`:                  "console: ",
		`setTimeout(() => { throw new Error() })`: "exception: ",
	} {
		p.do(chromedp.Evaluate[chromedp.Void](script + "; undefined"))
		var noted []string
		require.Eventually(t, func() bool {
			noted = append(noted, p.takeFaults()...)
			return strings.Contains(strings.Join(noted, "\n"), fault)
		}, patience, tick, "%s: %q", script, noted)
	}
	p.visit("") // without what the scripts have left
	p.takeFaults()
}
