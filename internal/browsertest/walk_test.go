package browsertest

import (
	"fmt"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/browser"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/grpc-api-key/grpc-api-key/keystore"
)

// An operator makes a key, sees the key in use, revokes the key, whose stream ends, finds the
// revocation in the audit, disables the keys of an owner, and logs out. Without scripts, everything
// is the same, except for what the scripts add.
func TestWalk(t *testing.T) {
	browser := startBrowser(t)
	for name, scripts := range map[string]bool{"scripts": true, "no scripts": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			operator, token := w.create(keystore.Spec{Name: "Ada", Scopes: []string{"keys:admin"}})
			for i := range 3 {
				w.create(keystore.Spec{Name: fmt.Sprintf("printer %d", i+1), Owner: "corp"})
			}
			w.create(keystore.Spec{Name: "other", Owner: "beta"})
			p := open(t, browser, w.base, scripts)

			p.at("Log in")
			p.refuse(403, func() {
				p.fill("API key", token[:len(token)-1])
				p.click("Log in")
				p.sees(`//*[@id="key-error"]`)
			})
			p.logIn(token)

			var tail *tab
			if scripts {
				tail = open(t, browser, w.base, true)
				tail.logIn(token)
				tail.click("Audit")
				tail.sees(`//*[@data-tail-state and .="connected"]`)
			}

			p.click("Keys")
			p.click("New key")
			p.at("New key")
			p.fill("Name", "billing")
			p.fill("Owner", "acme")
			p.fill("Scopes", "orders read") // two scopes
			p.click("Create the key")
			p.at("New key billing")
			secret := p.text("secret")
			if scripts {
				require.Equal(t, secret, p.copied("Copy the key"))
			}
			key, err := w.store.Verify(t.Context(), secret)
			require.NoError(t, err)
			require.Equal(t, []string{"orders", "read"}, key.Scopes())

			p.click("I have saved the key")
			p.at("billing")
			p.click("Credits")
			p.at("Credits of the key")
			p.fill("Credits", "100")
			p.click("Set the credits")
			p.at("billing")
			require.Equal(t, "100 left, not filled up", p.fact("Credits"))
			p.click("Credits")
			p.at("Credits of the key")
			p.fill("Credits to add", "-40")
			p.click("Add the credits")
			p.at("billing")
			require.Equal(t, "60 left, not filled up", p.fact("Credits"))

			end := w.stream(secret)
			p.visit("keys/" + key.ID)
			p.at("billing")
			require.Equal(t, "59 left, not filled up", p.fact("Credits"))
			require.Equal(t, "1", p.fact("Live streams"))
			require.Regexp(t, "^(just now|[0-9]+ (second|minute)s? ago)$", p.fact("Last used"))
			require.NotContains(t, p.html(), secret)

			p.click("Revoke")
			p.at("Revoke the key")
			p.reads("1 live stream will end.")
			p.fill("Reason", "found in a public repository")
			p.click("Revoke the key")
			p.sees(`//*[@role="status" and contains(., "1 live stream ended")]`)
			require.Equal(t, codes.Unauthenticated, status.Code(end()))
			_, err = w.store.Verify(t.Context(), secret)
			require.ErrorIs(t, err, keystore.ErrRevoked)

			p.click("Audit")
			p.at("Audit")
			revocation := fmt.Sprintf(`//tr[td[normalize-space(.)="revoke"] and `+
				`td[normalize-space(.)="billing"] and td[normalize-space(.)="console:key:%s"] and `+
				`td[normalize-space(.)="found in a public repository"]]`, operator.ID)
			p.sees(revocation)
			if scripts {
				tail.sees(revocation) // without a reload
			}

			p.click("Keys")
			p.fill("Owner", "corp")
			p.click("Filter")
			p.sees(`//table[count(tbody/tr)=3]`)
			if scripts {
				p.do(chromedp.Click(`//input[@aria-label="Select all keys of this page"]`))
			} else {
				for i := range 3 {
					p.do(chromedp.Click(fmt.Sprintf(`//tbody/tr[%d]//input`, i+1)))
				}
			}
			p.choose("With the selected keys", "Disable")
			p.click("Continue…")
			p.at("Disable 3 keys")
			p.fill("Reason", "the contract has ended")
			p.click("Disable 3 keys")
			p.sees(`//*[@role="status" and contains(., "3 keys")]`)
			n, err := w.store.Count(t.Context(),
				keystore.Query{Owner: "corp", Status: keystore.StatusDisabled})
			require.NoError(t, err)
			require.Equal(t, 3, n)

			p.click("Log out")
			p.at("Log in")
			p.visit("keys")
			p.at("Log in")
		})
	}
}

// When the key of an operator is revoked, the open page gives way to the login by itself. Without
// scripts, the next click leads to the login.
func TestRevokedOperator(t *testing.T) {
	browser := startBrowser(t)
	for name, scripts := range map[string]bool{"scripts": true, "no scripts": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			operator, token := w.create(keystore.Spec{Name: "Ada", Scopes: []string{"keys:read"}})
			p := open(t, browser, w.base, scripts)
			p.logIn(token)
			require.NoError(t, w.store.Revoke(t.Context(), operator.ID, "she has left"))
			if !scripts {
				p.click("Keys")
			}
			p.at("Log in")
			p.reads("Your login has ended.")
		})
	}
}

// logIn logs in with a key.
func (p *tab) logIn(token string) {
	p.t.Helper()
	p.at("Log in")
	p.fill("API key", token)
	p.click("Log in")
	p.at("Overview")
}

// copied clicks a button, and returns what the button has copied.
func (p *tab) copied(button string) string {
	p.t.Helper()
	_, err := chromedp.CallBrowser(p.ctx, browser.SetPermission, browser.SetPermissionParams{
		Permission:       &browser.PermissionDescriptor{Name: "clipboard-read"},
		Setting:          browser.PermissionSettingGranted,
		BrowserContextID: chromedp.FromContext(p.ctx).BrowserContextID,
	})
	require.NoError(p.t, err)
	p.click(button)
	p.sees(`//button[.="Copied"]`)
	return get(p, chromedp.Evaluate[string]("navigator.clipboard.readText()",
		chromedp.EvalAwaitPromise))
}

// choose chooses an option of the field with a label, with the keyboard.
func (p *tab) choose(label, option string) {
	p.t.Helper()
	p.do(chromedp.SendKeys(field(label), option))
}

// fact returns the value of a fact on the page.
func (p *tab) fact(name string) string {
	p.t.Helper()
	xpath := "//dt[normalize-space(.)=" + quoted(name) + "]/following-sibling::dd"
	return strings.TrimSpace(get(p, chromedp.Text(xpath)))
}

// html returns the source of the page.
func (p *tab) html() string {
	p.t.Helper()
	return get(p, chromedp.OuterHTML("//html"))
}
