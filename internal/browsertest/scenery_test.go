package browsertest

import (
	"fmt"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// A scenery is a world with keys such as a service has, and the pages of its console.
type scenery struct {
	*world
	token string // of the operator
	pages []page
}

// A page is a page of the console. open leads a tab to the page.
type page struct {
	name string
	open func(p *tab)
}

func newScenery(t *testing.T) *scenery {
	t.Helper()
	w := newWorld(t)
	s := &scenery{world: w}
	_, s.token = w.create(keystore.Spec{
		Name: "Ada Lovelace", Owner: "operations", Scopes: []string{"keys:admin"}})
	owners := []string{"Acme Ltd", "Bergmann & Söhne", "Cyberdyne", "umbrella-research"}
	for i, name := range []string{"billing", "web shop", "nightly export", "mobile app (iOS)",
		"mobile app (Android)", "warehouse scanner 12", "load test"} {
		spec := keystore.Spec{Name: name, Owner: owners[i%len(owners)], Scopes: []string{
			"orders:read", "orders:write", "invoices:read", "stock:*"}[:1+i%4]}
		if i%3 == 1 {
			spec.ExpiresAt = time.Now().Add(time.Duration(3+i*20) * 24 * time.Hour)
		}
		w.create(spec)
	}
	require.NoError(t, w.store.Disable(t.Context(), s.id("load test"), "only during the tests"))
	require.NoError(t, w.store.Revoke(t.Context(), s.id("warehouse scanner 12"), "lost on the way"))
	_, busy := w.create(keystore.Spec{
		Name: "Zürich – Genève sync", Owner: "Bergmann & Söhne",
		Scopes:    []string{"orders:read", "stock:write"},
		Metadata:  map[string]string{"ticket": "OPS-4711", "environment": "production"},
		ExpiresAt: time.Now().Add(90 * 24 * time.Hour),
		RateLimit: keystore.RateLimit{PerSecond: 50, Burst: 100},
		Credits: &keystore.Credits{Remaining: 8_400,
			Refill: keystore.Refill{Amount: 10_000, MonthDay: 1}},
	})
	for range 2 {
		w.stream(busy)
	}
	for range 40 {
		_, err := w.store.Verify(t.Context(), busy)
		require.NoError(t, err)
	}
	for range 7 {
		_, err := w.store.Verify(t.Context(), busy[:len(busy)-1]+"!")
		require.Error(t, err)
	}
	key := "keys/" + s.id("Zürich – Genève sync")
	at := func(name, path, heading string) page {
		return page{name, func(p *tab) { p.visit(path); p.at(heading) }}
	}
	s.pages = []page{
		{"login", func(p *tab) { p.at("Log in") }},
		{"login-refused", func(p *tab) {
			p.refuse(403, func() {
				p.fill("API key", "oil_wrong")
				p.click("Log in")
				p.sees(`//*[@id="key-error"]`)
			})
		}},
		{"overview", func(p *tab) { p.logIn(s.token); s.counted(p) }},
		at("keys", "keys", "Keys"),
		at("keys-none", "keys?owner=nobody", "Keys"),
		at("key", key, "Zürich – Genève sync"),
		at("new", "keys/new", "New key"),
		{"new-refused", func(p *tab) {
			p.visit("keys/new")
			p.fill("Name", "reports")
			p.fill("Scopes", "reports:read\nreports::")
			p.do(chromedp.Click("//summary"))
			p.fill("Networks", "192.0.2.300/24")
			p.refuse(422, func() {
				p.click("Create the key")
				p.sees(`//*[@id="networks-error"]`)
			})
		}},
		{"secret", func(p *tab) {
			p.visit("keys/new")
			p.fill("Name", "reports")
			p.fill("Owner", "Acme Ltd")
			p.click("Create the key")
			p.at("New key reports")
			s.hide(p)
		}},
		at("edit", key+"/edit", "Edit the key"),
		at("credits", key+"/credits", "Credits of the key"),
		at("rotate", key+"/rotate", "Rotate the key"),
		at("disable", key+"/disable", "Disable the key"),
		at("revoke", key+"/revoke", "Revoke the key"),
		{"bulk", func(p *tab) {
			p.visit("keys?owner=Acme+Ltd")
			p.do(chromedp.Click(`//input[@aria-label="Select all keys of this page"]`))
			p.choose("With the selected keys", "Revoke")
			p.click("Continue…")
			p.sees(`//h1[starts-with(normalize-space(.), "Revoke ")]`)
		}},
		at("audit", "audit", "Audit"),
		at("backup", "backup", "Backup"),
		{"not-found", func(p *tab) {
			p.refuse(404, func() { p.visit("keys/nothing/here"); p.sees("//main//h1") })
		}},
	}
	return s
}

// id returns the ID of the key with a name.
func (s *scenery) id(name string) string {
	s.t.Helper()
	for key, err := range s.store.List(s.t.Context(), keystore.Query{Text: name}) {
		require.NoError(s.t, err)
		return key.ID
	}
	s.t.Fatalf("there is no key %q", name)
	return ""
}

// counted waits until the overview shows the numbers of keys.
func (s *scenery) counted(p *tab) {
	p.t.Helper()
	require.Eventually(p.t, func() bool {
		p.visit("")
		p.at("Overview")
		return get(p, chromedp.Evaluate[bool](
			`document.querySelector("a[href*='state=active']") != null`))
	}, patience, 200*time.Millisecond)
}

// hide replaces the secret on the page, which is the secret of no store, by an example.
func (s *scenery) hide(p *tab) {
	p.t.Helper()
	example := fmt.Sprintf("oil_%s_%s", "01k9x3v7q2f8hr6m5w0c4tzbnd",
		"EXAMPLEexampleEXAMPLEexampleEXAMPLEexampleEXAMPLEexampleEXAMPLEexa")
	p.do(chromedp.Evaluate[chromedp.Void](
		fmt.Sprintf(`document.getElementById("secret").textContent = %q`, example)))
}
