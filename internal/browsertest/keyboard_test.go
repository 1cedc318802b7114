package browsertest

import (
	"fmt"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// The walk by keyboard alone: whatever has the focus shows it.
func TestKeyboard(t *testing.T) {
	browser := startBrowser(t)
	w := newWorld(t)
	_, token := w.create(keystore.Spec{Name: "Ada", Scopes: []string{"keys:admin"}})
	key, _ := w.create(keystore.Spec{Name: "printer", Owner: "corp"})
	p := open(t, browser, w.base, true)

	p.at("Log in")
	p.hasFocus("API key")
	p.types(token + kb.Enter)
	p.at("Overview")
	p.tabTo("Skip to the content")
	p.types(kb.Enter)
	p.tabTo("New key") // the first link of the content
	p.types(kb.Enter)
	p.at("New key")
	p.tabTo("Name")
	p.types("billing")
	p.tabTo("Owner")
	p.types("acme")
	p.tabTo("Create the key")
	p.types(kb.Enter)
	p.at("New key billing")
	p.tabTo("Copy the key")
	p.types(" ")
	p.tabTo("I have saved the key")
	p.types(kb.Enter)
	p.at("billing")
	p.tabTo("Revoke")
	p.types(kb.Enter)
	p.at("Revoke the key")
	p.tabTo("Reason")
	p.types("leaked" + kb.Enter) // as in every form
	p.at("billing")
	require.Equal(t, 1, w.count(keystore.StatusRevoked))

	p.tabTo("Keys")
	p.types(kb.Enter)
	p.at("Keys")
	p.tabTo("Owner")
	p.types("corp" + kb.Enter)
	p.sees(`//table[count(tbody/tr)=1]`)
	p.tabTo("Select all keys of this page")
	p.types(" ")
	p.tabTo("With the selected keys")
	p.types("Disable")
	p.tabTo("Continue…")
	p.types(kb.Enter)
	p.at("Disable 1 key")
	p.tabTo("Disable 1 key")
	p.types(kb.Enter)
	p.at("Keys")
	disabled, err := w.store.Get(t.Context(), key.ID)
	require.NoError(t, err)
	require.Equal(t, keystore.StatusDisabled, disabled.Status())

	p.tabTo("Log out")
	p.types(kb.Enter)
	p.at("Log in")
}

// types presses keys.
func (p *tab) types(keys string) {
	p.t.Helper()
	p.do(chromedp.KeyEvent(keys))
}

// hasFocus waits until the element with a name has the focus. The browser moves the focus after it
// has shown the page.
func (p *tab) hasFocus(name string) {
	p.t.Helper()
	var last string
	for limit := time.Now().Add(patience); time.Now().Before(limit); time.Sleep(tick) {
		if last = get(p, chromedp.Evaluate[focus](focused)).Name; last == name {
			return
		}
	}
	p.t.Fatalf("the focus is on %q, and not on %q", last, name)
}

// tabTo presses the tabulator until the element with a name has the focus. Every element on the way
// shows the focus.
func (p *tab) tabTo(name string) {
	p.t.Helper()
	const most = 80
	var passed []string
	for range most {
		p.types(kb.Tab)
		f := get(p, chromedp.Evaluate[focus](focused))
		if f.Name == name {
			return
		}
		passed = append(passed, f.Name)
		if f.Element != "BODY" && !f.Visible {
			p.t.Fatalf("the focus on %s %q does not show", f.Element, f.Name)
		}
	}
	p.t.Fatalf("the tabulator does not come to %q, but to %q", name, passed)
}

type focus struct {
	Element, Name string
	Visible       bool
}

// focused is the element with the focus, with the name that a screen reader would say.
const focused = `(() => {
	const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
	const words = (node) => [...node.childNodes].filter((n) => !n.classList?.contains("optional"))
		.map((n) => n.textContent).join("");
	const name = e.getAttribute("aria-label") ||
		(e.labels?.length ? words(e.labels[0]) : e.textContent);
	return {
		Element: e.tagName, Name: name.trim().replace(/\s+/g, " "),
		Visible: style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0 &&
			box.width > 0 && box.height > 0 && box.left >= 0 && box.right <= innerWidth,
	};
})()`

// count returns the number of keys with a status.
func (w *world) count(s keystore.Status) int {
	w.t.Helper()
	n, err := w.store.Count(w.t.Context(), keystore.Query{Status: s})
	require.NoError(w.t, err, fmt.Sprint(s))
	return n
}
