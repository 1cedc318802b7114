package browsertest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// startBrowser starts a Chromium process with an empty profile, and returns its context.
func startBrowser(t *testing.T) context.Context {
	t.Helper()
	name := os.Getenv("CHROMIUM")
	if name == "" {
		name = "chromium"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("NOT RUN: there is no browser %s: install the Debian package chromium, "+
			"or set CHROMIUM", name)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()), chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true))
	if os.Getuid() == 0 {
		options = append(options, chromedp.NoSandbox)
	}
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	require.NoError(t, chromedp.Do(ctx)) // the process lasts as long as this context
	return ctx
}

// A tab is a tab of the browser, with cookies of its own, that notes each fault of its pages. The
// methods fail the test if the page is not as expected within patience.
type tab struct {
	t    *testing.T
	ctx  context.Context
	base string // the URL of the console, which ends in a slash

	mu     sync.Mutex
	faults []string
	// refused has the statuses that the test expects. The browser logs each as an error.
	refused map[int64]bool
}

const (
	patience = 30 * time.Second
	tick     = 10 * time.Millisecond
)

// open opens a tab at the console. If scripts is false, the tab runs no scripts.
func open(t *testing.T, browser context.Context, base string, scripts bool) *tab {
	t.Helper()
	p := &tab{t: t, base: base, refused: make(map[int64]bool)}
	ctx, cancel := chromedp.NewContext(browser, chromedp.WithNewBrowserContext(),
		chromedp.WithListener(p.note))
	p.ctx = ctx
	t.Cleanup(func() {
		faults := p.takeFaults()
		cancel()
		require.Empty(t, faults, "the pages have faults")
	})
	require.NoError(t, chromedp.Do(ctx))
	call(p, network.Enable, network.EnableParams{})
	call(p, log.Enable, cdp.Empty{})
	if !scripts {
		call(p, emulation.SetScriptExecutionDisabled,
			emulation.SetScriptExecutionDisabledParams{Value: true})
	}
	p.visit("")
	return p
}

// note notes a fault that an event of the browser is about.
func (p *tab) note(event any) {
	fault := ""
	switch e := event.(type) {
	case *log.EventEntryAdded: // also violations of the content security policy
		if e.Entry.Level == log.EntryLevelError || e.Entry.Source == log.EntrySourceSecurity {
			fault = fmt.Sprintf("%s: %s %s", e.Entry.Source, e.Entry.Text, e.Entry.URL)
		}
	case *runtime.EventConsoleAPICalled:
		if e.Type == runtime.ConsoleAPICalledTypeError ||
			e.Type == runtime.ConsoleAPICalledTypeWarning {
			fault = "console: " + string(e.Args[0].Value)
		}
	case *runtime.EventExceptionThrown:
		fault = "exception: " + e.ExceptionDetails.Text
		if e.ExceptionDetails.Exception != nil {
			fault += " " + e.ExceptionDetails.Exception.Description
		}
	case *network.EventRequestWillBeSent:
		if url := e.Request.URL; !strings.HasPrefix(url, p.base) &&
			!strings.HasPrefix(url, "data:") {
			fault = "request to another host: " + url
		}
	case *network.EventLoadingFailed:
		if !e.Canceled && e.ErrorText != "net::ERR_ABORTED" { // the end of a page ends its requests
			fault = fmt.Sprintf("request failed: %s %s", e.ErrorText, e.BlockedReason)
		}
	case *network.EventResponseReceived:
		if e.Response.Status >= 400 {
			fault = fmt.Sprintf("status %d of %s", e.Response.Status, e.Response.URL)
		}
	}
	if fault == "" {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for status := range p.refused {
		if strings.Contains(fault, fmt.Sprintf("status %d", status)) ||
			strings.Contains(fault, fmt.Sprintf("status of %d", status)) {
			return
		}
	}
	p.faults = append(p.faults, fault)
}

// takeFaults returns the faults so far, and forgets the faults.
func (p *tab) takeFaults() []string {
	p.t.Helper()
	p.wait()
	p.mu.Lock()
	defer p.mu.Unlock()
	faults := p.faults
	p.faults = nil
	return faults
}

// wait waits until all events up to now are noted: the browser sends them before the answer.
func (p *tab) wait() { call(p, runtime.Evaluate, runtime.EvaluateParams{Expression: "0"}) }

// refuse expects an answer with a status while act runs.
func (p *tab) refuse(status int64, act func()) {
	p.mu.Lock()
	p.refused[status] = true
	p.mu.Unlock()
	act()
	p.wait()
	p.mu.Lock()
	delete(p.refused, status)
	p.mu.Unlock()
}

func call[P, R any](p *tab, command cdp.Command[P, R], params P) R {
	p.t.Helper()
	result, err := chromedp.Call(p.ctx, command, params)
	require.NoError(p.t, err)
	return result
}

// do runs actions.
func (p *tab) do(actions ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, actions...); err != nil {
		p.fail(err)
	}
}

// get runs an action, and returns its value.
func get[T any](p *tab, action chromedp.Action[T]) T {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	value, err := chromedp.Run(ctx, action)
	if err != nil {
		p.fail(err)
	}
	return value
}

// fail fails the test, and shows the page.
func (p *tab) fail(err error) {
	p.t.Helper()
	url, _ := chromedp.Run(p.ctx, chromedp.Location())
	page, _ := chromedp.Run(p.ctx, chromedp.OuterHTML(chromedp.CSS("main")))
	require.NoError(p.t, err, "at %s: %s", url, secrets.ReplaceAllString(page, "…"))
}

// visit loads a page of the console.
func (p *tab) visit(path string) {
	p.t.Helper()
	p.do(chromedp.Navigate(p.base + path))
}

// at waits for the page with a heading.
func (p *tab) at(heading string) {
	p.t.Helper()
	p.sees("//h1[normalize-space(.)=" + quoted(heading) + "]")
}

// sees waits for an element that an XPath finds.
func (p *tab) sees(xpath string) {
	p.t.Helper()
	p.do(chromedp.WaitVisible(xpath))
}

// reads waits for a text on the page. The text is within one element.
func (p *tab) reads(text string) {
	p.t.Helper()
	p.sees("//main//*[contains(normalize-space(.), " + quoted(text) + ")]")
}

// click clicks the link or the button with a name.
func (p *tab) click(name string) {
	p.t.Helper()
	p.do(chromedp.Click("//*[self::a or self::button][normalize-space(.)=" + quoted(name) + "]"))
}

// field returns the XPath of the field with a label.
func field(label string) string {
	return "//*[@id=//label[normalize-space(text()[1])=" + quoted(label) + "]/@for]"
}

// fill types a text into the field with a label.
func (p *tab) fill(label, text string) {
	p.t.Helper()
	p.do(chromedp.SendKeys(field(label), text))
}

// text returns the text of the element with an id.
func (p *tab) text(id string) string {
	p.t.Helper()
	return get(p, chromedp.Text(chromedp.ID(id)))
}

// quoted returns a text as a literal of XPath, which knows no escapes.
func quoted(text string) string {
	if strings.Contains(text, `"`) {
		return "'" + text + "'"
	}
	return `"` + text + `"`
}
